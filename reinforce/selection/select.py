"""``reinforce select``: apply rules to all samples of a dataset, and write a view.

Each shard is read by itself, in threads. What must be known of all samples, such as the value above which a share of
them lies, is found by passes over the shards that add up counts, so memory does not grow with the dataset.
"""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pandas.util import hash_array

from reinforce.dataset.files.store import Store
from reinforce.dataset.layers import SAMPLES
from reinforce.dataset.manifest.manifest import read_manifest
from reinforce.dataset.reading.aligned import AlignedLayers
from reinforce.dataset.reading.completeness import check_completeness
from reinforce.dataset.view import View, ViewRows, view_fingerprint, write_view
from reinforce.errors import UserError
from reinforce.processes.cores import available_cores
from reinforce.selection.config import Rule, SelectConfig
from reinforce.selection.expressions import Expression, check, connect, evaluate, numbers
from reinforce.selection.thresholds import FLOAT_BITS, HASH_BITS, Ordered, Search, number, ordered

_T = TypeVar("_T")
_Codes = npt.NDArray[np.int64]


@dataclass
class _Rule:
    """A rule in work: its ``expression``, if it has one, and ``threshold``, once it is known."""

    label: str
    spec: Rule
    expression: Expression | None
    threshold: int | None = None

    @property
    def wanted(self) -> int | float | None:
        """How many samples it keeps, or which share, if that depends on all of them."""
        return self.spec.sample or (self.spec.keep.top if self.spec.keep else None)

    @property
    def bits(self) -> int:
        return FLOAT_BITS if self.expression else HASH_BITS


@dataclass
class _Group:
    """Rows of a row group, with the ``values`` of expressions.

    ``codes`` is 0 for rows that are kept so far, 2 n for those that rule n (from 1) leaves out, and 2 n + 1 for those
    for which its expression is null.
    """

    shard: str
    keys: pa.Array
    values: Mapping[str, pa.Array]
    codes: _Codes


def select(config: SelectConfig, log: Callable[[str], None] = lambda line: None) -> View:
    """Write the view of a config, in place of an earlier one of its name; ``log`` gets lines on the progress.

    Raises UserError.
    """
    store = Store(config.dataset)
    manifest = read_manifest(store)
    rules = [_checked(n, rule, manifest) for n, rule in enumerate(config.rules, 1)]
    layers = {SAMPLES, *(layer for rule in rules if rule.expression for layer in rule.expression.layers)}
    inputs = {
        name: str(manifest["layers"][name]["fingerprint"])
        for name in sorted(layers, key=lambda name: (name != SAMPLES, name))
    }
    shards = _complete_shards(store, inputs, log)
    with ThreadPoolExecutor(available_cores()) as pool:
        selection = _Selection(store, inputs, rules, config.seed, shards, pool)
        for place, rule in enumerate(rules):
            if rule.wanted is not None:
                log(f"rule {rule.label}: looking for the value above which it keeps samples")
                selection.find_threshold(place)
        log(f"writing {len(shards):,} shards")
        written = [rule.model_dump(mode="json", exclude_unset=True) for rule in config.rules]
        fingerprint = view_fingerprint(written, config.seed, inputs, shards)
        counts = selection.write(ViewRows(config.name, fingerprint))
    rows = {shard: int(found.sum()) for shard, found in counts.items()}
    kept = {shard: found[:, 0].tolist() for shard, found in counts.items()}
    report = _report(rules, np.sum([found.sum(axis=0) for found in counts.values()], axis=0))
    view = View(config.name, fingerprint, written, config.seed, inputs, rows, kept, report)
    if not len(view):
        last = next(line["rule"] for line in reversed(report) if line["rows"])
        raise UserError(f"the rules keep no sample: rule {last} leaves out the last; view {config.name} is not written")
    write_view(store, view)
    return view


def report_lines(view: View) -> Iterator[str]:
    """What each rule of a view took, for people."""
    for line in view.report:
        null = f", of which {line['null']:,} have no value" if line["null"] else ""
        above = f"; keeps values of at least {line['threshold']:g}" if line.get("threshold") is not None else ""
        yield f"{line['rule']}: {line['left_out']:,} of {line['rows']:,} samples are left out{null}{above}"
    yield f"view {view.name}: {len(view):,} of {sum(view.counts.values()):,} samples are kept"


def _checked(number_: int, rule: Rule, manifest: Any) -> _Rule:
    text = rule.where or (rule.keep.by if rule.keep else None)
    label = f"{number_} {rule.name}"
    where = f"rules.{number_ - 1}.{'keep.by' if rule.keep else rule.name}"
    return _Rule(label, rule, None if text is None else check(text, manifest, where, boolean=rule.keep is None))


def _complete_shards(store: Store, inputs: Iterable[str], log: Callable[[str], None]) -> list[str]:
    """The shards that have all layers. Raises UserError if one lacks a layer that is not quarantined."""
    found = check_completeness(store, store.listings(inputs))
    if found.missing:
        raise UserError(f"{store.url}: {found.describe_missing()}. Finish the run before you select.")
    if found.quarantined:
        log(found.describe_quarantined())
    return found.complete


