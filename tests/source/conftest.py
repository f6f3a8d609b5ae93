from __future__ import annotations

import fsspec
import pytest

from tests.helpers.unsteady import UnsteadyFileSystem


@pytest.fixture
def unsteady(monkeypatch: pytest.MonkeyPatch) -> type[UnsteadyFileSystem]:
    """The file system of ``unsteady://`` URLs; its settings are reset after the test."""
    fsspec.register_implementation("unsteady", UnsteadyFileSystem, clobber=True)
    for name in ("content", "fails_at", "error", "requests", "bytes_read"):
        monkeypatch.setattr(UnsteadyFileSystem, name, getattr(UnsteadyFileSystem, name))
    return UnsteadyFileSystem
