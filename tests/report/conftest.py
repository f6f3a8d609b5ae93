"""A dataset for the reports."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.data import config_of
from tests.helpers.reinforced import reinforce_here


@pytest.fixture
def dataset(shards: Callable[..., str], tmp_path: Path) -> str:
    """Two captioners, and teachers of images and texts, only of images and only of texts."""
    repetitive = {"class": "tests.helpers.models:RepetitiveCaptioner", "captions": 3, "clean": {}}
    config = config_of(shards(12, 5), tmp_path / "out")
    config["captioners"]["repetitive"] = repetitive
    config["teachers"] |= {
        "images-only": {"class": "tests.helpers.models:ImageOnly"},
        "texts-only": {"class": "tests.helpers.models:TextOnly"},
    }
    return reinforce_here(config)
