"""Identities of the images of a samples layer, by kind, and their index: in which shard and row an image is.

Published labels have a column for each kind. Of other datasets, ``uid``, ``sha256`` and ``url`` are in the metadata of
a sample, and the digest is that of the encoded image.

``identities/index.json`` names a folder ``identities/<fingerprint>/``, in which ``shards.parquet`` lists the shards,
which are numbered in this order, with the rows of their row groups. ``<kind>/<number>.parquet`` is a partition: the
entries (hash, number of the shard, row in it) of all hashes that begin with the bits of its number, sorted by hash. So
a lookup reads the row groups that can have its hashes. Equal hashes are not proof: compare the identities of the row.
An untrusted index can name wrong rows, but no files.
"""

from __future__ import annotations

import contextlib
import functools
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, NamedTuple, TypeAlias, TypeVar
from urllib.parse import quote, urlsplit

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field, ValidationError

import schemas
from reinforce.dataset.layer_file import LayerFile, RefusedFile
from reinforce.dataset.layers import LABELS, compute_fingerprint
from reinforce.dataset.store import SHARD_NAME, Store
from reinforce.errors import StorageError, UserError
from reinforce.processes.attempts import pause_seconds
from reinforce.source.samples import parse_json
from reinforce.source.urls import digest_of
from reinforce.terminal import escape
from schemas import IDENTITIES, IMAGE_DIGEST

#: Digest of the encoded image, in 16 hex digits.
DIGEST = "digest"
#: Kinds of identities, strongest first.
KINDS = ("uid", "sha256", DIGEST, "url")
#: The key of a sample, which is no identity of its image.
KEY = "key"
#: What a side states of an image: values by kind.
Identity: TypeAlias = "Mapping[str, str]"
#: The column of each kind in the samples of published labels.
COLUMNS = dict(zip(KINDS, IDENTITIES, strict=True))
#: Kinds that an index has: also the keys of rows of which nothing else is stated but a digest.
INDEXED = (*COLUMNS, KEY)

Hashes = npt.NDArray[np.uint64]

_DEFAULT_PORTS = {("http", "80"), ("https", "443")}
_NORMAL_URL = re.compile(r"https?://[a-z0-9.-]+/[\w%/:?@!$&'()*+,;=~.-]*", re.ASCII)  # as most are
_KEPT = "%/:?#[]@!$&'()*+,;=~"  # characters of a URL that are not percent-encoded


def identity_of(sidecars: Mapping[str, bytes]) -> Identity:
    """The identity in a sample's members: ``uid``, ``sha256`` and ``url`` of ``json``, and ``url.txt``."""
    document = parse_json(sidecars["json"]) if "json" in sidecars else None
    stated = (kind for kind in KINDS if kind != DIGEST)
    found = {kind: document.get(kind) for kind in stated} if isinstance(document, dict) else {}
    if "url.txt" in sidecars:
        found["url"] = sidecars["url.txt"].decode(errors="replace")
    values = {kind: value.strip() for kind, value in found.items() if isinstance(value, str) and value.strip()}
    return {kind: _NORMAL[kind](value) if kind in _NORMAL else value for kind, value in values.items()}


def normal_url(url: str) -> str:
    """A URL in one spelling: scheme and host in lower case, without default port and fragment, percent-encoded."""
    if _NORMAL_URL.fullmatch(url):
        return url
    try:
        parts = urlsplit(url)
        path = quote(parts.path or "/", _KEPT) + (f"?{quote(parts.query, _KEPT)}" if parts.query else "")
    except ValueError:  # also of lone surrogates
        return url
    user, at, host = parts.netloc.rpartition("@")
    name, colon, port = host.lower().rpartition(":")
    host = name if colon and (parts.scheme, port) in _DEFAULT_PORTS else host.lower()
    return f"{parts.scheme}://{user}{at}{host}{path}"


_NORMAL = {"sha256": str.lower, "url": normal_url}


