"""The layer files of a dataset: paths, listings, reading and writing. Only a committed file marks a shard as done.

A large dataset has 190,735 files in each of eight layers. A listing takes some 30 bytes a file instead of the 1,250 of
fsspec's cache, which is emptied. Layers are listed side by side, because the pages of one follow each other.
"""

from __future__ import annotations

import bisect
import contextlib
import contextvars
import errno
import hashlib
import html
import itertools
import os
import posixpath
import re
import shlex
import stat
import threading
from collections.abc import ItemsView, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

import schemas
from reinforce.dataset.layer_file import LayerFile, RefusedFile, naming_refused
from reinforce.dataset.layers import Layer
from reinforce.errors import StorageError, UserError
from reinforce.processes.attempts import prefetch
from reinforce.source import file_types
from reinforce.source.parquet_file import ArrowInput
from reinforce.source.references import SourceState, listed_state
from reinforce.source.urls import Info, list_whole, open_whole, read_range
from reinforce.storage import Storage
from reinforce.terminal import escape
from schemas import WHOLE_SHARD, Reason

#: Names of files after the first one, up to the second one, if there is one.
_Range: TypeAlias = "tuple[str, str | None]"
#: Names of shards, as ``source.urls`` makes them.
SHARD_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
_ENDING = ".parquet"
_FILE_NAME = re.compile(rf"{SHARD_NAME.pattern}{re.escape(_ENDING)}")
_FILE_LINES = re.compile(rf"^({SHARD_NAME.pattern}){re.escape(_ENDING)}$", re.MULTILINE)
_LISTED_WHOLE = threading.BoundedSemaphore(2)
_AT_ONCE = 8  # layers of an object store that are listed at once
_CHUNK = 4096  # names that are Python objects at a time
_FAST = contextvars.ContextVar("_FAST", default=False)  # in requests whose answers are parsed here
_STATES = contextvars.ContextVar("_STATES", default=False)  # whether listings have states instead of sizes
_RANGES, _MIN_RANGE = 4, 10_000  # ranges of a folder, and known shards of one, at least
_WHOLE: _Range = ("", None)
_ENTRIES = "reinforce.entries"  # of an answer, where they are
_KEY, _SIZE = re.compile(rb"<Key>([^<]*)</Key>"), re.compile(rb"<Size>(\d+)</Size>")
_ETAG = re.compile(rb"<ETag>([^<]*)</ETag>")


class Listing(Mapping[str, int]):
    """Names of shards in ascending order, each with the bytes of its file.

    A mapping in compact form: looking up single names is slow, ``has`` looks up many.
    """

    def __init__(self, names: pa.StringArray, sizes: npt.NDArray[np.int64]) -> None:
        if not pc.all(pc.less_equal(names[:-1], names[1:])).as_py():
            order = pc.sort_indices(names)
            names, sizes = names.take(order), sizes[order.to_numpy()]
        self.names: pa.StringArray = names
        self.sizes: npt.NDArray[np.int64] = sizes

    @classmethod
    def of(cls, entries: Iterable[tuple[str, int]]) -> Listing:
        parts, sizes, found = [], [], iter(entries)
        while chunk := list(itertools.islice(found, _CHUNK)):
            parts.append(pa.array([name for name, _ in chunk], pa.string()))
            sizes.append(np.array([size for _, size in chunk], np.int64))
        names = pa.concat_arrays(parts) if parts else pa.array([], pa.string())
        return cls(names, np.concatenate(sizes) if sizes else np.empty(0, np.int64))

    @classmethod
    def joined(cls, parts: Sequence[Listing]) -> Listing:
        """The listing of the shards of all parts, which have none in common."""
        if len(parts) == 1:
            return parts[0]
        return cls(pa.concat_arrays([one.names for one in parts]), np.concatenate([one.sizes for one in parts]))

    @staticmethod
    def union(listings: Iterable[Listing]) -> pa.StringArray:
        """The names that are in any of some listings, in ascending order."""
        every = pc.unique(pa.chunked_array([listing.names for listing in listings], pa.string()))
        return every.take(pc.sort_indices(every))

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self.names), _CHUNK):
            yield from self.names[start : start + _CHUNK].to_pylist()

    def __getitem__(self, name: str) -> int:
        place = bisect.bisect_left(self.names, str(name), key=str)
        if place == len(self) or self.names[place].as_py() != name:
            raise KeyError(name)
        return int(self.sizes[place])

    def items(self) -> ItemsView[str, int]:
        return dict(zip(self, self.sizes.tolist(), strict=True)).items()

    @property
    def total_bytes(self) -> int:
        return int(self.sizes.sum())

    def has(self, names: pa.StringArray) -> npt.NDArray[np.bool_]:
        """Mask of the names that are listed [names]."""
        found: npt.NDArray[np.bool_] = pc.is_in(names, value_set=self.names).to_numpy(zero_copy_only=False)
        return found

    def within(self, names: pa.StringArray) -> npt.NDArray[np.bool_]:
        """Mask of the listed shards that are among some names [len(self)]."""
        found: npt.NDArray[np.bool_] = pc.is_in(self.names, value_set=names).to_numpy(zero_copy_only=False)
        return found

    def only(self, chosen: npt.NDArray[np.bool_]) -> Listing:
        """The shards that a mask [len(self)] chooses."""
        return Listing(self.names.filter(pa.array(chosen)), self.sizes[chosen])

    def without(self, names: Iterable[str]) -> Listing:
        """The shards that are not among some names."""
        return self.only(~self.within(names if isinstance(names, pa.StringArray) else pa.array(names, pa.string())))

    def sizes_of(self, names: Iterable[str]) -> npt.NDArray[np.int64]:
        """The bytes of the files of some shards, -1 for those that are not listed [names]."""
        array = names if isinstance(names, pa.StringArray) else pa.array(names, pa.string())
        places = pc.index_in(array, value_set=self.names)
        listed = places.is_valid().to_numpy(zero_copy_only=False)
        found = np.full(len(places), -1, np.int64)
        found[listed] = self.sizes[places.drop_null().to_numpy()]
        return found


