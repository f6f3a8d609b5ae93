"""The index of a layer, ``index/<layer>.parquet``: size and rows of each file when it was committed.

Runs write it and readers use it: a listing with other sizes shows damaged files, and row counts need no footers. It is
a cache. A file that the index lacks, or has with another size, is described by its footer; only a committed file counts
as finished work. A damaged index, and one of another layer or fingerprint, counts as empty.
"""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

import schemas
from reinforce.dataset.files.layer_file import MAX_ROWS, LayerFile
from reinforce.dataset.files.listing import SHARD_NAME, Listing
from reinforce.dataset.files.store import Store, parse_footer
from reinforce.dataset.layers import SAMPLES, Layer
from reinforce.errors import StorageError, UserError

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
    """The index of one layer; ``table`` has the schema ``schemas.index_schema``."""

    table: pa.Table = field(default_factory=schemas.index_schema().empty_table)

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
        new = pa.table(columns, schema=schemas.index_schema())
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
        table = file.read(schemas.index_schema().names).cast(schemas.index_schema())
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
