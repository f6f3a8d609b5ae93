"""Open source shards as streams of uncompressed bytes, and distinguish broken data from errors of the storage."""

from __future__ import annotations

import bz2
import errno
import gzip
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
from reinforce.source.whole_reads import open_whole

BLOCK_BYTES = 8 * 2**20  # bytes per request to an object store
#: Errors of a storage that has no file at a path which may be read.
NO_FILE = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
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