def columns_of_identities(names: Sequence[str], images: bool = True) -> list[str]:
    """The columns of a samples file with the columns ``names`` that have identities; images only on request."""
    wanted = [*COLUMNS.values(), *([] if {"uid", "sha256"} & {*names} else ["metadata"])]
    found = [name for name in wanted if name in names]
    return [*found, "image"] if images and "image" in names and IMAGE_DIGEST not in names else found


def identities(samples: pa.Table) -> dict[str, pa.Array]:
    """The identities of rows of samples by kind, null where a row states none: texts, and digests as uint64 [rows]."""
    found = {kind: samples[name].combine_chunks() for kind, name in COLUMNS.items() if name in samples.column_names}
    if DIGEST not in found and "image" in samples.column_names:
        found[DIGEST] = pa.array(map(digest_of, samples["image"].to_pylist()), pa.uint64())
    if "metadata" in samples.column_names and "uid" not in found:
        stated = [{} if one is None else identity_of({"json": one.encode()}) for one in samples["metadata"].to_pylist()]
        for kind in COLUMNS:
            if kind != DIGEST:
                found[kind] = pa.array([one.get(kind) for one in stated], pa.string())
    return {kind: found[kind] for kind in COLUMNS if kind in found}


def stated(samples: pa.Table) -> list[Identity]:
    """The identity of each row, with digests in 16 hex digits."""
    columns = {kind: values.to_pylist() for kind, values in identities(samples).items()}
    if DIGEST in columns:
        columns[DIGEST] = [None if value is None else f"{value:016x}" for value in columns[DIGEST]]
    return [
        {kind: values[row] for kind, values in columns.items() if values[row] is not None}
        for row in range(samples.num_rows)
    ]


def lone_keys(samples: pa.Table, found: Mapping[str, pa.Array]) -> pa.Array:
    """The keys of rows, null where one of the identities ``found`` states more: no digest, no uid that is the key."""
    keys = samples["key"].combine_chunks()
    stated = np.zeros(len(keys), bool)
    for kind, values in found.items():
        if kind != DIGEST:
            stated |= pc.fill_null(pc.not_equal(values, keys), False).to_numpy(zero_copy_only=False)
    return pc.if_else(pa.array(stated), None, keys)


def hash_identities(kind: str, values: pa.Array) -> tuple[Hashes, npt.NDArray[np.int64]]:
    """Hashes of the values that are not null, and their places: digests themselves, of texts BLAKE2b-64 [m], [m]."""
    places = np.flatnonzero(values.is_valid().to_numpy(zero_copy_only=False)).astype(np.int64)
    present = values.drop_null()
    if kind == DIGEST:
        return present.to_numpy().astype(np.uint64), places
    hashes = (hash_text(text) for text in present.to_pylist())
    return np.fromiter(hashes, np.uint64, len(present)), places


def hash_text(text: str) -> int:
    """BLAKE2b-64 of a uid, SHA-256, URL or key."""
    return digest_of(text.encode("utf-8", "surrogatepass"))


_MOST_SECONDS = 60.0  # of pauses of one reader: a step of a shard must not seem to hang
_ABSENT: set[tuple[str, str]] = set()  # URL of labels and file: a process waits once for each
T = TypeVar("T")


class RefusedLabels(StorageError, PermissionError):
    """A file of labels may not be read."""


class MissingLabels(StorageError, FileNotFoundError):
    """A part of labels does not exist, without which nothing can be said of any sample."""


def quarantine_of(labels: str) -> str:
    """The folder below ``quarantine`` whose files name what could not be read of some labels, by shard."""
    return f"{LABELS}/{labels}"


@contextlib.contextmanager
def naming_file(store: Store, layer: str, shard: str) -> Iterator[None]:
    """Turn errors of a storage into StorageError with the path, and into RefusedLabels where it refuses the file.

    FileNotFoundError stays.
    """
    try:
        with store.storage_errors("read", layer, f"{shard}.parquet"):
            yield
    except StorageError as error:
        if isinstance(error.__cause__, PermissionError) and not isinstance(error, PermissionError):
            raise RefusedLabels(str(error)) from error
        raise


