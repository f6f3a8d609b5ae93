"""A file whose size is known from a listing, read by one request for each range and never open in between."""

from __future__ import annotations

import os
from typing import Any

from reinforce.source.whole_reads import read_range


class RangeFile:
    """A file of ``size`` bytes at a path of an fsspec file system, or of the local disk if ``fs`` is None.

    What was read first and last is kept: the end of a file, which often is all of it, and a range that is read again.
    """

    def __init__(self, fs: Any, path: str, size: int) -> None:
        self._fs, self._path, self.size = fs, path, size
        self._position = 0
        self._parts: list[tuple[int, bytes]] = []

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = offset + (0, self._position, self.size)[whence]
        return self._position

    def read(self, length: int) -> bytes:
        start, stop = self._position, min(self.size, self._position + length)
        self._position = max(start, stop)
        for first, data in self._parts:
            if first <= start and stop <= first + len(data):
                return data[start - first : stop - first]
        if stop <= start:
            return b""
        if self._fs is None:
            data = _read_local(self._path, start, stop)
        else:
            data = read_range(self._fs, self._path, start, stop)
        self._parts = [*self._parts[:1], (start, data)]
        return data


def _read_local(path: str, start: int, stop: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe would block
    try:
        return os.pread(descriptor, stop - start, start)
    finally:
        os.close(descriptor)
