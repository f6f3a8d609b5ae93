"""Open source shards as streams of uncompressed bytes, and distinguish broken data from errors of the storage."""

from __future__ import annotations

import bz2
import contextlib
import errno
import gzip
import itertools
import lzma
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from reinforce.processes.prefetch import prefetch
from reinforce.source.file_types import NOT_A_FILE
from reinforce.source.tar import Readable
from reinforce.source.urls import compression, filesystem
from reinforce.source.whole_reads import is_storage_error, open_whole

BLOCK_BYTES = 8 * 2**20  # bytes per request to an object store
#: Errors of a storage that has no file at a path which may be read.
NO_FILE = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
_NO_NAME = (errno.ENAMETOOLONG, errno.ELOOP)  # errors of file systems for impossible paths
_FEW = 16  # unreadable files of a shard that do not mean yet that its storage fails
_OTHERS = 8  # files that are tried to learn whether a storage works
_THREADS, _LOCAL_THREADS = 16, 2  # that read files ahead
_MAGIC = {b"\x1f\x8b": ".tar.gz", b"\xfd7zXZ": ".tar.xz", b"BZh": ".tar.bz2", b"\x28\xb5\x2f\xfd": ".tar.zst"}

_T = TypeVar("_T")
_R = TypeVar("_R")


class Seekable(Readable, Protocol):
    """A stream of bytes that can go on further ahead."""

    def skip(self, count: int, /) -> None:
        """Leave out bytes."""


@contextmanager
def open_stream(url: str, kind: str | None = None) -> Iterator[tuple[Seekable, int | None]]:
    """Open a shard and yield its uncompressed bytes and their number, or None where that is not known in advance.

    ``kind`` is its compression, if that does not follow from the ending of a tar. Reading raises EOFError where the
    data is broken, and otherwise what the storage raises.
    """
    fs, path = filesystem(url)
    kind = kind or compression(url)
    check_file(fs, path)
    with open_whole(fs, path, block_size=BLOCK_BYTES, cache_type="readahead") as file:
        size = getattr(file, "size", None)
        if size == 0 and fs.isdir(path):  # s3fs opens a folder as an empty file
            raise IsADirectoryError(errno.EISDIR, "a folder")
        yield (_PlainStream(file), size) if kind is None else (_Decompressor(file, kind), None)


def check_file(fs: Any, path: str) -> None:
    """Raise IsADirectoryError for a local path that is a folder, pipe or device; opening a pipe would block."""
    if isinstance(fs, LocalFileSystem) and not stat.S_ISREG(mode := os.stat(path).st_mode):
        raise IsADirectoryError(errno.EISDIR, "a folder" if stat.S_ISDIR(mode) else NOT_A_FILE)


def read_file(url: str, limit: int) -> bytes:
    """Read a file; of one of more than ``limit`` bytes, one byte more than that. Raises as ``check_file``."""
    fs, path = filesystem(url)
    check_file(fs, path)
    with open_whole(fs, path, block_size=limit + 1, cache_type="none") as file:
        data: bytes = file.read(limit + 1)
    return data


class UnreadableFile(Exception):
    """A file that does not exist or cannot be read, in a storage that works."""


class FileReader:
    """Reads the small files of a folder, and distinguishes one that cannot be read from a storage that fails.

    ``others`` are URLs of files there that are tried where none was read before.
    """

    def __init__(self, others: Callable[[], Iterable[str]]) -> None:
        self._others = others
        self._last: str | None = None
        self._read = self._unreadable = 0

    def read(self, url: str, limit: int) -> bytes:
        """Read a file as ``read_file`` does. Raises UnreadableFile, or the errors of a storage that reads no other
        file either or that has failed at more files than it has read.
        """
        data = self._try(url, limit)
        if isinstance(data, Exception):
            if self._unreadable >= max(_FEW, self._read) or not self._works(url):
                raise data
            again = self._try(url, limit)
            if isinstance(again, Exception):
                self._unreadable += 1
                raise UnreadableFile(_describe(again)) from again
            data = again
        self._last = url
        self._read += 1
        return data

    def _try(self, url: str, limit: int) -> bytes | Exception:
        """The bytes of a file, or an error that may be the file's or the storage's. Raises UnreadableFile."""
        try:
            return read_file(url, limit)
        except NO_FILE as error:
            raise UnreadableFile(_describe(error)) from error
        except Exception as error:  # each driver has its own exceptions
            if getattr(error, "errno", None) in _NO_NAME:
                raise UnreadableFile(_describe(error)) from error
            if not is_storage_error(error):
                raise
            return error

    def _works(self, url: str) -> bool:
        """Whether any other file can be read now."""
        for other in [self._last] if self._last else itertools.islice(self._others(), _OTHERS):
            with contextlib.suppress(UnreadableFile):
                if other != url and isinstance(self._try(other, 1), bytes):
                    return True
        return False


def _describe(error: Exception) -> str:
    return getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"


def read_ahead(read: Callable[[_T], _R], items: Iterable[_T], folder: str) -> Iterator[_R]:
    """Yield ``read(item)`` in order; it reads files, most of them in ``folder``, ahead in threads."""
    threads = _THREADS if "://" in folder else _LOCAL_THREADS
    with ThreadPoolExecutor(threads) as pool:
        yield from prefetch(pool, read, items, threads)


class _PlainStream:
    """An uncompressed file. Raises EOFError if its first bytes are those of a compressed file."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._started = False

    def read(self, size: int, /) -> bytes:
        data: bytes = self._file.read(size)
        if not self._started:
            self._started = True
            for magic, ending in _MAGIC.items():
                if data.startswith(magic):
                    raise EOFError(f"compressed data; name the file {ending}")
        return data

    def skip(self, count: int, /) -> None:
        self._started = True
        self._file.seek(count, 1)


class _Decompressor:
    """Decompresses a file. Raises EOFError for broken data; errors of the storage pass through."""

    def __init__(self, file: Any, kind: str) -> None:
        self._file = _ErrorRecorder(file)
        decompressor, self._step = _DECOMPRESSORS[kind]
        self._stream = decompressor(self._file)
        self._kind = kind

    def read(self, size: int, /) -> bytes:
        try:  # small steps: what a decompressor has buffered when it fails is lost
            data: bytes = self._stream.read1(min(size, self._step))
        except Exception as error:  # each library raises its own types: zlib.error, LZMAError, OSError, EOFError
            if self._file.error is not None:
                raise self._file.error from None
            raise EOFError(f"broken {self._kind} data ({error})") from error
        return data

    def skip(self, count: int, /) -> None:
        while count and (data := self.read(count)):
            count -= len(data)


class _ErrorRecorder:
    """A compressed file that records the error it raised, to distinguish it from an error of the decompressor."""

    closed = False

    def __init__(self, file: Any) -> None:
        self._file = file
        self.error: Exception | None = None

    def read(self, size: int = -1, /) -> bytes:
        try:
            data: bytes = self._file.read(size)
        except Exception as error:
            self.error = error
            raise
        return data

    def close(self) -> None:
        """Do nothing: pyarrow closes its input, but ``open_stream`` closes the file."""

    def seek(self, *_: object) -> int:
        raise OSError("the stream cannot seek")


#: How each kind of compression is opened, and how many bytes are read from it at a time.
_DECOMPRESSORS: dict[str, tuple[Callable[[Any], Any], int]] = {
    "gzip": (lambda file: gzip.GzipFile(fileobj=file, mode="rb"), 2**16),
    "xz": (lzma.LZMAFile, 2**16),
    "bzip2": (bz2.BZ2File, 2**16),
    "zstd": (lambda file: pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd"), 2**12),
}
