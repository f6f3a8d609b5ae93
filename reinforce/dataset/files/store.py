"""The layer files of a reinforced dataset: paths, listings, reading and writing.

Only a committed Parquet file marks a shard of a layer as done.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

import schemas
from reinforce.dataset.files.layer_file import LayerFile, RefusedFile, naming_refused
from reinforce.dataset.files.listing import Listing, list_folders
from reinforce.dataset.layers import Layer
from reinforce.errors import StorageError, UserError
from reinforce.parquet.footers import ArrowInput
from reinforce.processes.prefetch import prefetch
from reinforce.source import file_types as formats
from reinforce.source.whole_reads import open_whole, read_range
from reinforce.storage import Storage
from reinforce.terminal import escape
from schemas import WHOLE_SHARD, Reason

MANIFEST = formats.MANIFEST
QUARANTINE = "quarantine/"  # before the layer, in the paths of quarantine files
_QUARANTINE_BYTES = 256 * 2**20
_QUARANTINE_ROWS = 2**20  # a quarantine file has one row group
_READ_AT_ONCE = 32  # quarantine files
_READ_AHEAD_BYTES = 2**20  # of a quarantine file that is read while others are

_BYTES = (pa.int8(), pa.uint8())


class DamagedQuarantine(UserError):
    """A quarantine file is damaged; ``args`` are the message and the reason."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True, order=True)
class DamagedFile:
    """A layer file that cannot be read, and why. The layer of a quarantine file begins with ``quarantine/``."""

    layer: str
    shard: str
    reason: str

    def line(self) -> str:
        return f"{self.layer}/{self.shard}.parquet: {self.reason}"


