"""Passes over the shards, by chunks of shards, each of which is a part.

A pass reads the columns that its own rules need. Its codes, which say what rules have left out so far, are kept with
the results, so that no later pass evaluates them again.
"""

from __future__ import annotations

import functools
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from reinforce.dataset.aligned import AlignedLayers
from reinforce.dataset.index import Columns
from reinforce.dataset.layers import SAMPLES
from reinforce.dataset.view import ViewRows
from reinforce.errors import UserError
from reinforce.explore.expressions import connect, evaluate, join_rows
from reinforce.explore.parts import Arrays, Parts, content_digest
from reinforce.explore.rules import BoundRule, Codes, Ordered, RuleRows, ThresholdSearch, layers_of

_CHUNK_ROWS, _CHUNK_SHARDS = 2**18, 64
_THREADS = 8  # of a process that reads an object store
_T = TypeVar("_T")
#: Of a row group: its shard, the keys, codes and lists of values of its rows.
_Written: TypeAlias = "tuple[str, pa.Array, Codes, pa.Array]"
_local = threading.local()


@dataclass(frozen=True)
class ShardChunk:
    """Shards that are read together, each with its rows; ``first`` is the number of the first row in the dataset."""

    shards: Mapping[str, int]
    first: int

    @property
    def rows(self) -> int:
        return sum(self.shards.values())


def chunks_of(rows: Mapping[str, int]) -> list[ShardChunk]:
    """Divide shards, given with their rows."""
    chunks: list[ShardChunk] = []
    shards: dict[str, int] = {}
    first = 0
    for shard, count in rows.items():
        if shards and (sum(shards.values()) + count > _CHUNK_ROWS or len(shards) == _CHUNK_SHARDS):
            chunks.append(ShardChunk(shards, first))
            first += chunks[-1].rows
            shards = {}
        shards[shard] = count
    return [*chunks, ShardChunk(shards, first)] if shards else chunks


class Measure(ABC, Generic[_T]):
    """Results of a pass; ``rule`` is the one whose columns it reads."""

    rule: BoundRule | None

    @abstractmethod
    def of(self, group: RuleRows) -> _T:
        """The result of a row group. It is called in threads."""

    @abstractmethod
    def result(self, number: int, chunk: ShardChunk, found: Sequence[_T], parts: Parts) -> Arrays:
        """The result of chunk ``number``."""


@dataclass(frozen=True)
class Pass(Generic[_T]):
    """Applies ``pending`` rules to the rows of a chunk, and measures those that are kept.

    ``before`` is the stage whose codes it starts from, ``after`` the one that gets its own, if it changes some. The
    values of rules that are ``read`` are computed, too. Without a ``measure`` the rules are only applied.
    """

    parts: Parts
    inputs: Mapping[str, str]
    before: str | None
    after: str | None
    pending: Sequence[BoundRule]
    measure: Measure[_T] | None
    read: Sequence[BoundRule] = ()

    def __call__(self, number: int, chunk: ShardChunk) -> Arrays:
        codes = np.zeros(chunk.rows, np.uint16)
        if self.before is not None:
            codes = self.parts.load(self.before, number)["codes"]
        ends = np.cumsum([*chunk.shards.values()])
        firsts = (chunk.first + ends - [*chunk.shards.values()]).tolist()
        pool = _readers(1 if self.parts.store.local else _THREADS)
        found = [*pool.map(self._measure, chunk.shards, firsts, np.split(codes, ends[:-1]))]
        if self.after is not None:
            self.parts.save(self.after, number, {"codes": codes})
        every = [one for of_shard in found for one in of_shard]
        return {} if self.measure is None else self.measure.result(number, chunk, every, self.parts)

    def _measure(self, shard: str, start: int, codes: Codes) -> list[_T]:
        """What is found in each row group of a shard, whose ``codes`` are updated; it begins at row ``start``."""
        found, first = [], 0
        measured = None if self.measure is None else self.measure.rule
        rules = [*self.pending, *self.read, *([measured] if measured else [])]
        expressions = [one for rule in rules for one in rule.expressions]
        texts = [one.text for one in expressions]
        names = set().union(*(rule.sample_columns for rule in rules))
        inputs = {name: self.inputs[name] for name in layers_of(rules)}
        layers = AlignedLayers(self.parts.store, inputs, {SAMPLES: ["key", *sorted(names - {"key"})]})
        if texts and not hasattr(_local, "database"):
            _local.database = connect()  # of this thread
        with layers.open(shard, whole=False) as files:
            for index in range(files.row_groups):
                tables = files.read(index)
                values = evaluate(_local.database, texts, join_rows(expressions, tables)) if texts else []
                rows = len(tables[SAMPLES])
                of_group = codes[first : first + rows]
                if len(of_group) < rows:
                    break
                group = RuleRows(shard, start + first, tables, dict(zip(texts, values, strict=True)), of_group)
                for rule in self.pending:
                    rule.apply(group)
                if self.measure is not None:
                    found.append(self.measure.of(group))
                first += rows
        if first != len(codes):
            raise UserError(
                f"{self.parts.store.layer_path(SAMPLES, shard)} has changed since this selection began. Run it again."
            )
        return found


