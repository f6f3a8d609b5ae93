"""Reads that check how many bytes arrive.

An object store may answer with fewer bytes than were asked for and a Content-Length that fits them. No driver notices
that, and where the answer has no checksum, the file looks damaged. Its size is known, so the bytes are asked for again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

_ATTEMPTS = 3


class ShortRead(OSError):
    """A storage has sent fewer bytes than there are, each time."""


def open_whole(fs: Any, path: str, **options: Any) -> Any:
    """Open a file of an fsspec file system to read it. Reading raises ShortRead if it ends before its size."""
    file = fs.open(path, "rb", **options)
    cache, size = getattr(file, "cache", None), getattr(file, "size", None)
    if size and cache is not None and hasattr(cache, "fetcher"):
        cache.fetcher = partial(_fetch, cache.fetcher, size, path)
    return file


def read_range(fs: Any, path: str, start: int, end: int) -> bytes:
    """Read the bytes of a file from ``start`` to ``end``, which it is known to have. Raises ShortRead."""
    return _read(lambda: fs.cat_file(path, start=start, end=end), end - start, path)


def read_whole(fs: Any, path: str) -> bytes:
    """Read a file that may end anywhere, such as a list of lines. Raises ShortRead."""
    data: bytes = fs.cat_file(path)
    size = fs.info(path).get("size") or 0
    return data if len(data) >= size else _read(lambda: fs.cat_file(path), size, path)


def _fetch(fetch: Callable[[int, int], bytes], size: int, path: str, start: int, end: int) -> bytes:
    return _read(lambda: fetch(start, end), min(end, size) - start, path)


def _read(read: Callable[[], bytes], size: int, path: str) -> bytes:
    for _ in range(_ATTEMPTS):
        if len(data := read()) >= size:
            return data
    raise ShortRead(f"{path}: the storage sent {len(data):,} of {size:,} bytes")
