"""Rules that compare samples of all shards: duplicates, by digest or by vectors in cells, and balanced clusters.

A first stage writes a record of each sample for the *bucket* that it belongs to; a second one finds the samples of a
bucket that are left out; a third one enters them into the codes of the chunks that have their rows.

Duplicates: a sample is left out if a duplicate of it is better, whether that one is kept or not, as in SemDeDup
(2303.09540). So each pair is judged by itself, and the outcome depends on no order of work.

Clusters: k-means of the vectors, and of the centroids on each level above, makes a tree. From the top down, the samples
to keep are divided equally among the clusters of a cluster, where one has too few among the others, as in 2405.15613;
which ones of a cluster, is drawn by seed and key.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from reinforce.explore.rules import BoundRule, RuleRows, draw
from reinforce.source.urls import digest_of
from reinforce.terminal import plural

_BUCKET_BYTES = 2**30  # of records that a process compares
_CELL_ROWS, _MAX_CELLS = 2**11, 2**15
_TRAINED_ROWS = 40  # for each cell
_WRITTEN_ROWS = 2**14  # at a time
_DIGESTS = np.dtype([("place", "<i8"), ("best", "<f8"), ("digest", "<u8")])
_DRAWS = np.dtype([("place", "<i8"), ("draw", "<u8"), ("cell", "<i4")])
_PLACES = np.dtype("<i8")


@dataclass(frozen=True)
class Buckets:
    """How records of ``rows`` samples are divided: vectors of ``dim`` numbers, or digests if that is 0.

    With a number of ``clusters`` the records have the cluster of a sample, and no vector.
    """

    rows: int
    dim: int
    clusters: int = 0

    @property
    def dtype(self) -> np.dtype[Any]:
        if not self.dim or self.clusters:
            return _DRAWS if self.clusters else _DIGESTS
        vector = ("vector", "<f2", (self.dim,))
        return np.dtype([("place", "<i8"), ("best", "<f8"), ("cell", "<i4"), ("home", "?"), vector])

    @property
    def cells(self) -> int:
        return self.clusters or max(1, min(_MAX_CELLS, -(-self.rows // _CELL_ROWS)))

    @property
    def count(self) -> int:
        """Number of buckets; no bucket has less than a cell."""
        copies = 2 if self.dim and not self.clusters else 1
        buckets = -(-self.rows * self.dtype.itemsize * copies // _BUCKET_BYTES)
        return max(1, min(buckets, self.cells) if self.dim else buckets)


@dataclass(frozen=True)
class Bucketed(Measure[npt.NDArray[Any]]):
    """The stages of a ``rule`` by buckets; ``firsts`` are the numbers of the first row of each chunk.

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
    def records(self) -> Shuffle:
        return self.parts.shuffle(self.stage("records"), self.buckets.dtype, self.buckets.count)

    @property
    def left_out(self) -> Shuffle:
        return self.parts.shuffle(self.stage("left-out"), _PLACES, len(self.firsts))

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
        if len(vectors) < self.buckets.clusters:
            few = f"{plural(len(vectors), 'sample')} with vectors of {layer}"
            raise UserError(f"rule {self.rule.label}: {few} cannot be {cells:,} clusters. Lower `clusters`.")
        centroids = neighbours.train(vectors, min(cells, len(vectors)), self.rule.seed)
        if self.buckets.clusters:
            centroids = neighbours.spread(vectors, centroids, self.rule.seed)
        self.parts.save(self.stage("centroids"), number, {"centroids": centroids})
        return {"trained": np.array(len(vectors))}

    @abstractmethod
    def compare(self, number: int, ranges: Ranges) -> Arrays:
        """Find the places of the samples of a bucket that are left out, for their chunks."""

    def leave_out(self, number: int, places: npt.NDArray[np.int64]) -> Arrays:
        """Write the places that a bucket leaves out, in ascending order."""
        self.left_out.write(number, np.searchsorted(self.firsts, places, side="right") - 1, [places])
        return {"left_out": np.array(len(places))}

    def enter(self, before: str, after: str, number: int, part: tuple[ShardChunk, Ranges]) -> Arrays:
        """Enter what all buckets leave out into a chunk's codes, from the stage ``before`` to ``after``."""
        chunk, ranges = part
        codes = self.parts.load(before, number)["codes"]
        places = np.unique(self.left_out.read(ranges))
        codes[places - chunk.first] = 2 * self.rule.number
        self.parts.save(after, number, {"codes": codes})
        return {"left_out": np.array(len(places))}


