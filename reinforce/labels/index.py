"""The index of a dataset's identities: in which shard and row an image with an identity is.

``identities/index.json`` names a folder ``identities/<fingerprint>/``, in which ``shards.parquet`` lists the shards,
which are numbered in this order, with the rows of their row groups. ``<kind>/<number>.parquet`` is a partition: the
entries (hash, number of the shard, row in it) of all hashes that begin with the bits of its number, sorted by hash. So
a lookup reads the row groups that can have its hashes.

Equal hashes are not proof: compare the identities of the row. An untrusted index can name wrong rows, but no files.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError

import schemas
from reinforce.dataset.files.layer_file import LayerFile, RefusedFile
from reinforce.dataset.files.listing import SHARD_NAME
from reinforce.dataset.files.store import Store
from reinforce.dataset.layers import compute_fingerprint
from reinforce.errors import StorageError, UserError
from reinforce.labels.identities import INDEXED, Hashes
from reinforce.labels.unread import MissingLabels, naming_file
from reinforce.terminal import escape

FOLDER, DESCRIPTION, SHARDS = "identities", "index.json", "shards"
FORMAT, VERSION = "identity-index", 1
MAX_BITS = 16
_HASH_BITS = 64
_MAX_BYTES = 2**28  # of the list of shards
_READ_AT_ONCE = 32  # partitions
_FIX = "Make it again with `reinforce export labels`."

Ints = npt.NDArray[np.int32]
_Kind: TypeAlias = Annotated[str, Field(pattern=f"^({'|'.join(INDEXED)})$")]


class Entries(NamedTuple):
    """Entries of a partition, sorted by hash: hashes, numbers of shards, rows in these [entries] each."""

    hashes: Hashes
    shards: Ints
    rows: Ints


class Found(NamedTuple):
    """Candidates of hashes: places in these, numbers of shards, rows in these [candidates] each."""

    places: npt.NDArray[np.int64]
    shards: Ints
    rows: Ints


def partition_of(hashes: Hashes, bits: int) -> npt.NDArray[np.int64]:
    """The number of the partition of each hash [hashes]."""
    return np.zeros(len(hashes), np.int64) if bits == 0 else (hashes >> np.uint64(_HASH_BITS - bits)).astype(np.int64)


def index_fingerprint(samples: str, bits: int, shards: pa.Table) -> str:
    """Hash of what an index is made of: the fingerprint of the samples and the listing of their files."""
    listed = [shards["shard"].to_pylist(), shards["size"].to_pylist()]
    return compute_fingerprint({"identities": [FORMAT, VERSION, samples, bits, listed]})


def partition_name(number: int) -> str:
    return f"{number:05d}"


def damaged(path: str, error: Exception, fix: str = _FIX) -> UserError:
    """The error of a file of an index that cannot be read."""
    return UserError(f"{path} is damaged ({escape(str(error)[:200])}). {fix}")


class NoSuchRow(UserError, RefusedFile):
    """An index names a row that its shard does not have."""


@dataclass(frozen=True)
class IdentityIndex:
    """The index of a dataset. ``kinds`` counts the entries of each kind of identities, and ``repeated`` those of them
    whose identity other rows state too; it is None in indexes of earlier versions."""

    store: Store
    fingerprint: str
    samples: str
    bits: int
    kinds: dict[str, int]
    shards: list[str]
    groups: list[list[int]]
    repeated: dict[str, int] | None = None

    @property
    def folder(self) -> str:
        """The folder of its files in the dataset."""
        return f"{FOLDER}/{self.fingerprint}"

    def is_unique(self, kind: str) -> bool:
        """Whether no two rows state the same identity of a kind, if known."""
        return self.repeated is not None and not self.repeated.get(kind)

    def row_group(self, shard: int, row: int) -> tuple[int, int]:
        """The row group of a row of a shard, and the row in it. Raises NoSuchRow."""
        rest = row
        for number, rows in enumerate(self.groups[shard] if 0 <= shard < len(self.groups) else ()):
            if 0 <= rest < rows:
                return number, rest
            rest -= rows
        path = self.store.path(FOLDER, DESCRIPTION)
        raise NoSuchRow(f"{path} names row {row} of shard {shard}, which has none. {_FIX}")

    def place(self, shard: str, group: int) -> tuple[int, int]:
        """The number of a shard, and the first row of one of its row groups."""
        number = self._numbers[shard]
        return number, sum(self.groups[number][:group])

    @functools.cached_property
    def _numbers(self) -> dict[str, int]:
        return {shard: number for number, shard in enumerate(self.shards)}

    def lookup(self, kind: str, hashes: Hashes) -> Found:
        """The candidates of hashes in any order, which may be several of one hash.

        Reads only the row groups that can have them. Raises UserError if a partition is damaged.
        """
        order = np.argsort(hashes, kind="stable")
        wanted = hashes[order]
        numbers = partition_of(wanted, self.bits)
        found = [(np.empty(0, np.int64), _NOTHING.shards, _NOTHING.rows)]
        for number in np.unique(numbers) if kind in self.kinds else ():
            first, last = np.searchsorted(numbers, [number, number + 1])
            for entries in self._read(kind, int(number), wanted[first:last]):
                start = np.searchsorted(entries.hashes, wanted[first:last], "left")
                count = np.searchsorted(entries.hashes, wanted[first:last], "right") - start
                at = np.repeat(start - np.cumsum(count) + count, count) + np.arange(count.sum())
                found.append((np.repeat(order[first:last], count), entries.shards[at], entries.rows[at]))
        return Found(*(np.concatenate(columns) for columns in zip(*found, strict=True)))

    def _read(self, kind: str, number: int, hashes: Hashes) -> Iterator[Entries]:
        """The row groups of a partition that can have some sorted ``hashes``."""
        layer, name = f"{self.folder}/{kind}", partition_name(number)
        try:
            opened = self.store.open_layer(layer, name, whole=False)
            with naming_file(self.store, layer, name), opened as file:
                for group in range(file.num_row_groups):
                    if _can_have(file, group, hashes):
                        yield self._checked(file.read_row_group(group, _NAMES, use_threads=False))
        except StorageError:
            raise
        except FileNotFoundError:
            self._check_absent(kind, name)
        except (RefusedFile, ValueError, pa.ArrowException) as error:
            raise damaged(self.store.layer_path(layer, name), error) from error

    def _check_absent(self, kind: str, name: str) -> None:
        """Raise MissingLabels if a partition that does not exist is not one without entries."""
        if kind in self._whole:
            return
        layer = f"{self.folder}/{kind}"
        listed = self.store.shards(layer)
        with ThreadPoolExecutor(_READ_AT_ONCE) as pool:
            entries = sum(pool.map(lambda other: self._entries(layer, other), listed))
        if name in listed or entries != self.kinds[kind]:
            raise MissingLabels(f"{self.store.layer_path(layer, name)} does not exist any more. Restore it. {_FIX}")
        self._whole.add(kind)

    @functools.cached_property
    def _whole(self) -> set[str]:
        """Kinds whose partitions have all entries."""
        return set()

    def _entries(self, layer: str, name: str) -> int:
        with contextlib.suppress(FileNotFoundError):
            opened = self.store.open_layer(layer, name, whole=False)
            with naming_file(self.store, layer, name), opened as file:
                return int(file.metadata.num_rows)
        return 0

    def _checked(self, table: pa.Table) -> Entries:
        entries = Entries(*(table[name].cast(type_).to_numpy() for name, type_ in zip(_NAMES, _TYPES, strict=True)))
        inside = (entries.shards >= 0) & (entries.shards < len(self.shards)) & (entries.rows >= 0)
        if not inside.all() or (entries.hashes[1:] < entries.hashes[:-1]).any():
            raise ValueError("its entries are not sorted, or name no shard")
        return entries


def _can_have(file: LayerFile, group: int, hashes: Hashes) -> bool:
    """Whether a row group can have some of the sorted ``hashes``, by its statistics if it has some."""
    column = file.metadata.row_group(group).column(0)
    if not column.is_stats_set or not column.statistics.has_min_max:
        return True
    least, most = (np.uint64(int(bound) % 2**_HASH_BITS) for bound in (column.statistics.min, column.statistics.max))
    at = int(np.searchsorted(hashes, least))
    return at < len(hashes) and bool(hashes[at] <= most)


_SCHEMA = schemas.identities_schema()
_NAMES, _TYPES = _SCHEMA.names, _SCHEMA.types
_NOTHING = Entries(np.empty(0, np.uint64), np.empty(0, np.int32), np.empty(0, np.int32))


class _Stated(BaseModel):
    """What is read of index.json."""

    model_config = ConfigDict(strict=True)

    fingerprint: Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
    samples: str
    bits: Annotated[int, Field(ge=0, le=MAX_BITS)]
    kinds: dict[_Kind, int]
    repeated: dict[_Kind, int] | None = None


def find_index(store: Store) -> IdentityIndex | None:
    """Open the index of a dataset's identities; None if it has none. Raises UserError if it is damaged or newer."""
    path = store.path(FOLDER, DESCRIPTION)
    found = store.read_json(FOLDER, DESCRIPTION)
    if found is None:
        return None
    version = found.get("version")
    if found.get("format") != FORMAT or not isinstance(version, int):
        raise UserError(f"{path} does not describe an index of identities. {_FIX}")
    if version > VERSION:
        raise UserError(f"{path} was written by a newer version of this program. Upgrade to read it.")
    try:
        stated = _Stated.model_validate(found)
    except ValidationError as error:
        raise UserError(f"{path} is damaged. {_FIX}") from error
    table = _read_shards(store, stated.fingerprint)
    if index_fingerprint(stated.samples, stated.bits, table) != stated.fingerprint:
        raise UserError(f"{path} is not of the shards beside it: one of them was changed. {_FIX}")
    shards, groups = table["shard"].to_pylist(), table["groups"].to_pylist()
    return IdentityIndex(store, shards=shards, groups=groups, **dict(stated))


