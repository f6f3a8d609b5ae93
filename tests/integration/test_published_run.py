"""Published reinforcements in a run on Ray."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import reinforce
from tests.helpers.published import (
    ALL,
    CAPTIONS,
    COUNT,
    check_sample,
    config_of,
    published_members,
    source_members,
    write_published,
)
from tests.helpers.reinforced import fresh_dataset


@pytest.mark.usefixtures("ray_session")
def test_a_run_reads_published_reinforcements_and_adds_a_custom_teacher(tmp_path: Path) -> None:
    write_published(tmp_path, [source_members(one) for one in ALL], [published_members(one) for one in ALL])
    fresh_dataset(config_of(tmp_path))
    custom = config_of(tmp_path)
    custom["teachers"]["custom"] = {
        "class": "tests.helpers.models:ColorTeacher",
        "options": {"size": 16, "dim": 8},
        "logit_scale": 20.0,
    }
    summary = reinforce.run(custom)
    assert (summary.status, summary.samples, summary.shards) == (0, 12, 1)
    for one, sample in zip(ALL, reinforce.open(f"{tmp_path}/out"), strict=True):
        check_sample(one, sample)
        assert sample.images["custom"].shape == (COUNT, 8)
        assert sample.texts["custom"]["coca"].shape == (CAPTIONS, 8)
    scales = json.loads((tmp_path / "out" / "dataset.json").read_text())["teachers"]
    assert {name: entry["logit_scale"] for name, entry in scales.items()} == {"one": 70, "two": 60, "custom": 20}