@dataclass(frozen=True)
class Duplicates(Bucketed):
    """Leaves out samples with a better duplicate."""

    @property
    def threshold(self) -> float:
        assert self.rule.spec.deduplicate is not None
        return self.rule.spec.deduplicate.threshold

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
        return self.leave_out(number, np.unique(records["place"][out]))


@dataclass(frozen=True)
class Balanced(Bucketed):
    """Leaves out samples of clusters of which more are there than their ``shares`` [clusters]."""

    shares: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def of(self, group: RuleRows) -> npt.NDArray[Any]:
        vectors, valid = neighbours.mean_vectors(group.tables[str(self.rule.layer)])
        group.codes[group.kept & ~valid] = 2 * self.rule.number + 1
        kept = np.flatnonzero(group.kept)
        records = np.zeros(len(kept), self.buckets.dtype)
        records["place"] = group.first + kept
        records["draw"] = draw(self.rule.seed, group.shard, group.keys.to_numpy(zero_copy_only=False))[kept]
        records["cell"] = neighbours.nearest(vectors[kept], _centroids(self.parts, self.stage("centroids")))
        return records

    def result(self, number: int, chunk: ShardChunk, found: Sequence[npt.NDArray[Any]], parts: Parts) -> Arrays:
        records = np.concatenate([np.zeros(0, self.buckets.dtype), *found])
        buckets = records["cell"] % self.buckets.count
        order = np.argsort(buckets, kind="stable")
        self.records.write(number, buckets[order], [records[order]])
        return {"sizes": np.bincount(records["cell"], minlength=self.buckets.clusters)}

    def divide(self, sizes: npt.NDArray[np.int64]) -> Balanced:
        """With the shares of clusters of these ``sizes``."""
        spec = self.rule.spec.balance
        assert spec is not None
        levels, parents = [sizes], []
        centroids = _centroids(self.parts, self.stage("centroids"))
        for count in spec.clusters[1:]:
            above = neighbours.train(centroids.astype(np.float16), count, self.rule.seed)
            parents.append(neighbours.nearest(centroids.astype(np.float16), above))
            levels.append(np.bincount(parents[-1], levels[-1], count).astype(np.int64))
            centroids = above
        total = int(sizes.sum())
        wanted = max(1, round(spec.keep * total)) if isinstance(spec.keep, float) else spec.keep
        shares = fill(levels[-1], wanted)
        for below, parent in zip(levels[-2::-1], parents[::-1], strict=True):
            of_level = np.zeros(len(below), np.int64)
            for number, share in enumerate(shares.tolist()):
                of_level[parent == number] = fill(below[parent == number], share)
            shares = of_level
        return replace(self, shares=shares)

    def compare(self, number: int, ranges: Ranges) -> Arrays:
        records = self.records.read(ranges)
        order = np.lexsort((records["place"], ~records["draw"], records["cell"]))  # the largest draws first
        cells = records["cell"][order]
        rank = np.arange(len(cells)) - np.searchsorted(cells, cells)
        return self.leave_out(number, np.sort(records["place"][order[rank >= self.shares[cells]]]))


def fill(sizes: npt.NDArray[np.int64], total: int) -> npt.NDArray[np.int64]:
    """Shares of a total [parts], as equal as parts of these ``sizes`` have it. A rest goes to the larger ones."""
    shares, left = np.zeros(len(sizes), np.int64), total
    for done, part in enumerate(np.argsort(sizes, kind="stable").tolist()):
        shares[part] = min(int(sizes[part]), left // (len(sizes) - done))
        left -= int(shares[part])
    return shares


@functools.lru_cache(maxsize=2)
def _centroids(parts: Parts, stage: str) -> neighbours.Floats:
    found: neighbours.Floats = parts.load(stage, 0)["centroids"]
    return found


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