class Store(Storage):
    """The files of one dataset at ``url`` (a folder or any fsspec URI)."""

    def layer_path(self, layer: str, shard: str) -> str:
        """Path of a layer's file in the file system."""
        return self.path(layer, f"{shard}.parquet")

    def is_missing(self, layer: str, shard: str) -> bool:
        """Whether a layer file is missing, checked by name instead of a listing."""
        with self.storage_errors("read", layer, f"{shard}.parquet"):
            self.fs.invalidate_cache()
            return not self.fs.exists(self.layer_path(layer, shard))

    def quarantine_path(self, layer: str, shard: str) -> str:
        """Path of a quarantine file in the file system."""
        return self.path("quarantine", layer, f"{shard}.parquet")

    def shards(self, layer: str) -> Listing:
        """List the committed shards of a layer (or of ``quarantine/<layer>``) with the bytes of their files."""
        return self.listings([layer])[layer]

    def listings(self, layers: Iterable[str], known: Listing | None = None) -> dict[str, Listing]:
        """``shards`` of some layers, which are listed side by side, and faster where most of them are ``known``."""
        return list_folders(self, layers, known)

    def writer(self, layer: Layer, schema: pa.Schema, shard: str, source: str) -> LayerWriter:
        """Start a layer's file of a shard; ``source`` is the URL of the shard."""
        return LayerWriter(self, layer, schema, shard, source)

    def quarantine(self, layer: str, shard: str, rows: list[tuple[str | None, Reason, str]]) -> None:
        """Write the quarantine file of a shard. Rows are (key, reason, detail); key None is the shard as a whole."""
        keys, reasons, details = zip(*[(k, r.value, d[:2000]) for k, r, d in rows], strict=True)
        table = pa.table([keys, reasons, details], schema=schemas.quarantine_schema())
        self.write_table(table, "quarantine", layer, f"{shard}.parquet")

    def write_table(self, table: pa.Table, *parts: str, **options: Any) -> bytes:
        """Publish a small Parquet file -> its bytes; ``options`` are those of ``pyarrow.parquet.write_table``."""
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer, **{"compression": "zstd", "write_page_checksum": True, **options})
        content: bytes = buffer.getvalue().to_pybytes()
        self.write_bytes(content, *parts)
        return content

    def quarantined(self, layer: str, shard: str) -> list[dict[str, str | None]]:
        """Read the rows of a quarantine file: key, reason, detail. Raises DamagedQuarantine."""

        def parse(content: bytes) -> list[dict[str, str | None]]:
            file = LayerFile(pa.BufferReader(content), len(content), max_rows=_QUARANTINE_ROWS)
            rows: list[dict[str, str | None]] = file.read(schemas.quarantine_schema().names).to_pylist()
            return rows

        try:
            return self.read_parsed(parse, "quarantine", layer, f"{shard}.parquet", limit=_QUARANTINE_BYTES)
        except (StorageError, FileNotFoundError):
            raise
        except Exception as error:  # Arrow raises several for damage
            reason = f"{type(error).__name__}: {escape(str(error)[:500])}"
            fix = shlex.join(["reinforce", "validate", self.url, "--repair"])
            raise DamagedQuarantine(
                f"{self.quarantine_path(layer, shard)} is damaged ({reason}). `{fix}` sets it aside.", reason
            ) from error

    def quarantined_rows(
        self, layer: str, files: Listing, damaged: list[DamagedFile] | None = None
    ) -> Iterator[tuple[str, list[dict[str, str | None]]]]:
        """``quarantined`` of some listed quarantine files, of which small ones are read many at a time.

        ``damaged`` receives those that are damaged, which then have no rows. Nor have those that a run has removed
        since they were listed.
        """
        large = {shard for shard, size in files.items() if size > _READ_AHEAD_BYTES}

        def read_any(shard: str) -> list[dict[str, str | None]]:
            try:
                return self.quarantined(layer, shard)
            except FileNotFoundError:
                return []
            except DamagedQuarantine as error:
                if damaged is None:
                    raise
                damaged.append(DamagedFile(f"{QUARANTINE}{layer}", shard, error.args[1]))
                return []

        def read(shard: str) -> list[dict[str, str | None]] | None:
            return None if shard in large else read_any(shard)

        with ThreadPoolExecutor(_READ_AT_ONCE) as pool:
            for shard, rows in zip(files, prefetch(pool, read, files, 2 * _READ_AT_ONCE), strict=True):
                yield shard, read_any(shard) if rows is None else rows

    def lone_quarantine(
        self,
        committed: Mapping[str, Listing],
        damaged: list[DamagedFile] | None = None,
        files: Mapping[str, Listing] | None = None,
    ) -> dict[str, dict[str, bool]]:
        """Shards with a quarantine file and no file of the layer, by layer, and whether they are refused as a whole.

        ``committed`` are the shards that have a file, by layer. A quarantine file is written before the layer's file,
        so a run that was killed between the two also leaves a quarantine file alone. Only the rows distinguish these
        cases. ``damaged`` is as for ``quarantined_rows``, and ``files`` are the listings of the quarantine, if known.
        """
        files = self.listings(f"quarantine/{layer}" for layer in committed) if files is None else files
        found = {}
        for layer, listing in committed.items():
            alone = files[f"quarantine/{layer}"].without(listing.names)
            found[layer] = {
                shard: any(row["key"] is None and row["reason"] in WHOLE_SHARD for row in rows)
                for shard, rows in self.quarantined_rows(layer, alone, damaged)
            }
        return found

    def quarantined_shards(
        self, committed: Mapping[str, Listing], damaged: list[DamagedFile] | None = None
    ) -> dict[str, set[str]]:
        """Shards that are quarantined as a whole, by layer, as ``lone_quarantine`` finds them."""
        found = self.lone_quarantine(committed, damaged)
        return {layer: {shard for shard, whole in shards.items() if whole} for layer, shards in found.items()}

    def forget_quarantine(self, layer: str, shard: str) -> None:
        """Remove a quarantine file, if there is one."""
        self.remove("quarantine", layer, f"{shard}.parquet")

    def layer_end(self, layer: str, shard: str, size: int) -> LayerFile:
        """Read the end of a committed file whose ``size`` was listed, for row groups at one request each.

        Raises RefusedFile, also if the file has another size by now, and what the storage raises.
        """
        source = RangeFile(None if self.local else self.fs, self.layer_path(layer, shard), size)
        return LayerFile(source, size, file=(layer, shard), dataset=self._url)

    @contextlib.contextmanager
    def open_layer(
        self, layer: str, shard: str, fingerprint: str | None = None, *, whole: bool = True, size: int | None = None
    ) -> Iterator[LayerFile]:
        """Open a committed file to read it as a ``whole``, or single row groups at one request each.

        With its ``size`` as listed, an object store is asked once for the end of the file, and for no more if that is
        all of it. Raises UserError if it is from a newer version or does not have the ``fingerprint``, and RefusedFile
        if it is damaged or above the bounds of ``layer_file``, also while it is read.
        """
        path = self.layer_path(layer, shard)
        options: dict[str, Any] = {"block_size": 8 * 2**20} if whole else {"cache_type": "none"}
        with contextlib.ExitStack() as stack:
            with naming_refused((layer, shard)):
                file = None
                if size is not None and not self.local:
                    with contextlib.suppress(RefusedFile, OSError):  # it may have been replaced since it was listed
                        file = self.layer_end(layer, shard, size)
                if file is None:
                    opened = _memory_map(path) if self.local else open_whole(self.fs, path, **options)
                    source = stack.enter_context(opened)
                    size = source.size() if self.local else source.size
                    file = LayerFile(source, size, file=(layer, shard), dataset=self._url)
                check_footer(path, file.metadata, fingerprint)
            yield file


class RangeFile(ArrowInput):
    """A file of ``size`` bytes at a path of an fsspec file system, or of the local disk if ``fs`` is None.

    It is read by one request for each range, and never open in between.
    """

    def __init__(self, fs: Any, path: str, size: int) -> None:
        self._fs, self._path, self._size = fs, path, size

    def read(self, length: int) -> bytes:
        start, self._position = self._position, self._position + length
        if self._fs is not None:
            return read_range(self._fs, self._path, start, start + length)
        descriptor = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe would block
        try:
            return os.pread(descriptor, length, start)
        finally:
            os.close(descriptor)


