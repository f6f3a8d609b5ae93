"""The index of a layer, ``index/<layer>.parquet``: size and rows of each file when it was committed.

Runs write it and readers use it: a listing with other sizes shows damaged files, and row counts need no footers. It is
a cache. A file that the index lacks, or has with another size, is described by its footer; only a committed file counts
as finished work. A damaged index, and one of another layer or fingerprint, counts as empty. Beside it: layer files that
are not what a run has committed, and digests of the content of layer files.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import shlex
import time
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

import schemas
from reinforce.dataset.kinds.registry import kind_of
from reinforce.dataset.layer_file import MAX_ROWS, LayerFile, RefusedFile
from reinforce.dataset.layers import SAMPLES, Layer
from reinforce.dataset.store import (
    QUARANTINE,
    SHARD_NAME,
    DamagedFile,
    Listing,
    Store,
    list_folders,
    other_origin,
    parse_footer,
)
from reinforce.errors import StorageError, UserError
from reinforce.terminal import first_lines

FOLDER = "index"
_MAX_BYTES = 2**28  # of an index that is read
_GROUP_ROWS = 4096


@dataclass(frozen=True)
class FileEntry:
    """A committed file: its bytes, and the rows of each of its row groups."""

    size: int
    groups: tuple[int, ...]


@dataclass(frozen=True)
class LayerIndex:
    """The index of one layer; ``table`` has the schema ``schemas.INDEX_SCHEMA``."""

    table: pa.Table = field(default_factory=schemas.INDEX_SCHEMA.empty_table)

    def listing(self) -> Listing:
        """The listing of the layer as it was when its files were committed."""
        return Listing(self.table["shard"].combine_chunks(), self.table["size"].to_numpy())

    def differing(self, listing: Listing) -> list[str]:
        """Shards of a listing whose file has another size than the one that was committed."""
        shards = self.table["shard"].combine_chunks()
        sizes = listing.sizes_of(shards)
        differs = (sizes >= 0) & (sizes != self.table["size"].to_numpy())
        names: list[str] = shards.filter(pa.array(differs)).to_pylist()
        return names

    def groups(self, listing: Mapping[str, int]) -> Iterator[tuple[str, npt.NDArray[np.int32]]]:
        """Each shard of a listing whose file has the committed size, with the rows of its row groups."""
        for batch in self.table.select(["shard", "size", "groups"]).to_batches(max_chunksize=_GROUP_ROWS):
            groups = batch["groups"]
            offsets, values = groups.offsets.to_numpy(), groups.values.to_numpy(zero_copy_only=False)
            shards, sizes, known = (column.to_pylist() for column in (batch["shard"], batch["size"], groups.is_valid()))
            for i, (shard, size, has_groups) in enumerate(zip(shards, sizes, known, strict=True)):
                rows = values[offsets[i] : offsets[i + 1]]
                if has_groups and listing.get(shard) == size and ((rows >= 0) & (rows <= MAX_ROWS)).all():
                    yield shard, rows.astype(np.int32)

    def merged(self, entries: Mapping[str, FileEntry], groups: bool) -> LayerIndex:
        """The index with further files; ``groups`` is whether the rows of row groups are kept."""
        columns = [
            pa.array(entries, pa.string()),
            pa.array([entry.size for entry in entries.values()], pa.int64()),
            pa.array([sum(entry.groups) for entry in entries.values()], pa.int64()),
            pa.array([entry.groups if groups else None for entry in entries.values()], pa.list_(pa.int32())),
        ]
        new = pa.table(columns, schema=schemas.INDEX_SCHEMA)
        kept = self.table.filter(pc.invert(pc.is_in(self.table["shard"], new["shard"].combine_chunks())))
        return LayerIndex(pa.concat_tables([kept, new]).sort_by("shard"))


def index_file(layer: str) -> str:
    """Name of a layer's index in the folder ``index``."""
    return f"{layer.replace('/', '--')}.parquet"


