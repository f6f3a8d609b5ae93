"""Estimated sizes of what a plan will write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from reinforce.config import parse_config
from reinforce.engine.estimate import expected_bytes
from reinforce.engine.plan import make_plan
from tests.helpers.data import config_of, members_of


def test_expected_bytes_are_close_to_what_is_written(shards: Callable[..., str], tmp_path: Path) -> None:
    config = config_of(shards(200), tmp_path / "out")
    config["teachers"]["eye"] = {"class": "tests.helpers.models:ImageOnly"}
    expected = expected_bytes(make_plan(parse_config(config)))
    assert expected["embeddings/eye/images"] == pytest.approx(200 * 2 * 5 * 2, rel=0.05)
    assert expected["embeddings/red/images"] is None, "its dimension is known once it is loaded"
    images = sum(len(data) for name, data in members_of(0, 200) if name.endswith(".png"))
    samples = expected["samples"]
    assert samples is not None
    assert images < samples < 1.3 * images