def _report(rules: Sequence[_Rule], counts: npt.NDArray[np.int64]) -> list[dict[str, Any]]:
    """Of each rule: the rows that it saw, how many it leaves out, and for how many its expression is null."""
    left, report = int(counts.sum()), []
    for n, rule in enumerate(rules, 1):
        out, null = (int(count) for count in counts[2 * n : 2 * n + 2])
        line: dict[str, Any] = {"rule": rule.label, "rows": left, "left_out": out + null, "null": null}
        if rule.threshold and rule.expression:
            line["threshold"] = number(rule.threshold)
        report.append(line)
        left -= out + null
    return report


class _Selection:
    def __init__(
        self,
        store: Store,
        inputs: dict[str, str],
        rules: Sequence[_Rule],
        seed: int,
        shards: Sequence[str],
        pool: ThreadPoolExecutor,
    ) -> None:
        self._store, self._rules, self._seed, self._shards, self._pool = store, rules, seed, shards, pool
        columns = {name for rule in rules if rule.expression for name in rule.expression.sample_columns}
        self._layers = AlignedLayers(store, inputs, {SAMPLES: ["key", *sorted(columns - {"key"})]})
        self._local = threading.local()

    def find_threshold(self, place: int) -> None:
        """Find the value above which a rule keeps samples; those of the rules before it are known."""
        rule = self._rules[place]
        search = Search(rule.bits)
        while search.left:
            counts = sum(self._map(functools.partial(self._count, place=place, search=search)))
            assert isinstance(counts, np.ndarray)
            if search.left == rule.bits:
                total, wanted = int(counts.sum()), rule.wanted
                assert wanted is not None
                search = Search(rule.bits, max(1, round(wanted * total)) if isinstance(wanted, float) else wanted)
                if search.wanted >= total:  # it keeps all
                    rule.threshold = 0
                    return
            search = search.narrowed(counts)
        rule.threshold = search.prefix

    def write(self, rows: ViewRows) -> dict[str, npt.NDArray[np.int64]]:
        """Write the rows of all shards -> how many rows of each row group of a shard have each code [groups, codes]."""
        return dict(zip(self._shards, self._map(functools.partial(self._write, rows=rows)), strict=True))

    def _map(self, work: Callable[[str], _T]) -> Iterator[_T]:
        return self._pool.map(work, self._shards)

    def _count(self, shard: str, place: int, search: Search) -> npt.NDArray[np.int64]:
        counts = np.zeros(2**16, np.int64)
        *earlier, rule = self._rules[: place + 1]
        for group in self._groups(shard, earlier, rule):
            values, valid = self._ordered(rule, group)
            counts += search.counts(values[valid & (group.codes == 0)])
        return counts

    def _write(self, shard: str, rows: ViewRows) -> npt.NDArray[np.int64]:
        labels = [None, None, *(text for rule in self._rules for text in (rule.label, f"{rule.label}: null"))]
        reasons = pa.array(labels, pa.string())
        counts, groups = [np.zeros((0, len(labels)), np.int64)], []
        for group in self._groups(shard, self._rules):
            counts.append(np.bincount(group.codes, minlength=len(labels))[None])
            groups.append((group.keys, reasons.take(pa.array(group.codes))))
        rows.write(self._store, shard, groups)
        return np.concatenate(counts)

    def _groups(self, shard: str, rules: Sequence[_Rule], *others: _Rule) -> Iterator[_Group]:
        """The row groups of a shard after the first ``rules``, with the values of these and of ``others``."""
        expressions = [rule.expression for rule in (*rules, *others) if rule.expression]
        with self._layers.open(shard, whole=False) as files:
            for index in range(files.row_groups):
                tables = files.read(index)
                found = evaluate(self._database, expressions, tables) if expressions else []
                values = {one.text: value for one, value in zip(expressions, found, strict=True)}
                keys = tables[SAMPLES]["key"].combine_chunks()
                group = _Group(shard, keys, values, np.zeros(len(keys), np.int64))
                for n, rule in enumerate(rules, 1):
                    self._apply(n, rule, group)
                yield group

    def _apply(self, n: int, rule: _Rule, group: _Group) -> None:
        if rule.spec.where is not None:
            values = group.values[rule.spec.where]
            valid = np.asarray(values.is_valid())
            keeps = values.fill_null(False).to_numpy(zero_copy_only=False)
        else:
            assert rule.threshold is not None
            order, valid = self._ordered(rule, group)
            keeps = order >= np.uint64(rule.threshold)
        alive = group.codes == 0
        group.codes[alive & ~valid] = 2 * n + 1
        group.codes[alive & valid & ~keeps] = 2 * n

    def _ordered(self, rule: _Rule, group: _Group) -> tuple[Ordered, npt.NDArray[np.bool_]]:
        """The numbers by which a rule keeps rows, as integers, and the rows that have one."""
        if rule.expression is not None:
            values = numbers(group.values[rule.expression.text])
            return ordered(values), ~np.isnan(values)
        # A key is unique in its shard only.
        salt = hashlib.blake2b(f"{self._seed}\0{group.shard}".encode(), digest_size=8).hexdigest()
        hashes = hash_array(group.keys.to_numpy(zero_copy_only=False), hash_key=salt, categorize=False)
        return hashes >> np.uint64(64 - HASH_BITS), np.ones(len(hashes), np.bool_)

    @property
    def _database(self) -> Any:
        """The database of this thread."""
        if not hasattr(self._local, "database"):
            self._local.database = connect()
        return self._local.database
