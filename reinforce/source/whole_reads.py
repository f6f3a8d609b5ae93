"""Reads of storages that check how many bytes arrive, listings that start again, and what drivers raise.

An object store may answer with fewer bytes than were asked for and a Content-Length that fits them. No driver notices
that, and where the answer has no checksum, the file looks damaged. Its size is known, so the bytes are asked for again.
A listing is a chain of pages, each with the token of the next one, and a token may expire before it is used. Each
driver has exceptions of its own, which are classified here.
"""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from functools import partial
from typing import Any, Protocol, TypeVar

from reinforce.errors import StorageError
from reinforce.processes.attempts import READS

#: Packages whose exceptions are errors of a storage, beside OSError.
_DRIVERS = frozenset({"botocore", "aiobotocore", "aiohttp", "gcsfs", "google", "azure", "adlfs", "requests", "urllib3"})
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk full, quota reached, file too large
_CONFLICTS = (409, 412)  # HTTP status of a conditional put that met another one, or a file
_NO_RANGE = (errno.EINVAL, 416)  # of a read from a range that a file does not have
_INVALID = (errno.EINVAL, errno.EIO, 400)  # what drivers raise for a request that the storage finds invalid
_NO_NEXT_PAGE = ("PaginationError", "KeyError")  # botocore's for a token that is repeated, s3fs's for one that is lost
T = TypeVar("T")
W = TypeVar("W", bound="OpenWatcher")


class ShortRead(OSError):
    """A storage has sent fewer bytes than there are, each time."""


class OpenWatcher(Protocol):
    """Receives a file before its bytes are read: the open file if there is one, and what is listed of it if known."""

    def __call__(self, fs: Any, path: str, file: Any = None, info: Mapping[str, Any] | None = None) -> None: ...


_WATCHER: ContextVar[OpenWatcher | None] = ContextVar("_WATCHER", default=None)


@contextlib.contextmanager
def watching_opened(watcher: W) -> Iterator[W]:
    """Call ``watcher`` for each file that this thread opens in the block with ``open_whole``; yields it."""
    token = _WATCHER.set(watcher)
    try:
        yield watcher
    finally:
        _WATCHER.reset(token)


def report_opened(fs: Any, path: str, file: Any = None, info: Mapping[str, Any] | None = None) -> None:
    """Call the watcher for a file that is about to be read."""
    if (watcher := _WATCHER.get()) is not None:
        watcher(fs, path, file, info)


def open_whole(fs: Any, path: str, **options: Any) -> Any:
    """Open a file of an fsspec file system to read it. Reading raises ShortRead if it ends before its size."""
    file = fs.open(path, "rb", **options)
    cache, size = getattr(file, "cache", None), getattr(file, "size", None)
    if size and cache is not None and hasattr(cache, "fetcher"):
        cache.fetcher = partial(_fetch, cache.fetcher, size, path)
    try:
        report_opened(fs, path, file)
    except BaseException:
        file.close()
        raise
    return file


def read_up_to(file: Any, size: int) -> bytes:
    """Read ``size`` bytes of an open file, whose reads may return fewer, or all up to its end."""
    data = bytearray()
    while len(data) < size and (part := file.read(size - len(data))):
        data += part
    return bytes(data)


def read_range(fs: Any, path: str, start: int, end: int) -> bytes:
    """Read the bytes of a file from ``start`` to ``end``, which it is known to have. Raises ShortRead."""
    return _read(lambda: fs.cat_file(path, start=start, end=end), end - start, path)


def read_start(fs: Any, path: str, size: int) -> bytes:
    """Read a file, at most ``size`` bytes. Object stores refuse ranges of a file without bytes."""
    try:
        data: bytes = fs.cat_file(path, end=size)
    except Exception as error:  # each driver has its own exceptions
        if not _lacks_range(error):
            raise
        fs.invalidate_cache()
        if fs.info(path)["size"]:
            raise
        return b""
    return data


def read_whole(fs: Any, path: str) -> bytes:
    """Read a file that may end anywhere, such as a list of lines. Raises ShortRead."""
    data: bytes = fs.cat_file(path)
    size = fs.info(path).get("size") or 0
    return data if len(data) >= size else _read(lambda: fs.cat_file(path), size, path)


def list_whole(read: Callable[[], T]) -> T:
    """The entries of a listing. It starts again where the storage finds a request invalid, or a page leads nowhere.

    Raises OSError where pages lead nowhere each time.
    """

    def passes(error: Exception) -> bool:
        codes = {getattr(error, name, None) for name in ("errno", "code", "status_code")}
        return not codes.isdisjoint(_INVALID) or type(error).__name__ in _NO_NEXT_PAGE

    try:
        return READS.call(read, passes)
    except Exception as error:  # each driver has its own exceptions
        if type(error).__name__ not in _NO_NEXT_PAGE:
            raise
        what = f"a page of the listing names no next page ({type(error).__name__}: {error})"
        raise OSError(errno.EIO, what) from error


def _fetch(fetch: Callable[[int, int], bytes], size: int, path: str, start: int, end: int) -> bytes:
    return _read(lambda: fetch(start, end), min(end, size) - start, path)


def _read(read: Callable[[], bytes], size: int, path: str) -> bytes:
    def read_whole() -> bytes:
        if len(data := read()) < size:
            raise ShortRead(f"{path}: the storage sent {len(data):,} of {size:,} bytes")
        return data

    return READS.call(read_whole, lambda error: isinstance(error, ShortRead))


def is_storage_error(error: Exception) -> bool:
    """Whether an error comes from a storage or from the network to it."""
    if isinstance(error, (OSError, StorageError)):
        return True
    return type(error).__module__.partition(".")[0] in _DRIVERS


def is_full(error: Exception) -> bool:
    """Whether a disk is full, by Python or by a library in Rust, such as safetensors, which has it in its message."""
    in_rust = re.search(r"\(os error (\d+)\)", str(error))
    number = error.errno if isinstance(error, OSError) else int(in_rust[1]) if in_rust else None
    return number in _NO_SPACE


def is_unsupported(error: Exception) -> bool:
    """Whether a storage or its driver has no conditional puts."""
    if isinstance(error, (NotImplementedError, TypeError)) or "NotImplemented" in str(error):
        return True
    return getattr(error, "errno", None) == errno.ENOSYS  # s3fs raises it for status 501


def is_conflict(error: Exception) -> bool:
    """Whether a storage reports that a conditional put met another one, or a file."""
    response = getattr(error.__cause__, "response", None)  # of botocore
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
    return isinstance(error, FileExistsError) or not {status, *_codes(error)}.isdisjoint(_CONFLICTS)


def _lacks_range(error: Exception) -> bool:
    """Whether a storage reports that a file does not have the bytes that were asked for."""
    return not _codes(error).isdisjoint(_NO_RANGE)


def _codes(error: Exception) -> set[object]:
    return {getattr(error, name, None) for name in ("errno", "code", "status", "status_code")}