def list_folders(
    storage: Storage, folders: Iterable[str], known: Listing | None = None, states: bool = False
) -> dict[str, Listing]:
    """List the Parquet files of some folders side by side. A folder that does not exist has none.

    ``known`` are shards that large folders probably have. A folder of S3 is then listed in several ranges at once,
    since the pages of one range follow each other; the result does not depend on them. With ``states``, the numbers
    are not bytes but hashes of the size and the ETag, or modification time, of each file: equal ones mean the same
    content, and 0 that the storage states no time.
    """
    folders, ranges = list(folders), [_WHOLE]
    if not storage.local and _is_s3(storage.fs):
        with storage.storage_errors("listed"):
            client = storage.fs.connect()  # before threads do
        with contextlib.suppress(AttributeError):  # without it, botocore parses the answers
            # Called before botocore's own handlers, which are registered for the more specific ``before-parse.s3.*``.
            events = client.meta.events
            events.register("before-parse.*.ListObjectsV2", _take_entries, unique_id="reinforce-listing")
    if known is not None and _is_s3(storage.fs):  # ranges of file names with about as many of the known shards each
        count = max(1, min(_RANGES, len(known) // _MIN_RANGE))
        bounds = sorted(known.names[len(known) * part // count].as_py() + _ENDING for part in range(1, count))
        ranges = list(zip(["", *bounds], [*bounds, None], strict=True))
    jobs = [(folder, part) for folder in folders for part in ranges]
    with ThreadPoolExecutor(_AT_ONCE * len(ranges)) as pool:
        found = list(pool.map(lambda job: _list(storage, job[0], job[1], states), jobs))
    return {
        folder: Listing.joined(found[number * len(ranges) : (number + 1) * len(ranges)])
        for number, folder in enumerate(folders)
    }


def _list(storage: Storage, folder: str, part: _Range, states: bool) -> Listing:
    _STATES.set(states)  # in a thread of this listing
    try:
        with storage.storage_errors("listed", folder):
            if _is_s3(storage.fs):
                return list_whole(lambda: _list_s3(storage.fs, storage.path(folder), part))
            return Listing.of(_entries(storage, storage.path(folder)))
    except (FileNotFoundError, NotADirectoryError):
        return Listing.of([])


def _number(info: Info) -> int:
    """The bytes of a file, or its state."""
    size = int(info["size"] or 0)
    if not _STATES.get():
        return size
    stamp = listed_state(info).stamp
    if stamp is None:
        return 0
    digest = hashlib.blake2b(f"{size} {stamp}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True) or 1


def _entries(storage: Storage, path: str) -> Iterator[tuple[str, int]]:
    """Shard and number of each Parquet file in a folder."""
    if storage.local:
        with os.scandir(path) as files:
            for file in files:
                if _FILE_NAME.fullmatch(file.name) and file.is_file():
                    try:
                        found = file.stat()
                    except FileNotFoundError:  # another process has removed it meanwhile
                        continue
                    yield file.name[: -len(_ENDING)], _number({"size": found.st_size, "mtime": found.st_mtime_ns})
        return
    with _LISTED_WHOLE:  # other drivers keep more than a kilobyte for each file
        try:
            listed = list_whole(lambda: storage.fs.ls(path, detail=True, refresh=True))
        finally:
            storage.fs.invalidate_cache(path)
    while listed:
        entry = listed.pop()
        name = posixpath.basename(str(entry["name"]).rstrip("/"))
        if entry["type"] == "file" and _FILE_NAME.fullmatch(name):
            yield name[: -len(_ENDING)], _number(entry)


def _is_s3(fs: Any) -> bool:
    protocol = [fs.protocol] if isinstance(fs.protocol, str) else fs.protocol
    return "s3" in protocol and hasattr(fs, "call_s3")


def _list_s3(fs: Any, path: str, part: _Range) -> Listing:
    """The Parquet files of a folder of S3 whose names are in a range."""
    after, last = part
    pages = []
    for listed, numbers in _s3_pages(fs, path, after):
        names, sizes = listed, numbers
        beyond = bool(names) and last is not None and names[-1] > last
        if beyond or (names and names[0] <= after):  # some stores ignore StartAfter
            inside = [after < name and (last is None or name <= last) for name in names]
            names, sizes = [*itertools.compress(names, inside)], [*itertools.compress(sizes, inside)]
        shards = _FILE_LINES.findall("\n".join(names))  # all at once, which takes a third of the CPU
        if len(shards) != len(names):
            chosen = [_FILE_NAME.fullmatch(name) is not None for name in names]
            shards = [name[: -len(_ENDING)] for name in itertools.compress(names, chosen)]
            sizes = [*itertools.compress(sizes, chosen)]
        pages.append(Listing(pa.array(shards, pa.string()), np.array(sizes, np.int64)))
        if beyond:
            break
    return Listing.joined(pages) if pages else Listing.of([])


def _s3_pages(fs: Any, path: str, after: str) -> Iterator[tuple[list[str], list[int]]]:
    """Names and numbers of the files of a folder, a page at a time.

    Pages are parsed by ``_take_entries``, because botocore takes 0.1 s of CPU for one of 1,000 names.
    """
    bucket, key, _ = fs.split_path(path)
    arguments = {"Bucket": bucket, "Prefix": f"{key}/", "Delimiter": "/"}
    if after:
        arguments["StartAfter"] = f"{key}/{after}"
    token = _FAST.set(True)
    try:
        while True:
            page = fs.call_s3("list_objects_v2", **arguments)
            if _ENTRIES in page:
                yield page[_ENTRIES]
            else:
                found = page.get("Contents", [])
                numbers = [_number({**entry, "size": entry["Size"]}) for entry in found]
                yield [posixpath.basename(entry["Key"]) for entry in found], numbers
            if not page.get("IsTruncated"):
                return
            before, following = arguments.get("ContinuationToken"), page.get("NextContinuationToken")
            if following in (None, before):
                raise OSError(errno.EIO, f"a page of the listing of {path} names no next page")
            arguments["ContinuationToken"] = following
    finally:
        _FAST.reset(token)


def _take_entries(response_dict: dict[str, Any], customized_response_dict: dict[str, Any], **_: Any) -> None:
    """Take the files out of the answer to a listing before botocore parses it.

    Names of shards have no characters that XML or URLs escape.
    """
    body = response_dict["body"]
    if not _FAST.get() or response_dict["status_code"] != 200:
        return
    keys, sizes = _KEY.findall(body), _SIZE.findall(body)
    rest = body.partition(b"<Contents>")[0] + body.rpartition(b"</Contents>")[2]
    if not len(keys) == len(sizes) == body.count(b"<Contents>") > 0 or b"<IsTruncated>" not in rest:
        return
    names = [key.rpartition(b"/")[2].decode(errors="replace") for key in keys]
    numbers = [*map(int, sizes)]
    if _STATES.get():
        if len(tags := _ETAG.findall(body)) != len(keys):
            return
        texts = [html.unescape(tag.decode(errors="replace")) for tag in tags]
        numbers = [_number({"size": size, "ETag": tag}) for size, tag in zip(numbers, texts, strict=True)]
    customized_response_dict[_ENTRIES] = names, numbers
    response_dict["body"] = rest


#: Footer entries with digests: of all referenced images; of the images and captions of samples that the state of the
#: source file does not cover, where images are files of their own or the shard is a part of a table. Files of earlier
#: versions do not have them.
IMAGES, LINKED = "images_digest", "linked_digest"
_SOURCE = "source"


def origin_entries(footer: Mapping[str, str]) -> dict[str, str]:
    """What the footer of samples records about their source, for the footers of other layers."""
    digests = {key: footer[key] for key in (IMAGES, LINKED) if key in footer}
    return SourceState.from_footer(footer).footer() | digests


def other_origin(samples: Mapping[str, str], footer: Mapping[str, str]) -> str | None:
    """Why a layer's file is of another source than the samples of its shard, by their footers; None if it is not.

    Keys do not show it. An old file that comes back after its source has changed can have the keys of the new samples,
    and so can the file of another shard, where the samples of each tar are numbered from 0. What one of the two does
    not record, as published labels do not record their source, is not compared.
    """
    source, of_samples = footer.get(_SOURCE), samples.get(_SOURCE)
    if source and of_samples and source != of_samples:
        return f"it is of the source shard {escape(source[:500])}"
    for key, what in ((IMAGES, "images"), (LINKED, "images or captions")):
        if key in samples and key in footer and samples[key] != footer[key]:
            return f"it is of other {what}"
    now, before = SourceState.from_footer(samples), SourceState.from_footer(footer)
    if before.same_content(now) is False:
        return f"it is of another source file: {before.describe_change(now)}"
    return None


MANIFEST = file_types.MANIFEST
#: Folder with the files and rows of shards of folders and tables.
LISTS = "lists"
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

    def shards(self, layer: str) -> Listing:
        """List the committed shards of a layer (or of ``quarantine/<layer>``) with the bytes of their files."""
        return self.listings([layer])[layer]

    def listings(self, layers: Iterable[str], known: Listing | None = None) -> dict[str, Listing]:
        """``shards`` of some layers, which are listed side by side, and faster where most of them are ``known``."""
        return list_folders(self, layers, known)

    def quarantine(self, layer: str, shard: str, rows: list[tuple[str | None, Reason, str]]) -> None:
        """Write the quarantine file of a shard. Rows are (key, reason, detail); key None is the shard as a whole."""
        keys, reasons, details = zip(*[(k, r.value, d[:2000]) for k, r, d in rows], strict=True)
        table = pa.table([keys, reasons, details], schema=schemas.QUARANTINE_SCHEMA)
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
            rows: list[dict[str, str | None]] = file.read(schemas.QUARANTINE_SCHEMA.names).to_pylist()
            return rows

        try:
            return self.read_parsed(parse, "quarantine", layer, f"{shard}.parquet", limit=_QUARANTINE_BYTES)
        except (StorageError, FileNotFoundError):
            raise
        except Exception as error:  # Arrow raises several for damage
            reason = f"{type(error).__name__}: {escape(str(error)[:500])}"
            fix = shlex.join(["reinforce", "validate", self.url, "--repair"])
            raise DamagedQuarantine(
                f"{self.layer_path(f'{QUARANTINE}{layer}', shard)} is damaged ({reason}). `{fix}` sets it aside.",
                reason,
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

        with ThreadPoolExecutor(_READ_AT_ONCE) as pool:
            small = prefetch(pool, lambda s: None if s in large else read_any(s), files, 2 * _READ_AT_ONCE)
            for shard, rows in zip(files, small, strict=True):
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
                    if self.local:
                        found = os.stat(path)
                        if not stat.S_ISREG(found.st_mode) or not found.st_size:  # opening a pipe would block
                            raise RefusedFile("it is empty, or not a regular file")
                    opened = pa.memory_map(path) if self.local else open_whole(self.fs, path, **options)
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

    A context manager: leaving it without a commit discards the file. ``source`` is the URL of the shard.
    """

    def __init__(self, store: Store, layer: Layer, schema: pa.Schema, shard: str, source: str) -> None:
        self._store = store
        self._parts = (layer.name, f"{shard}.parquet")
        super().__init__()
        self._file, self._local_path = self.enter_context(store.staging())
        # ParquetWriter identifies a nested column by the full path of its values,
        # ``augmentations.list.element.crop.top``, and ignores shorter names. Parquet stores integers of 8 bits in 32; a
        # dictionary brings each back to one byte.
        empty = pa.BufferOutputStream()
        pq.write_table(schema.empty_table(), empty)
        columns = pq.ParquetFile(empty.getvalue()).schema
        paths = {columns.column(i).path: columns.column(i).path.split(".")[0] for i in range(len(columns))}
        tensors = [one.name for one in schema if isinstance(one.type, pa.FixedShapeTensorType)]
        of_bytes = [name for name in tensors if schema.field(name).type.value_type in _BYTES]
        dictionary, plain = ("augmentations", "image_ref", *of_bytes), layer.kind.stored_plain
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
            compression={path: "none" if name in plain else "zstd" for path, name in paths.items()},
            use_dictionary=[path for path, name in paths.items() if name in dictionary],
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


def check_footer(path: str, metadata: pq.FileMetaData, fingerprint: str | None) -> None:
    """Raise UserError if a file is from a newer version or has another fingerprint than a given one."""
    footer = parse_footer(metadata)
    version = footer.get("schema_version", "0")  # indexes of identities state none
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
    """Parse the footer's keys: schema_version, layer, fingerprint, source, rows and others."""
    pairs = metadata.metadata or {}
    prefix = b"reinforce."
    return {
        k.removeprefix(prefix).decode(errors="replace"): v.decode(errors="replace")
        for k, v in pairs.items()
        if k.startswith(prefix)
    }
