from __future__ import annotations

from typing import Any

import fsspec
import pytest
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


@pytest.fixture
def unsteady(monkeypatch: pytest.MonkeyPatch) -> type[UnsteadyFileSystem]:
    """The file system of ``unsteady://`` URLs; its settings are reset after the test."""
    fsspec.register_implementation("unsteady", UnsteadyFileSystem, clobber=True)
    for name in ("content", "fails_at", "error", "requests", "bytes_read"):
        monkeypatch.setattr(UnsteadyFileSystem, name, getattr(UnsteadyFileSystem, name))
    return UnsteadyFileSystem
