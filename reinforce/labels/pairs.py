"""Rows of two datasets that are of one image: by key in shards of one name, else by identity."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import pyarrow as pa

from reinforce.dataset.aligned import layer_errors
from reinforce.dataset.layer_file import LayerFile
from reinforce.dataset.layers import SAMPLES
from reinforce.dataset.store import Store
from reinforce.errors import UserError
from reinforce.labels.index import (
    COLUMNS,
    DIGEST,
    KEY,
    Identity,
    IdentityIndex,
    cached_index,
    columns_of_identities,
    stated,
)
from reinforce.labels.joining import IndexedRows, Joined, Joining, RowOf, Why, difference
from reinforce.labels.members import ABSENT, OTHER_IMAGE

_WITHOUT_IMAGES = ("uid", "sha256")  # kinds that a digest does not contradict
_CACHED_GROUPS = 64  # row groups of identities


@dataclass(frozen=True)
class RowPlace:
    """A row of a dataset: its shard, row group, and place in it; ``number`` counts over all row groups."""

    shard: str
    group: int
    row: int
    number: int


class Partners:
    """Finds the rows of one dataset that belong to the rows of another, a shard at a time, as labels are joined.

    ``counts`` are rows by what matched, or why not. Of those without a partner, ``unstated`` state no uid, SHA-256 or
    URL, and ``undigested`` may have one by digest, which the index lacks although the dataset is ``embedded`` and so
    has images. ``kinds`` are those of identities that rows looked for in the index state. Without an ``index``, only
    shards of one name are matched.
    """

    def __init__(self, store: Store, fingerprint: str, index: str | None, embedded: bool) -> None:
        self._store, self._fingerprint, self._embedded = store, fingerprint, embedded
        self._index = None if index is None else cached_index(index, fingerprint)
        self.counts: Counter[str] = Counter()
        self.unstated = self.undigested = 0
        self.kinds: set[str] = set()
        self._group = functools.lru_cache(maxsize=_CACHED_GROUPS)(self._read_group)

    def keys(self, shard: str) -> dict[str, RowPlace]:
        """The rows of a shard by key; none if there is no such shard."""
        if self._store.is_missing(SAMPLES, shard):
            return {}
        found: dict[str, RowPlace] = {}
        with layer_errors(self._store, SAMPLES, shard), self._open(shard) as file:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, ["key"], use_threads=False)
                first = len(found)
                for row, key in enumerate(table["key"].to_pylist()):
                    found[key] = RowPlace(shard, group, row, first + row)
        return found

    def find(
        self, samples: pa.Table, by_key: Mapping[str, RowPlace], digests: Callable[[], Sequence[int]] | None = None
    ) -> list[RowPlace | None]:
        """The partner of each row of a row group; ``by_key`` are those of the shard of the same name. ``digests``
        reads the images of the rows, if they have some and do not state their digests."""
        own, keys = stated(samples), samples["key"].to_pylist()
        found: list[RowPlace | None] = [None] * len(keys)
        why = [ABSENT] * len(keys)
        for row, key in enumerate(keys):
            place = by_key.get(key)
            if place is not None:
                differs = difference(own[row], self._stated(place), KEY)
                found[row], why[row] = (None, OTHER_IMAGE) if differs else (place, KEY)
        missing = [row for row, place in enumerate(found) if place is None]
        if self._index is not None and missing:
            joined, others = self._join(self._index, {row: own[row] for row in missing}, digests)
            for row, one in joined.items():
                found[row], why[row] = _place(self._index, one.shard, one.row), one.kind
            for row, other in others.items():
                why[row] = why[row] if other.what == ABSENT else other.what
        self.counts.update(why)
        return found

    def _join(
        self, index: IdentityIndex, own: Mapping[int, Identity], digests: Callable[[], Sequence[int]] | None
    ) -> tuple[dict[int, Joined], dict[int, Why]]:
        """Join rows by identity, those that no uid or SHA-256 joins also by the digests of their images."""
        self.kinds.update(*own.values(), [] if digests is None else [DIGEST])
        rows = _Indexed(index, self._embedded, self._stated)
        joined, why = Joining(rows, own).join(_WITHOUT_IMAGES)
        # Where all rows state a uid or SHA-256 and none has that of a sample, a digest would contradict.
        known = {kind for kind in _WITHOUT_IMAGES if index.kinds.get(kind) == sum(map(sum, index.groups))}
        wanting = [row for row, one in why.items() if one.what != ABSENT or not known & own[row].keys()]
        left = {row: dict(own[row]) for row in why}
        if digests is not None and wanting and DIGEST in index.kinds:
            values = digests()
            left |= {row: {**own[row], DIGEST: f"{values[row]:016x}"} for row in wanting}
        found, why = Joining(rows, left).join([*COLUMNS])
        self.unstated += sum(not own[row].keys() - {DIGEST} for row in why)
        if self._embedded and DIGEST not in index.kinds:
            self.undigested += sum(row in why and (digests is not None or DIGEST in own[row]) for row in wanting)
        return joined | found, why

    def _stated(self, place: RowPlace) -> Identity:
        rows = self._group(place.shard, place.group)
        if place.row >= len(rows):
            path = self._store.layer_path(SAMPLES, place.shard)
            raise UserError(f"{path} does not have the rows of its index: {place}.")
        return rows[place.row]

    def _read_group(self, shard: str, group: int) -> Sequence[Identity]:
        with layer_errors(self._store, SAMPLES, shard), self._open(shard) as file:
            columns = columns_of_identities(file.metadata.schema.to_arrow_schema().names, images=False)
            return stated(file.read_row_group(group, ["key", *columns], use_threads=False))

    def _open(self, shard: str) -> AbstractContextManager[LayerFile]:
        return self._store.open_layer(SAMPLES, shard, self._fingerprint, whole=False)


class _Indexed(IndexedRows):
    """The rows of an index, of which ``read`` returns what a row at a place states."""

    def __init__(self, index: IdentityIndex, embedded: bool, read: Callable[[RowPlace], Identity]) -> None:
        super().__init__(index, embedded)
        self._read = read

    def stated(self, row: RowOf) -> Identity:
        return self._read(_place(self.index, *row))


def _place(index: IdentityIndex, shard: int, row: int) -> RowPlace:
    return RowPlace(index.shards[shard], *index.row_group(shard, row), row)