def read_index(store: Store, layer: str, fingerprint: str, to_write: bool = False) -> LayerIndex:
    """Read the index of a layer with this fingerprint; empty if there is none that can be used.

    Raises StorageError if it is read to be written again; other readers may have no right to read it.
    """

    def parse(content: bytes) -> LayerIndex:
        file = LayerFile(pa.BufferReader(content), len(content))
        footer = parse_footer(file.metadata)
        if (footer.get("layer"), footer.get("fingerprint")) != (layer, fingerprint):
            return LayerIndex()
        table = file.read(schemas.INDEX_SCHEMA.names).cast(schemas.INDEX_SCHEMA)
        named = pc.all(pc.match_substring_regex(table["shard"], f"^{SHARD_NAME.pattern}$"), min_count=0).as_py()
        return LayerIndex(table) if named else LayerIndex()

    try:
        return store.read_parsed(parse, FOLDER, index_file(layer), limit=_MAX_BYTES)
    except StorageError:
        if to_write:
            raise
        return LayerIndex()
    except (OSError, ValueError, UserError, pa.ArrowException):  # among them FileNotFoundError and RefusedFile
        return LayerIndex()


def write_index(store: Store, layer: str, fingerprint: str, index: LayerIndex) -> None:
    """Publish the index of a layer. Raises StorageError."""
    metadata = {"reinforce.layer": layer, "reinforce.fingerprint": fingerprint}
    options = {"row_group_size": _GROUP_ROWS, "use_dictionary": False, "write_statistics": False}
    store.write_table(index.table.replace_schema_metadata(metadata), FOLDER, index_file(layer), **options)


def prune_index(store: Store, layer: str, fingerprint: str, listing: Listing, pending: Collection[str]) -> list[str]:
    """Remove the files of shards that were deleted: neither in the ``listing`` of the layer nor ``pending`` in a run.

    Readers report files that the index has and the layer lacks. Returns the removed shards. Raises StorageError.
    """
    index = read_index(store, layer, fingerprint, to_write=True)
    shards = index.table["shard"].combine_chunks()
    kept = listing.has(shards) | pc.is_in(shards, value_set=pa.array(pending, pa.string())).to_numpy(False)
    if not kept.all():
        write_index(store, layer, fingerprint, LayerIndex(index.table.filter(pa.array(kept))))
    removed: list[str] = shards.filter(pa.array(~kept)).to_pylist()
    return removed


class PeriodicWriter(ABC):
    """Collects what a run has finished, and writes it: by ``flush`` now, or by ``flush_when_due`` every few minutes."""

    seconds = 300.0

    def __init__(self) -> None:
        self._flushed = time.monotonic()

    @abstractmethod
    def flush(self) -> None:
        """Write what is new. Raises StorageError."""

    def flush_when_due(self) -> None:
        """``flush`` if the last time is long ago. After a storage error, a later call writes the same."""
        if time.monotonic() - self._flushed > self.seconds:
            self._flushed = time.monotonic()
            with contextlib.suppress(StorageError):
                self.flush()


class IndexWriter(PeriodicWriter):
    """Collects the files that a run commits, and adds them to the indexes."""

    def __init__(self, store: Store, layers: Mapping[str, Layer]) -> None:
        super().__init__()
        self._store, self._layers = store, layers
        self._entries: dict[str, dict[str, FileEntry]] = {}

    def add(self, shard: str, files: Mapping[str, FileEntry]) -> None:
        for layer, entry in files.items():
            self._entries.setdefault(layer, {})[shard] = entry

    def flush(self) -> None:
        for layer in list(self._entries):
            fingerprint = self._layers[layer].fingerprint
            index = read_index(self._store, layer, fingerprint, to_write=True)
            write_index(self._store, layer, fingerprint, index.merged(self._entries[layer], layer == SAMPLES))
            del self._entries[layer]


SET_ASIDE = "set-aside"
MIN_BYTES = 12  # of a Parquet file
_THREADS = 16
_NAMED = 3


def find_damaged(
    store: Store,
    listings: Mapping[str, Listing],
    fingerprints: Mapping[str, str],
    indexes: Mapping[str, LayerIndex] | None = None,
) -> list[DamagedFile]:
    """Files of listings by layer (``Store.listings``) that are damaged, by their sizes and those in the indexes.

    So looking for damage costs one request for each layer. Only a file whose size differs is opened. If its footer can
    be read, and is of the source of the samples, it was replaced by a complete file, and counts. Indexes that are not
    given are read.
    """

    def suspects(layer: str) -> list[tuple[str, str]]:
        listing = listings[layer]
        names = {*listing.only(listing.sizes < MIN_BYTES)}
        if listing:
            index = read_index(store, layer, fingerprints[layer]) if indexes is None else indexes[layer]
            names.update(index.differing(listing))
        return [(layer, shard) for shard in sorted(names)]

    with ThreadPoolExecutor(_THREADS) as pool:
        found = [suspect for of_layer in pool.map(suspects, listings) for suspect in of_layer]
        reasons = pool.map(lambda one: footer_damage(store, *one), found)
        return [DamagedFile(*one, reason) for one, reason in zip(found, reasons, strict=True) if reason is not None]


