"""Rows of two datasets that are of one image: by key in shards of one name, else by identity."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import pyarrow as pa

from reinforce.datacompdr.matching import ABSENT, KEY, OTHER_IMAGE, Identity, difference
from reinforce.dataset.files.layer_file import LayerFile
from reinforce.dataset.files.store import Store
from reinforce.dataset.layers import SAMPLES
from reinforce.dataset.reading.aligned import layer_errors
from reinforce.labels.identities import COLUMNS, columns_of_identities, hash_identities, identities, stated
from reinforce.labels.index import IdentityIndex, open_index

_CACHED_GROUPS = 64  # row groups of identities


@dataclass(frozen=True)
class Place:
    """A row of a dataset: its shard, row group, and place in it; ``number`` counts over all row groups."""

    shard: str
    group: int
    row: int
    number: int


class Partners:
    """Finds the rows of one dataset that belong to the rows of another, a shard at a time.

    ``counts`` are rows by what matched, or why not. Without an ``index``, only shards of one name are matched.
    """

    def __init__(self, store: Store, fingerprint: str, index: str | None) -> None:
        self._store, self._fingerprint = store, fingerprint
        self._index = None if index is None else _index(index)
        self.counts: Counter[str] = Counter()
        self._group = functools.lru_cache(maxsize=_CACHED_GROUPS)(self._read_group)

    def keys(self, shard: str) -> dict[str, Place]:
        """The rows of a shard by key; none if there is no such shard."""
        if self._store.is_missing(SAMPLES, shard):
            return {}
        found: dict[str, Place] = {}
        with layer_errors(self._store, SAMPLES, shard), self._open(shard) as file:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, ["key"], use_threads=False)
                first = len(found)
                for row, key in enumerate(table["key"].to_pylist()):
                    found[key] = Place(shard, group, row, first + row)
        return found

    def find(self, samples: pa.Table, by_key: Mapping[str, Place]) -> list[Place | None]:
        """The partner of each row of a row group; ``by_key`` are those of the shard of the same name."""
        own, keys = stated(samples), samples["key"].to_pylist()
        found: list[Place | None] = [None] * len(keys)
        why = [ABSENT] * len(keys)
        for row, key in enumerate(keys):
            place = by_key.get(key)
            if place is not None:
                differs = difference(own[row], self._stated(place), KEY)
                found[row], why[row] = (None, OTHER_IMAGE) if differs else (place, KEY)
        missing = [row for row, place in enumerate(found) if place is None]
        if self._index is not None and missing:
            for row, kind, place in self._candidates(self._index, samples.take(missing)):
                if found[missing[row]] is None:
                    differs = difference(own[missing[row]], self._stated(place), kind)
                    at = missing[row]
                    found[at], why[at] = (None, OTHER_IMAGE) if differs else (place, kind)
        self.counts.update(why)
        return found

    def _candidates(self, index: IdentityIndex, samples: pa.Table) -> Iterator[tuple[int, str, Place]]:
        """Row, kind and place of rows that may belong to those of a table, strongest kinds first."""
        values = identities(samples)
        for kind in COLUMNS:
            if kind in values and kind in index.kinds:
                hashes, places = hash_identities(kind, values[kind])
                entries = index.lookup(kind, hashes)
                for at, shard, row in zip(places[entries.places], entries.shards, entries.rows, strict=True):
                    yield int(at), kind, Place(index.shards[shard], *index.row_group(int(shard), int(row)), int(row))

    def _stated(self, place: Place) -> Identity:
        return self._group(place.shard, place.group)[place.row]

    def _read_group(self, shard: str, group: int) -> Sequence[Identity]:
        with layer_errors(self._store, SAMPLES, shard), self._open(shard) as file:
            columns = columns_of_identities(file.metadata.schema.to_arrow_schema().names, images=False)
            return stated(file.read_row_group(group, ["key", *columns], use_threads=False))

    def _open(self, shard: str) -> AbstractContextManager[LayerFile]:
        return self._store.open_layer(SAMPLES, shard, self._fingerprint, whole=False)


@functools.lru_cache(maxsize=2)
def _index(url: str) -> IdentityIndex:
    return open_index(Store(url))
