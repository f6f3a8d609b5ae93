"""A small dataset that the tests of a process share, and copies that they may damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.helpers.reinforced import small_dataset


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 9 and 3 samples in row groups of 8, next to their source."""
    return Path(small_dataset(tmp_path_factory.mktemp("dataset"), (9, 3)))


@pytest.fixture
def dataset(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "out"))
