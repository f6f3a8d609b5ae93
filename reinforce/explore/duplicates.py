"""Detection of samples with a better duplicate: equal images by digest, near ones by vectors in cells.

A sample is left out if a duplicate of it is better, whether that one is kept or not, as in SemDeDup (2303.09540). So
each pair is judged by itself, and the outcome depends on no order of work. A first stage writes a record of each sample
for the *bucket* that it belongs to; a second one finds the worse duplicates of a bucket; a third one enters them into
the codes of the chunks that have their rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

import schemas
from reinforce.dataset.aligned import AlignedLayers
from reinforce.dataset.layers import SAMPLES
from reinforce.dataset.shuffle import Ranges, Shuffle
from reinforce.errors import UserError
from reinforce.explore import neighbours
from reinforce.explore.parts import Arrays, Parts
from reinforce.explore.passes import Measure, ShardChunk
from reinforce.explore.rules import BoundRule, RuleRows
from reinforce.source.urls import digest_of

_BUCKET_BYTES = 2**30  # of records that a process compares
_CELL_ROWS, _MAX_CELLS = 2**11, 2**15
_TRAINED_ROWS = 40  # for each cell
_WRITTEN_ROWS = 2**14  # at a time
_DIGESTS = np.dtype([("place", "<i8"), ("best", "<f8"), ("digest", "<u8")])
_PLACES = np.dtype("<i8")


@dataclass(frozen=True)
class Buckets:
    """How records of ``rows`` samples are divided: vectors of ``dim`` numbers, or digests if that is 0."""

    rows: int
    dim: int

    @property
    def dtype(self) -> np.dtype[Any]:
        if not self.dim:
            return _DIGESTS
        vector = ("vector", "<f2", (self.dim,))
        return np.dtype([("place", "<i8"), ("best", "<f8"), ("cell", "<i4"), ("home", "?"), vector])

    @property
    def cells(self) -> int:
        return max(1, min(_MAX_CELLS, -(-self.rows // _CELL_ROWS)))

    @property
    def count(self) -> int:
        """Number of buckets; no bucket has less than a cell."""
        copies = 2 if self.dim else 1
        buckets = -(-self.rows * self.dtype.itemsize * copies // _BUCKET_BYTES)
        return max(1, min(buckets, self.cells) if self.dim else buckets)


@dataclass(frozen=True)
class Duplicates(Measure[npt.NDArray[Any]]):
    """The stages of a ``rule`` that finds duplicates; ``firsts`` are the numbers of the first row of each chunk.

    As the measure of a pass, it writes a record of each sample that is kept so far, for its bucket.
    """

    parts: Parts
    inputs: Mapping[str, str]
    rule: BoundRule
    buckets: Buckets
    firsts: tuple[int, ...]

    def stage(self, name: str) -> str:
        return f"{self.rule.number}-{name}"

    @property
    def threshold(self) -> float:
        assert self.rule.spec.deduplicate is not None
        return self.rule.spec.deduplicate.threshold

    @property
    def records(self) -> Shuffle:
        return self.parts.shuffle(self.stage("records"), self.buckets.dtype, self.buckets.count)

    @property
    def worse(self) -> Shuffle:
        return self.parts.shuffle(self.stage("duplicates"), _PLACES, len(self.firsts))

    def train(self, number: int, places: Sequence[tuple[str, int]]) -> Arrays:
        """Find centroids from row groups chosen at random, and save them."""
        assert self.rule.layer is not None
        store, layer, cells = self.parts.store, self.rule.layer, self.buckets.cells
        layers = AlignedLayers(store, {name: self.inputs[name] for name in (SAMPLES, layer)}, {})
        found = []
        for shard, index in places:
            with layers.open(shard, whole=False) as files:
                vectors, valid = neighbours.mean_vectors(files.read_unchecked(layer, index))
            found.append(vectors[valid])
        vectors = np.concatenate(found)[: cells * _TRAINED_ROWS]
        if not len(vectors):
            raise UserError(f"{store.url}: {layer} has no vectors. Choose another teacher.")
        centroids = neighbours.train(vectors, min(cells, len(vectors)), self.rule.seed)
        self.parts.save(self.stage("centroids"), number, {"centroids": centroids})
        return {"trained": np.array(len(vectors))}

    def of(self, group: RuleRows) -> npt.NDArray[Any]:
        values: npt.NDArray[Any]
        if self.rule.layer is not None:
            values, valid = neighbours.mean_vectors(group.tables[self.rule.layer])
        else:
            values, valid = digests(group.tables[SAMPLES])
        group.codes[group.kept & ~valid] = 2 * self.rule.number + 1
        kept = np.flatnonzero(group.kept)
        records = np.zeros(len(kept), self.buckets.dtype)
        records["place"] = group.first + kept
        records["best"] = self.rule.best(group)[kept]
        records["vector" if self.buckets.dim else "digest"] = values[kept]
        return records

    def result(self, number: int, chunk: ShardChunk, found: Sequence[npt.NDArray[Any]], parts: Parts) -> Arrays:
        records = np.concatenate([np.zeros(0, self.buckets.dtype), *found])
        if self.buckets.dim:
            centroids = parts.load(self.stage("centroids"), 0)["centroids"]
            rows, cells, homes = neighbours.assign(records["vector"], centroids, self.threshold)
            places = cells % self.buckets.count
        else:
            rows, cells, homes = np.arange(len(records)), None, None
            places = (records["digest"] % np.uint64(self.buckets.count)).astype(np.int64)
        order = np.argsort(places, kind="stable")

        def blocks() -> Iterator[npt.NDArray[Any]]:
            for start in range(0, len(order), _WRITTEN_ROWS):
                some = order[start : start + _WRITTEN_ROWS]
                block = records[rows[some]]
                if cells is not None and homes is not None:
                    block["cell"], block["home"] = cells[some], homes[some]
                yield block

        self.records.write(number, places[order], blocks())
        return {"records": np.array(len(order))}

    def compare(self, number: int, ranges: Ranges) -> Arrays:
        """Find the places of the worse duplicates of a bucket, for their chunks."""
        records = self.records.read(ranges)
        out = np.zeros(len(records), np.bool_)  # those with a better one near them, or of equal digest
        if self.rule.layer:
            order = np.argsort(records["cell"], kind="stable")
            ends = np.flatnonzero(np.diff(records["cell"][order], append=-1))
            for cell in np.split(order, ends[:-1] + 1):
                of = records[cell]
                out[cell] = neighbours.worse_duplicates(
                    of["vector"], of["home"], of["best"], of["place"], self.threshold
                )
        else:
            order = np.lexsort((records["place"], -records["best"], records["digest"]))
            in_order = records["digest"][order]
            out[order[1:]] = in_order[1:] == in_order[:-1]
        places = np.unique(records["place"][out])
        self.worse.write(number, np.searchsorted(self.firsts, places, side="right") - 1, [places])
        return {"worse": np.array(len(places))}

    def enter(self, before: str, after: str, number: int, part: tuple[ShardChunk, Ranges]) -> Arrays:
        """Enter the worse duplicates of all buckets into a chunk's codes, from the stage ``before`` to ``after``."""
        chunk, ranges = part
        codes = self.parts.load(before, number)["codes"]
        places = np.unique(self.worse.read(ranges))
        codes[places - chunk.first] = 2 * self.rule.number
        self.parts.save(after, number, {"codes": codes})
        return {"left_out": np.array(len(places))}


def training_places(
    groups: npt.NDArray[np.int64], shards: Sequence[str], seed: int, cells: int
) -> list[tuple[str, int]]:
    """Shards and row groups to find centroids from; ``groups`` is that of ``row_group_table`` [row groups, 3]."""
    order = np.random.default_rng([seed, len(groups)]).permutation(len(groups))
    enough = int(np.searchsorted(np.cumsum(groups[order, 2]), cells * _TRAINED_ROWS)) + 1
    return [(shards[shard], int(index)) for shard, index in sorted(map(tuple, groups[order[:enough], :2].tolist()))]


def digests(samples: pa.Table) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.bool_]]:
    """Digest of each image [rows], and whether there is one [rows], of rows of samples."""
    if "image" in samples.column_names:
        found = np.array([digest_of(image.as_buffer()) for image in samples["image"]], np.uint64)
        return found, np.ones(len(found), np.bool_)
    column = samples[schemas.IMAGE_DIGEST].combine_chunks()
    return column.fill_null(0).to_numpy(), np.asarray(column.is_valid())