def without_files(listings: Mapping[str, Listing], files: Sequence[DamagedFile]) -> dict[str, Listing]:
    names: dict[str, list[str]] = {}
    for file in files:
        names.setdefault(file.layer, []).append(file.shard)
    return {**listings, **{layer: listings[layer].without(shards) for layer, shards in names.items()}}


def footer_damage(store: Store, layer: str, shard: str) -> str | None:
    """Why a file cannot be one of its shard, by its footer; None if it can. Raises what the storage raises."""
    try:
        with store.open_layer(layer, shard, whole=False) as file:
            rows, footer = file.metadata.num_rows, parse_footer(file.metadata)
    except RefusedFile as error:
        return str(error)
    if (stored := footer.get("rows")) not in (None, str(rows)):
        return f"its footer states {stored[:20]} rows, its row groups {rows:,}"
    opened = store.open_layer(SAMPLES, shard, whole=False)
    with contextlib.suppress(RefusedFile, FileNotFoundError), opened as samples:  # damaged samples are found themselves
        return other_origin(parse_footer(samples.metadata), footer)
    return None


def check_columns(layer: str, table: pa.Table) -> None:
    """Raise RefusedFile if rows of a layer's file lack columns."""
    if missing := {*kind_of(layer).columns} - {*table.column_names}:
        raise RefusedFile(f"it has no column {', '.join(sorted(missing))}")


def file_damage(store: Store, layer: str, shard: str) -> str | None:
    """Why a file cannot be read, None if all of it can. Raises what the storage raises."""
    try:
        with store.open_layer(layer, shard) as file:
            for number in range(file.num_row_groups):
                check_columns(layer, file.read_row_group(number))
    except RefusedFile as error:
        return str(error)
    return None


def set_aside(store: Store, layer: str, shard: str) -> str:
    """Move a file to a name that no reader looks at, below ``set-aside``; returns the new path. Raises StorageError.

    It is no layer file any more: a run computes it again. The refused rows of its quarantine are forgotten: whoever
    computes the file again writes them again. The layer of a quarantine file is that of the rows after ``quarantine/``.
    """
    now = datetime.datetime.now(datetime.timezone.utc)
    target = store.path(SET_ASIDE, layer, f"{shard}.{now:%Y%m%dT%H%M%S.%fZ}.parquet")
    with store.storage_errors("moved", layer, f"{shard}.parquet"):
        if store.local:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.replace(store.layer_path(layer, shard), target)
        else:
            store.fs.mv(store.layer_path(layer, shard), target)
    if not layer.startswith(QUARANTINE):
        store.forget_quarantine(layer, shard)
    return target


def drop_shard_command(url: str, layers: Sequence[str], shard: str) -> str:
    """The command that shows the files of a shard in some layers, and with ``--yes`` sets them aside."""
    return shlex.join(["reinforce", "drop", url, *layers, "--shard", shard])


def compute_again(url: str, layer: str, shard: str) -> str:
    """The sentence with the command that computes a layer's file of a shard again."""
    return f"To compute it again: {drop_shard_command(url, [layer], shard)} --yes, and run again."


def describe_damaged(url: str, files: Sequence[DamagedFile]) -> str:
    """The damaged files and what to do, as a line without its full stop; empty if there are none."""
    if not files:
        return ""
    what, them = ("1 file is damaged", "it") if len(files) == 1 else (f"{len(files):,} files are damaged", "them")
    layer, shard = files[0].layer, files[0].shard
    named = "; ".join(first_lines([file.line() for file in files], _NAMED))
    if layer.startswith(QUARANTINE):
        command = shlex.join(["reinforce", "validate", url, "--repair"])
    else:
        command = f"{drop_shard_command(url, [layer], shard)} --yes"
    return (
        f"{what} ({named}). `reinforce run` with the dataset's config sets {them} "
        f"aside and computes {them} again; to set one aside before: {command}"
    )