class LayerWriter(contextlib.ExitStack):
    """Writes one layer of one shard, a row group at a time, and publishes the file with ``commit``.

    A context manager: leaving it without a commit discards the file.
    """

    def __init__(self, store: Store, layer: Layer, schema: pa.Schema, shard: str, source: str) -> None:
        self._store = store
        self._parts = (layer.name, f"{shard}.parquet")
        super().__init__()
        self._file, self._local_path = self.enter_context(store.staging())
        self._parquet = pq.ParquetWriter(
            self._file,
            schema.with_metadata(
                {
                    "reinforce.schema_version": str(schemas.SCHEMA_VERSION),
                    "reinforce.layer": layer.name,
                    "reinforce.fingerprint": layer.fingerprint,
                    "reinforce.source": source,
                    **({} if layer.codebook is None else {"reinforce.codebook": layer.codebook["digest"]}),
                }
            ),
            **_encodings(schema, layer.kind.stored_plain),
            write_statistics=["key"],
            write_page_checksum=True,
        )
        self.schema = schema
        self.groups: list[int] = []  # rows of each row group
        self.bytes = 0
        self.callback(self._discard)

    def write(self, table: pa.Table) -> None:
        """Write one row group."""
        with self._store.storage_errors("written", *self._parts):
            self._parquet.write_table(table, row_group_size=max(1, table.num_rows))
        self.groups.append(table.num_rows)

    def commit(self, footer: Mapping[str, str] | None = None) -> None:
        """Finish the file and publish it; ``footer`` are further entries for its footer."""
        with self._store.storage_errors("written", *self._parts):
            entries = {"rows": str(sum(self.groups)), **(footer or {})}
            self._parquet.add_key_value_metadata({f"reinforce.{key}": value for key, value in entries.items()})
            self._parquet.close()
            self._file.flush()
            self.bytes = self._file.tell()
            self._store.publish(self._file, self._local_path, self._store.path(*self._parts))

    def _discard(self) -> None:
        if self._parquet.is_open:
            with contextlib.suppress(OSError):
                self._parquet.close()


def _memory_map(path: str) -> Any:
    """Map a local file into memory. Raises RefusedFile if it is a folder, pipe or device, or empty."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode) or not found.st_size:  # opening a pipe would block
        raise RefusedFile("it is empty, or not a regular file")
    return pa.memory_map(path)


def _encodings(schema: pa.Schema, plain: Collection[str]) -> dict[str, Any]:
    """Arguments of ParquetWriter for the compression and encoding of every column; ``plain`` are not compressed.

    ParquetWriter identifies a nested column by the full path of its values, ``augmentations.list.element.crop.top``,
    and ignores shorter names. Parquet stores integers of 8 bits in 32; a dictionary brings each back to one byte.
    """
    empty = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), empty)
    columns = pq.ParquetFile(empty.getvalue()).schema
    paths = {columns.column(i).path: columns.column(i).path.split(".")[0] for i in range(len(columns))}
    tensors = [f.name for f in schema if isinstance(f.type, pa.FixedShapeTensorType) and f.type.value_type in _BYTES]
    dictionary = ("augmentations", "image_ref", *tensors)
    return {
        "compression": {path: "none" if name in plain else "zstd" for path, name in paths.items()},
        "use_dictionary": [path for path, name in paths.items() if name in dictionary],
    }


def check_footer(path: str, metadata: pq.FileMetaData, fingerprint: str | None) -> None:
    """Raise UserError if a file is from a newer version or has another fingerprint than a given one."""
    footer = parse_footer(metadata)
    version = footer.get("schema_version", "0")
    if not re.fullmatch(r"\d{1,9}", version):
        raise RefusedFile(f"its footer has schema version {escape(version[:20])}")
    if int(version) > schemas.SCHEMA_VERSION:
        raise UserError(f"{path} was written by a newer version of this program. Upgrade to read it.")
    if fingerprint is not None and footer.get("fingerprint") != fingerprint:
        raise UserError(
            f"{path} has fingerprint {escape(footer.get('fingerprint', 'none')[:40])}, its layer has {fingerprint}: "
            "it was made by another recipe. Delete it, or all of its layer with `reinforce drop`, and compute it again "
            "by `reinforce run`."
        )


def parse_footer(metadata: pq.FileMetaData) -> dict[str, str]:
    """Parse the footer's keys: schema_version, layer, fingerprint, source and rows; source_* only in new samples."""
    pairs = metadata.metadata or {}
    prefix = b"reinforce."
    return {
        k.removeprefix(prefix).decode(errors="replace"): v.decode(errors="replace")
        for k, v in pairs.items()
        if k.startswith(prefix)
    }