@dataclass
class LabelFiles:
    """Reads files of labels in at most ``attempts``. ``unread`` are those that could not be read, with the reason.

    A file that does not exist is asked for as often as a source shard, with the same pauses, because a store may answer
    404 for a file that it has. After that, its rows have no labels. What the storage refuses or fails to send is an
    error of the storage, for which the run waits.

    ``check`` raises StorageError if the labels do not exist any more.
    """

    store: Store
    attempts: int
    check: Callable[[], object]
    unread: dict[str, str] = field(default_factory=dict)
    _refused: dict[tuple[str, int | None], str] = field(default_factory=dict)  # files and their row groups
    _waited: float = 0.0

    def read(self, layer: str, shard: str, read: Callable[[], T], group: int | None = None) -> T:
        """What ``read`` returns of a file, or of a row group of it. Raises RefusedFile, now and each later time, if it
        does not exist or is damaged or of another recipe, and StorageError, after which it is read again."""
        name = f"{layer}/{shard}.parquet"
        for place in ((name, None), (name, group)):
            if place in self._refused:
                raise RefusedFile(self._refused[place])
        try:
            with naming_file(self.store, layer, shard):
                return self._read(name, read)
        except StorageError:
            raise
        except FileNotFoundError as error:
            self.check()
            self._refused[name, None] = f"{name} does not exist"
            self.unread[name] = "does not exist"
            raise RefusedFile(self._refused[name, None]) from error
        except (ValueError, UserError) as error:
            self.unread.setdefault(name, f"cannot be read: {error}")
            self._refused[name, group] = str(error)  # the error would keep what was read
            raise RefusedFile(str(error)) from error

    def _read(self, name: str, read: Callable[[], T]) -> T:
        """Read a file, again after a pause where it does not exist. Raises FileNotFoundError."""
        known = (self.store.url, name)
        for attempt in range(1, self.attempts):
            if known in _ABSENT or self._waited > _MOST_SECONDS:
                break
            with contextlib.suppress(FileNotFoundError):
                return read()
            seconds = pause_seconds(attempt)
            time.sleep(seconds)
            self._waited += seconds
            self.store.fs.invalidate_cache()
        try:
            found = read()
        except FileNotFoundError:
            _ABSENT.add(known)
            raise
        _ABSENT.discard(known)
        return found


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


def damaged(path: str, error: Exception, fix: str = _FIX) -> UserError:
    """The error of a file of an index that cannot be read."""
    return UserError(f"{path} is damaged ({escape(str(error)[:200])}). {fix}")


class NoSuchRow(UserError, RefusedFile):
    """An index names a row that its shard does not have."""


