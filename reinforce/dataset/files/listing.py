"""Listings of layers: the committed shards of each, and the bytes of their files.

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
import threading
from collections.abc import ItemsView, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from reinforce.source.identity import listed_state
from reinforce.source.urls import Info
from reinforce.source.whole_reads import list_whole
from reinforce.storage import Storage

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


class _Items(ItemsView[str, int]):
    def __iter__(self) -> Iterator[tuple[str, int]]:
        return zip(self._mapping, self._mapping.sizes.tolist(), strict=True)  # type: ignore[attr-defined]


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

    @property
    def total_bytes(self) -> int:
        return int(self.sizes.sum())

    def first(self, most: int) -> Listing:
        return Listing(self.names[:most], self.sizes[:most])

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
        return self.only(~self.within(_as_array(names)))

    def sizes_of(self, names: Iterable[str]) -> npt.NDArray[np.int64]:
        """The bytes of the files of some shards, -1 for those that are not listed [names]."""
        places = pc.index_in(_as_array(names), value_set=self.names)
        listed = places.is_valid().to_numpy(zero_copy_only=False)
        found = np.full(len(places), -1, np.int64)
        found[listed] = self.sizes[places.drop_null().to_numpy()]
        return found

    def items(self) -> ItemsView[str, int]:
        return _Items(self)


def _as_array(names: Iterable[str]) -> pa.StringArray:
    return names if isinstance(names, pa.StringArray) else pa.array(names, pa.string())


def list_folders(
    storage: Storage, folders: Iterable[str], known: Listing | None = None, states: bool = False
) -> dict[str, Listing]:
    """List the Parquet files of some folders side by side. A folder that does not exist has none.

    ``known`` are shards that large folders probably have. A folder of S3 is then listed in several ranges at once,
    since the pages of one range follow each other; the result does not depend on them. With ``states``, the numbers
    are not bytes but hashes of the size and the ETag, or modification time, of each file: equal ones mean the same
    content, and 0 that the storage states no time.
    """
    folders = list(folders)
    if not storage.local:
        _connect(storage)
    ranges = _ranges(known) if known is not None and _is_s3(storage.fs) else [_WHOLE]
    jobs = [(folder, part) for folder in folders for part in ranges]
    with ThreadPoolExecutor(_AT_ONCE * len(ranges)) as pool:
        found = list(pool.map(lambda job: _list(storage, job[0], job[1], states), jobs))
    return {
        folder: Listing.joined(found[number * len(ranges) : (number + 1) * len(ranges)])
        for number, folder in enumerate(folders)
    }


def _ranges(known: Listing) -> list[_Range]:
    """Ranges of file names with about as many of the known shards each."""
    count = max(1, min(_RANGES, len(known) // _MIN_RANGE))
    bounds = sorted(known.names[len(known) * part // count].as_py() + _ENDING for part in range(1, count))
    return list(zip(["", *bounds], [*bounds, None], strict=True))


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
    for name, number in _whole_listing(storage.fs, path):
        if _FILE_NAME.fullmatch(name):
            yield name[: -len(_ENDING)], number


def _whole_listing(fs: Any, path: str) -> Iterator[tuple[str, int]]:
    """Name and number of each file in a folder, for other drivers, which keep more than a kilobyte for each."""
    with _LISTED_WHOLE:
        try:
            found = list_whole(lambda: fs.ls(path, detail=True, refresh=True))
        finally:
            fs.invalidate_cache(path)
    while found:
        entry = found.pop()
        if entry["type"] == "file":
            yield posixpath.basename(str(entry["name"]).rstrip("/")), _number(entry)


# -- S3: a page at a time, parsed here, because botocore takes 0.1 s of CPU for a page of 1,000 names


def _is_s3(fs: Any) -> bool:
    protocol = [fs.protocol] if isinstance(fs.protocol, str) else fs.protocol
    return "s3" in protocol and hasattr(fs, "call_s3")


def _connect(storage: Storage) -> None:
    """Make the client of an S3 file system before threads do."""
    if not _is_s3(storage.fs):
        return
    with storage.storage_errors("listed"):
        client = storage.fs.connect()
    with contextlib.suppress(AttributeError):  # without it, botocore parses the answers
        # Called before botocore's own handlers, which are registered for the more specific ``before-parse.s3.*``.
        client.meta.events.register("before-parse.*.ListObjectsV2", _take_entries, unique_id="reinforce-listing")


def _list_s3(fs: Any, path: str, part: _Range) -> Listing:
    """The Parquet files of a folder whose names are in a range."""
    after, last = part
    pages = []
    for names, sizes in _s3_pages(fs, path, after):
        if names and (names[0] <= after or (last is not None and names[-1] > last)):  # some stores ignore StartAfter
            inside = [after < name and (last is None or name <= last) for name in names]
            pages.append(_page([*itertools.compress(names, inside)], [*itertools.compress(sizes, inside)]))
            if last is not None and names[-1] > last:
                break
        else:
            pages.append(_page(names, sizes))
    return Listing.joined(pages) if pages else Listing.of([])


def _page(names: list[str], sizes: list[int]) -> Listing:
    """The Parquet files among some files. All names are matched at once, which takes a third of the CPU."""
    shards = _FILE_LINES.findall("\n".join(names))
    if len(shards) != len(names):
        chosen = [_FILE_NAME.fullmatch(name) is not None for name in names]
        shards = [name[: -len(_ENDING)] for name in itertools.compress(names, chosen)]
        sizes = [*itertools.compress(sizes, chosen)]
    return Listing(pa.array(shards, pa.string()), np.array(sizes, np.int64))


def _s3_pages(fs: Any, path: str, after: str) -> Iterator[tuple[list[str], list[int]]]:
    """Names and numbers of the files of a folder, a page at a time."""
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