def set_aside_notes(files: Sequence[str]) -> list[str]:
    """A line of a run's summary about the files that it has set aside, each given with its reason."""
    if not files:
        return []
    what = "1 file was" if len(files) == 1 else f"{len(files):,} files were"
    named = "; ".join(first_lines(files, _NAMED))
    return [f"{what} damaged or did not fit, moved to {SET_ASIDE}/ to be computed again: {named}"]


#: The columns of each layer whose content is compared; None for all.
Columns: TypeAlias = "Mapping[str, Sequence[str] | None]"
Errors: TypeAlias = "Callable[[str], AbstractContextManager[None]]"
Hashes = npt.NDArray[np.uint64]


def states_of(store: Store, layers: Iterable[str], shards: Sequence[str]) -> array[int]:
    """The state of the files of some layers together [shards]; 0 where one is missing, or its time is unknown.

    A state is a hash of the size and the ETag, or modification time, of a file. Equal states mean equal content; a copy
    of a dataset has other states and the same content.
    """
    names = pa.array(shards, pa.string())
    listings = list_folders(store, sorted(layers), states=True)
    known = np.logical_and.reduce([listing.has(names) for listing in listings.values()])
    states = np.stack([listing.sizes_of(names) for listing in listings.values()], axis=1)
    known &= (states != 0).all(axis=1)
    hashes = (hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in states)
    numbers = (int.from_bytes(digest, "little", signed=True) for digest in hashes)
    return array("q", (number if one else 0 for number, one in zip(numbers, known.tolist(), strict=True)))


def content_of(store: Store, columns: Columns, shard: str, errors: Errors | None = None) -> int:
    """Digest of the content of some layers of a shard. Raises as ``Store.open_layer``, and StorageError.

    ``errors`` returns what turns the errors of a layer into others.
    """
    digest = hashlib.blake2b(digest_size=8)
    for layer in sorted(columns):
        named = errors(layer) if errors else store.storage_errors("read", layer, f"{shard}.parquet")
        with named, store.open_layer(layer, shard, whole=False) as file:
            digest.update(f"{layer}\0".encode() + file.content(columns[layer]))
    return int.from_bytes(digest.digest(), "little")


def find_content(store: Store, columns: Columns, shard: str) -> int | None:
    """``content_of`` a shard; None if one of its files is missing or damaged."""
    try:
        return content_of(store, columns, shard)
    except StorageError:
        raise
    except (FileNotFoundError, NotADirectoryError, RefusedFile, UserError):
        return None


def hash_keys(keys: pa.ChunkedArray | pa.Array) -> Hashes:
    """A 64-bit hash of each key, uint64 [keys].

    Keys that differ have different hashes with near certainty, unless somebody has chosen them. A null key has the hash
    of an empty one. It takes a fifth of the CPU of a call of hashlib for each. They are not stored, so they may change;
    those in the records of runs are ``runs.ShardKeys.of``.
    """
    from pandas.util import hash_array  # reading, which only digests keys, does not need pandas

    encoded = keys.cast(pa.binary()).fill_null(b"").to_numpy(zero_copy_only=False)
    return np.asarray(hash_array(encoded, categorize=False), np.uint64)


def digest_keys(keys: pa.ChunkedArray | pa.Array) -> bytes:
    """A digest of some keys in their order: equal only for equal keys."""
    array: Any = keys.combine_chunks() if isinstance(keys, pa.ChunkedArray) else keys
    array = array.cast(pa.large_string())
    _, buffer, data = array.buffers()
    values = np.empty(0, np.uint8) if data is None else np.frombuffer(data, np.uint8)
    offsets = np.zeros(len(array) + 1, np.int64)  # of the keys in their bytes
    if len(array) and buffer is not None:
        offsets = np.frombuffer(buffer, np.int64)[array.offset : array.offset + len(array) + 1]
    lengths = np.diff(offsets)
    if keys.null_count:
        lengths[np.asarray(keys.is_null())] = -1
    digest = hashlib.blake2b(lengths.astype("<i8").tobytes(), digest_size=16)
    digest.update(values[offsets[0] : offsets[-1]].tobytes())
    return digest.digest()
