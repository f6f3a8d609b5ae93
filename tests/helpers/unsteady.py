"""A file system that fails on request and counts requests."""

from __future__ import annotations

from typing import Any

from fsspec.spec import AbstractBufferedFile, AbstractFileSystem


class UnsteadyFileSystem(AbstractFileSystem):
    """Holds one file of any name. Requests beyond byte ``fails_at`` raise ``error``; ``requests`` and ``bytes_read``
    count them."""

    protocol = "unsteady"
    cachable = False
    content = b""
    fails_at = 2**62
    error: Exception = TimeoutError("no answer")
    requests = 0
    bytes_read = 0

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        return {"name": path, "size": len(self.content), "type": "file"}

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **options: Any) -> AbstractBufferedFile:
        return _UnsteadyFile(self, path, mode, block_size, **options)


class _UnsteadyFile(AbstractBufferedFile):
    def _fetch_range(self, start: int, end: int) -> bytes:
        UnsteadyFileSystem.requests += 1
        UnsteadyFileSystem.bytes_read += end - start
        if end > UnsteadyFileSystem.fails_at:
            raise UnsteadyFileSystem.error
        return UnsteadyFileSystem.content[start:end]