@functools.cache
def _readers(threads: int) -> ThreadPoolExecutor:
    """Threads that outlive a chunk: the database of each takes as much CPU to open as thousands of rows."""
    return ThreadPoolExecutor(threads)


os.register_at_fork(after_in_child=_readers.cache_clear)  # which lacks the threads


def digest_contents(parts: Parts, columns: Columns, number: int, chunk: ShardChunk) -> Arrays:
    """The digest of what rules read of each shard of a chunk: ``columns`` of layers."""
    pool = _readers(1 if parts.store.local else _THREADS)
    found = pool.map(functools.partial(content_digest, parts.store, columns), chunk.shards)
    return {"contents": np.fromiter(found, np.uint64, len(chunk.shards))}


@dataclass(frozen=True)
class CountValues(Measure[tuple[Ordered, Ordered]]):
    """Counts the values of a rule that may be the one above which it keeps samples."""

    rule: BoundRule
    search: ThresholdSearch

    def of(self, group: RuleRows) -> tuple[Ordered, Ordered]:
        groups, values, valid = self.rule.ordered(group)
        valid &= group.kept
        return groups[valid], values[valid]

    def result(self, number: int, chunk: ShardChunk, found: Sequence[tuple[Ordered, Ordered]], parts: Parts) -> Arrays:
        # Counting sorts, so it is done once for all row groups.
        groups, values = (np.concatenate([np.empty(0, np.uint64), *(one[n] for one in found)]) for n in (0, 1))
        return self.search.counts(groups, values)._asdict()


@dataclass(frozen=True)
class WriteRows(Measure[_Written]):
    """Writes why each row is left out, with the value by which each of ``valued`` rules decides, and counts: rows of
    each row group with each code."""

    view: ViewRows
    labels: Sequence[str | None]
    valued: Sequence[BoundRule] = ()
    rule: None = None

    def of(self, group: RuleRows) -> _Written:
        columns = [group.values[rule.value.text] for rule in self.valued if rule.value is not None]
        floats = [one.cast(pa.float64(), safe=False).cast(pa.float32(), safe=False) for one in columns]
        rows = np.empty((len(group.codes), len(floats)), np.float32)
        for n, one in enumerate(floats):
            rows[:, n] = one.fill_null(np.nan).to_numpy(zero_copy_only=False)
        offsets = pa.array(np.arange(len(rows) + 1) * rows.shape[1], pa.int32())
        return group.shard, group.keys, group.codes, pa.ListArray.from_arrays(offsets, pa.array(rows.ravel()))

    def result(self, number: int, chunk: ShardChunk, found: Sequence[_Written], parts: Parts) -> Arrays:
        reasons = pa.array(self.labels, pa.string())
        of_shard: dict[str, list[tuple[pa.Array, pa.Array, pa.Array]]] = {shard: [] for shard in chunk.shards}
        for shard, keys, codes, values in found:
            of_shard[shard].append((keys, reasons.take(pa.array(codes)), values))
        digests = [self.view.write(parts.store, shard, groups) for shard, groups in of_shard.items()]
        counts: list[npt.NDArray[np.int64]] = [np.bincount(codes, minlength=len(reasons)) for _, _, codes, _ in found]
        return {
            "digests": np.array(digests, np.uint64),
            "groups": np.array([len(groups) for groups in of_shard.values()]),
            "kept": np.array([of[0] for of in counts], np.int32),
            "codes": np.sum([np.zeros(len(reasons), np.int64), *counts], axis=0),
        }