@dataclass(frozen=True)
class IdentityIndex:
    """The index of a dataset. ``kinds`` counts the entries of each kind of identities, and ``repeated`` those of them
    whose identity other rows state too."""

    store: Store
    fingerprint: str
    samples: str
    bits: int
    kinds: dict[str, int]
    shards: list[str]
    groups: list[list[int]]
    repeated: dict[str, int]
    _whole: set[str] = field(default_factory=set, compare=False, repr=False)  # kinds whose partitions have all entries

    @property
    def folder(self) -> str:
        """The folder of its files in the dataset."""
        return f"{FOLDER}/{self.fingerprint}"

    def row_group(self, shard: int, row: int) -> tuple[int, int]:
        """The row group of a row of a shard, and the row in it. Raises NoSuchRow."""
        rest = row
        for number, rows in enumerate(self.groups[shard] if 0 <= shard < len(self.groups) else ()):
            if 0 <= rest < rows:
                return number, rest
            rest -= rows
        path = self.store.path(FOLDER, DESCRIPTION)
        raise NoSuchRow(f"{path} names row {row} of shard {shard}, which has none. {_FIX}")

    @functools.cached_property
    def numbers(self) -> dict[str, int]:
        """The number of each shard."""
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

    def _check_absent(self, kind: str, name: str) -> None:
        """Raise MissingLabels if a partition that does not exist is not one without entries."""
        if kind in self._whole:
            return
        layer = f"{self.folder}/{kind}"
        listed = self.store.shards(layer)

        def count(other: str) -> int:
            with contextlib.suppress(FileNotFoundError):
                opened = self.store.open_layer(layer, other, whole=False)
                with naming_file(self.store, layer, other), opened as file:
                    return int(file.metadata.num_rows)
            return 0

        with ThreadPoolExecutor(_READ_AT_ONCE) as pool:
            entries = sum(pool.map(count, listed))
        if name in listed or entries != self.kinds[kind]:
            raise MissingLabels(f"{self.store.layer_path(layer, name)} does not exist any more. Restore it. {_FIX}")
        self._whole.add(kind)

    def _read(self, kind: str, number: int, hashes: Hashes) -> Iterator[Entries]:
        """The row groups of a partition that can have some sorted ``hashes``."""
        layer, name = f"{self.folder}/{kind}", f"{number:05d}"
        try:
            opened = self.store.open_layer(layer, name, whole=False)
            with naming_file(self.store, layer, name), opened as file:
                for group in range(file.num_row_groups):
                    statistics = file.metadata.row_group(group).column(0).statistics
                    if statistics is not None and statistics.has_min_max:
                        least, most = (np.uint64(int(b) % 2**_HASH_BITS) for b in (statistics.min, statistics.max))
                        at = int(np.searchsorted(hashes, least))
                        if at == len(hashes) or hashes[at] > most:
                            continue
                    table = file.read_row_group(group, _NAMES)
                    columns = (table[name].cast(type_).to_numpy() for name, type_ in zip(_NAMES, _TYPES, strict=True))
                    entries = Entries(*columns)
                    inside = (entries.shards >= 0) & (entries.shards < len(self.shards)) & (entries.rows >= 0)
                    if not inside.all() or (entries.hashes[1:] < entries.hashes[:-1]).any():
                        raise ValueError("its entries are not sorted, or name no shard")
                    yield entries
        except StorageError:
            raise
        except FileNotFoundError:
            self._check_absent(kind, name)  # it may be one without entries
        except (RefusedFile, ValueError, pa.ArrowException) as error:
            raise damaged(self.store.layer_path(layer, name), error) from error


_SCHEMA = schemas.IDENTITIES_SCHEMA
_NAMES, _TYPES = _SCHEMA.names, _SCHEMA.types
_NOTHING = Entries(np.empty(0, np.uint64), np.empty(0, np.int32), np.empty(0, np.int32))


class _Stated(BaseModel):
    """What is read of index.json."""

    model_config = ConfigDict(strict=True)

    fingerprint: Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
    samples: str
    bits: Annotated[int, Field(ge=0, le=MAX_BITS)]
    kinds: dict[_Kind, int]
    repeated: dict[_Kind, int]


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

    def parse(content: bytes) -> pa.Table:
        file = LayerFile(pa.BufferReader(content), len(content))
        return file.read(schemas.INDEX_SCHEMA.names).cast(schemas.INDEX_SCHEMA)

    parts = (FOLDER, stated.fingerprint, f"{SHARDS}.parquet")
    try:
        table: pa.Table = store.read_parsed(parse, *parts, limit=_MAX_BYTES)
        if not all(SHARD_NAME.fullmatch(name) for name in table["shard"].to_pylist()) or table["groups"].null_count:
            raise ValueError("it names no shards")
    except FileNotFoundError as error:
        raise MissingLabels(f"{store.path(*parts)} is missing. {_FIX}") from error
    except (RefusedFile, ValueError, pa.ArrowException) as error:
        raise damaged(store.path(*parts), error) from error
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
