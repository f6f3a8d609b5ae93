"""A reinforced dataset on disk or in an object store: paths, listings, and the one way files get there.

Nothing but a committed Parquet file says that work is done. A file is finished elsewhere first and then appears
whole: on a local disk by ``os.replace`` of a synced temporary file of the same file system, in an object store by
one put of the finished file.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import posixpath
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

import schemas
from reinforce.errors import StorageError, UserError
from reinforce.layers import Layer
from reinforce.urls import filesystem
from schemas import Reason
from teachers.redact import told

MANIFEST = "dataset.json"
_TEMP = ".tmp"
_HALF = "reinforce-"  # begins the names of what is being made
_INCOMPRESSIBLE = ("image", "embeddings")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of the disk, of a quota, of what one file may have


def fingerprint_error(path: str, found: str | None, wanted: str) -> UserError:
    """A file or layer was made by another recipe than the config's."""
    return UserError(
        f"{path} has fingerprint {found}, this config makes {wanted}: they differ in something that changes the "
        "content (seed, augmentations, limits, model, weights, precision, dtype). Write to another `output`, give "
        "the changed model another name, or delete the old layer's folder and its entry in dataset.json."
    )


class Store:
    """The files of one dataset at ``url`` (a folder or any fsspec URL)."""

    def __init__(self, url: str) -> None:
        self.url = told(url.rstrip("/"))  # as it may be told
        self.fs, root = filesystem(url.rstrip("/"))
        self.root = root.rstrip("/")
        self.local = isinstance(self.fs, LocalFileSystem)

    # -- paths and listings

    def path(self, *parts: str) -> str:
        return posixpath.join(self.root, *parts)

    def layer_path(self, layer: str, shard: str) -> str:
        return self.path(layer, f"{shard}.parquet")

    def quarantine_path(self, layer: str, shard: str) -> str:
        return self.path("quarantine", layer, f"{shard}.parquet")

    def shards(self, layer: str) -> dict[str, int]:
        """Committed shards of a layer (or of ``quarantine/<layer>``) and their bytes, by one listing."""
        try:
            with self._asked("listed", layer):
                entries = self.fs.ls(self.path(layer), detail=True, refresh=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        names = ((posixpath.basename(str(e["name"]).rstrip("/")), e) for e in entries if e["type"] == "file")
        return {
            name.removesuffix(".parquet"): int(entry["size"] or 0)
            for name, entry in names
            if name.endswith(".parquet") and not name.startswith(".")
        }

    # -- small files

    def read_json(self, *parts: str) -> dict[str, Any] | None:
        """A JSON object, or None where the file does not exist."""
        path = self.path(*parts)
        try:
            with self._asked("read", *parts):
                content = self.fs.cat_file(path)
            data = json.loads(content)
        except FileNotFoundError:
            return None
        except (ValueError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not JSON ({error}). Restore it from a backup or from another copy.") from error
        if not isinstance(data, dict):
            raise UserError(f"{path} does not hold a JSON object.")
        return data

    def write_bytes(self, data: bytes, *parts: str) -> None:
        """Publish a small file atomically."""
        with self._asked("written", *parts), self._staging() as (file, local_path):
            file.write(data)
            file.flush()
            self._publish(file, local_path, self.path(*parts))

    @contextlib.contextmanager
    def new_file(self, *parts: str) -> Iterator[str]:
        """A local path for a file of any size, which is published when the block ends and dropped if it raises.

        Whoever writes may put a file of its own at the path, and others beside it.
        """
        with tempfile.TemporaryDirectory(prefix=_HALF, dir=self._temporary()) as folder:
            local_path = os.path.join(folder, parts[-1])
            with open(local_path, "xb") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)  # which files here have
            yield local_path
            os.chmod(local_path, mode)
            with self._asked("written", *parts), open(local_path, "rb") as file:
                self._publish(file, local_path, self.path(*parts))

    def put_folder(self, folder: str, *parts: str) -> None:
        """Publish the files of a local folder, each whole."""
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                target = (*parts, *path.relative_to(folder).parts)
                if self.local:
                    with self.new_file(*target) as local_path:
                        shutil.copyfile(path, local_path)
                else:
                    self.fs.put_file(str(path), self.path(*target))

    def write_json(self, data: Mapping[str, Any], *parts: str) -> None:
        self.write_bytes((json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode(), *parts)

    def check_writable(self) -> None:
        """Raise UserError if nothing can be written here."""
        probe = (_TEMP, f"write-test-{uuid.uuid4().hex}")
        try:
            self.write_bytes(b"", *probe)
            self.fs.rm_file(self.path(*probe))
        except Exception as error:
            told_by = error.__cause__ or error
            raise UserError(
                f"output {self.url} cannot be written: {type(told_by).__name__}: {told_by}. "
                "Check the path, the permissions and (for an object store) the address and the credentials."
            ) from error

    @contextlib.contextmanager
    def _asked(self, what: str, *parts: str) -> Iterator[None]:
        """Turn what a storage raises into one clear error, but for a file or folder that is not there."""
        try:
            yield
        except (UserError, ValueError, TypeError, LookupError):  # no storage's
            raise
        except Exception as error:  # each driver has its own exceptions
            if what != "written" and isinstance(error, (FileNotFoundError, NotADirectoryError)):
                raise
            full = isinstance(error, OSError) and error.errno in _FULL
            place = self.url if self.local else f"{tempfile.gettempdir()} of the machine that writes it"
            mend = f"make room in {place}" if full else "check the storage, the network and the permissions"
            # A full disk is so for all shards, if it is the dataset's own.
            raise (UserError if full and self.local else StorageError)(
                f"{self.path(*parts)} cannot be {what}: {type(error).__name__}: {error}; {mend}."
            ) from error

    # -- Parquet

    def writer(self, layer: Layer, schema: pa.Schema, shard: str, source: str) -> LayerWriter:
        return LayerWriter(self, layer, schema, shard, source)

    def quarantine(self, layer: str, shard: str, rows: list[tuple[str | None, Reason, str]]) -> None:
        """Publish why samples (or, with key None, the shard) are not in a layer."""
        keys, reasons, details = zip(*[(k, r.value, d[:2000]) for k, r, d in rows], strict=True)
        table = pa.table([keys, reasons, details], schema=schemas.quarantine_schema())
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer, compression="zstd")
        self.write_bytes(buffer.getvalue().to_pybytes(), "quarantine", layer, f"{shard}.parquet")

    def quarantined(self, layer: str, shard: str) -> list[dict[str, str | None]]:
        """Rows of a quarantine file: key, reason, detail."""
        with self._asked("read", "quarantine", layer, f"{shard}.parquet"):
            content = self.fs.cat_file(self.quarantine_path(layer, shard))
        rows: list[dict[str, str | None]] = pq.read_table(pa.BufferReader(content)).to_pylist()
        return rows

    def forget_quarantine(self, layer: str, shard: str) -> None:
        """Remove a quarantine file."""
        with self._asked("removed", "quarantine", layer, f"{shard}.parquet"):
            self.fs.rm_file(self.quarantine_path(layer, shard))

    @contextlib.contextmanager
    def open_layer(
        self, layer: str, shard: str, fingerprint: str | None = None, *, whole: bool = True
    ) -> Iterator[pq.ParquetFile]:
        """Open a committed file, to be read as a ``whole`` or for single row groups, which then cost one request each.

        Raises UserError if it is not the one expected.
        """
        path = self.layer_path(layer, shard)
        options: dict[str, Any] = {"block_size": 8 * 2**20} if whole else {"cache_type": "none"}
        with contextlib.ExitStack() as stack:
            source = path if self.local else stack.enter_context(self.fs.open(path, "rb", **options))
            file = stack.enter_context(pq.ParquetFile(source, memory_map=self.local, pre_buffer=not whole))
            check_footer(path, file.metadata, fingerprint)
            yield file

    # -- how files appear

    @contextlib.contextmanager
    def _staging(self) -> Iterator[tuple[IO[bytes], str]]:
        """A local temporary file and its path; gone at the end unless it was published.

        On the way to an object store it has no name, so that a process that is killed leaves nothing behind. For a
        local dataset it lies in the dataset, where the next run sweeps it.
        """
        file: IO[bytes]
        if self.local:
            path = os.path.join(self._temporary(), f"{_HALF}{uuid.uuid4().hex}")
            file = open(path, "xb")  # noqa: SIM115 - what cannot be closed is not published either
        else:
            file = tempfile.TemporaryFile()  # noqa: SIM115 - as above
            path = f"/dev/fd/{file.fileno()}"
        try:
            yield file, path
        finally:
            with contextlib.suppress(OSError):
                file.close()
            if self.local:
                Path(path).unlink(missing_ok=True)

    def _temporary(self) -> str:
        """Where files are made: for a local dataset, in its own file system."""
        folder = os.path.join(self.root, _TEMP) if self.local else tempfile.gettempdir()
        os.makedirs(folder, exist_ok=True)
        return folder

    def _publish(self, file: IO[bytes], local_path: str, path: str) -> None:
        if not self.local:
            file.seek(0)  # where opening /dev/fd gives the same file again, as on macOS, and not a new one
            self.fs.put_file(local_path, path)
            return
        os.fsync(file.fileno())
        folder = os.path.dirname(path)
        os.makedirs(folder, exist_ok=True)
        os.replace(local_path, path)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep a second run from a local dataset, and sweep what a killed run left half written.

        Object stores need no lock: there are no temporary files, and two runs of one config put equal objects.
        """
        if not self.local:
            yield
            return
        import fcntl

        folder = Path(self.root, _TEMP)
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UserError(f"another run is writing to {self.url}. Wait for it, or stop it.") from error
            for stale in folder.glob(f"{_HALF}*"):
                if stale.is_dir():
                    shutil.rmtree(stale, ignore_errors=True)
                else:
                    stale.unlink(missing_ok=True)
            yield


class LayerWriter:
    """Writes one layer of one shard, a row group at a time, and publishes it with ``commit``.

    As a context manager it drops everything that was not committed.
    """

    def __init__(self, store: Store, layer: Layer, schema: pa.Schema, shard: str, source: str) -> None:
        self._store = store
        self._parts = (layer.name, f"{shard}.parquet")
        self._stack = contextlib.ExitStack()
        self._file, self._local_path = self._stack.enter_context(store._staging())
        self._parquet = pq.ParquetWriter(
            self._file,
            schema.with_metadata(
                {
                    "reinforce.schema_version": str(schemas.SCHEMA_VERSION),
                    "reinforce.layer": layer.name,
                    "reinforce.fingerprint": layer.fingerprint,
                    "reinforce.source": source,
                }
            ),
            **_encodings(schema),
            write_statistics=["key"],
        )
        self.schema = schema
        self.rows = 0
        self.bytes = 0

    def write(self, table: pa.Table) -> None:
        """Write one row group."""
        with self._store._asked("written", *self._parts):
            self._parquet.write_table(table, row_group_size=max(1, table.num_rows))
        self.rows += table.num_rows

    def commit(self) -> None:
        with self._store._asked("written", *self._parts):
            self._parquet.add_key_value_metadata({"reinforce.rows": str(self.rows)})
            self._parquet.close()
            self._file.flush()
            self.bytes = self._file.tell()
            self._store._publish(self._file, self._local_path, self._store.path(*self._parts))

    def __enter__(self) -> LayerWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            if self._parquet.is_open:
                with contextlib.suppress(OSError):  # what is not committed need not be whole
                    self._parquet.close()


def _encodings(schema: pa.Schema) -> dict[str, Any]:
    """Compression and encoding of every column, as arguments of ParquetWriter.

    It knows a nested column by the whole path of its values, ``augmentations.list.element.crop.top``, and ignores
    shorter names. Parquet keeps int8 as 32-bit integers; by dictionary each is the one byte it was.
    """
    empty = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), empty)
    columns = pq.ParquetFile(empty.getvalue()).schema
    paths = {columns.column(i).path: columns.column(i).path.split(".")[0] for i in range(len(columns))}
    tensors = [f.name for f in schema if isinstance(f.type, pa.FixedShapeTensorType) and f.type.value_type == pa.int8()]
    few_values = ("augmentations", "image_ref", *tensors)
    return {
        "compression": {path: "none" if name in _INCOMPRESSIBLE else "zstd" for path, name in paths.items()},
        "use_dictionary": [path for path, name in paths.items() if name in few_values],
    }


def check_footer(path: str, metadata: pq.FileMetaData, fingerprint: str | None) -> None:
    """Raise UserError if a file is from a newer program or, where one is given, of another fingerprint."""
    footer = footer_of(metadata)
    if int(footer.get("schema_version", 0)) > schemas.SCHEMA_VERSION:
        raise UserError(f"{path} was written by a newer version of this program. Upgrade to read it.")
    if fingerprint is not None and footer.get("fingerprint") != fingerprint:
        raise fingerprint_error(path, footer.get("fingerprint"), fingerprint)


def footer_of(metadata: pq.FileMetaData) -> dict[str, str]:
    """schema_version, layer, fingerprint, source and rows, as written in the footer."""
    pairs = metadata.metadata or {}
    prefix = b"reinforce."
    return {k.removeprefix(prefix).decode(): v.decode() for k, v in pairs.items() if k.startswith(prefix)}