def open_index(store: Store) -> IdentityIndex:
    """``find_index``; raises UserError also if there is none."""
    index = find_index(store)
    if index is None:
        raise UserError(f"{store.url} has no {FOLDER}/{DESCRIPTION}, by which samples are found. {_FIX}")
    return index


@functools.lru_cache(maxsize=4)
def cached_index(url: str, fingerprint: str) -> IdentityIndex:
    """``open_index``, once a process for all shards; another ``fingerprint``, of labels or index, reads it again."""
    return open_index(Store(url))


def read_fingerprint(store: Store, planned: bool = True) -> str:
    """The fingerprint of an index, or 'None'. Raises MissingLabels if there is none although a plan has read it."""
    found = store.read_json(FOLDER, DESCRIPTION)
    if found is None and planned:
        raise MissingLabels(f"{store.path(FOLDER, DESCRIPTION)} does not exist any more. Restore it. {_FIX}")
    return str((found or {}).get("fingerprint"))


def _read_shards(store: Store, fingerprint: str) -> pa.Table:
    parts = (FOLDER, fingerprint, f"{SHARDS}.parquet")

    def parse(content: bytes) -> pa.Table:
        file = LayerFile(pa.BufferReader(content), len(content))
        return file.read(schemas.index_schema().names).cast(schemas.index_schema())

    try:
        table: pa.Table = store.read_parsed(parse, *parts, limit=_MAX_BYTES)
        if not all(SHARD_NAME.fullmatch(name) for name in table["shard"].to_pylist()) or table["groups"].null_count:
            raise ValueError("it names no shards")
    except FileNotFoundError as error:
        raise MissingLabels(f"{store.path(*parts)} is missing. {_FIX}") from error
    except (RefusedFile, ValueError, pa.ArrowException) as error:
        raise damaged(store.path(*parts), error) from error
    return table


def description(index: IdentityIndex) -> dict[str, Any]:
    """The content of index.json."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": index.fingerprint,
        "samples": index.samples,
        "bits": index.bits,
        "kinds": index.kinds,
        "repeated": index.repeated,
        "shards": len(index.shards),
        "rows": sum(map(sum, index.groups)),
    }
