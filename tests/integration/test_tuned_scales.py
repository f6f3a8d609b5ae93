"""A tuned scale in dataset.json: later runs, added teachers and trainings keep it and report it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from reinforce.config import parse_config
from reinforce.dataset.files.store import MANIFEST, Store
from reinforce.dataset.manifest.manifest import read_manifest, record_scales, update_manifest
from reinforce.engine.plan.plan import make_plan
from reinforce.engine.run import run
from reinforce.student.teachers import stored_teachers
from reinforce.student.terms.pairs import find_scales
from tests.helpers.data import config_of
from tests.helpers.reinforced import small_dataset
from tests.helpers.tuning import trial_student

ORIGIN = "tuned by retrieval/own/text_to_image/r1, plateau 40 to 60, see runs/tuning"


@pytest.fixture
def dataset(tmp_path: Path) -> Store:
    return Store(small_dataset(tmp_path, sizes=(5,)))


def run_again(tmp_path: Path, caplog: pytest.LogCaptureFixture, **red: Any) -> tuple[dict[str, Any], str]:
    """Run with another scale -> the entry of dataset.json, and the warnings."""
    config = config_of(f"{tmp_path}/source/*.tar", tmp_path / "out")
    teacher = {**config["teachers"]["red"], **red}
    config["teachers"]["red"] = {key: value for key, value in teacher.items() if value is not None}
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        run(config)
    return read_manifest(Store(str(tmp_path / "out")))["teachers"]["red"], caplog.text


def test_tuned_scale_stays_until_the_config_changes(
    tmp_path: Path, dataset: Store, caplog: pytest.LogCaptureFixture
) -> None:
    dataset.write_json(record_scales(read_manifest(dataset), {"red": 43.0}, ORIGIN), MANIFEST)
    entry, warnings = run_again(tmp_path, caplog)  # with the 50 of the first run
    assert (entry["logit_scale"], entry["logit_scale_from"]) == (43.0, ORIGIN)
    assert entry["logit_scale_tuned"] == {"config": 50.0, "before": 50.0, "before_from": "config"}
    assert f"teacher red: logit scale 43 ({ORIGIN}) stays in use, not the 50 of this config" in warnings
    entry, warnings = run_again(tmp_path, caplog, logit_scale=None)
    assert entry["logit_scale"] == 43.0
    assert warnings == ""
    entry, warnings = run_again(tmp_path, caplog, logit_scale=55.0)
    assert (entry["logit_scale"], entry["logit_scale_from"]) == (55.0, "config")
    assert "logit_scale_tuned" not in entry
    assert f"teacher red: logit scale 55 of this config replaces 43 ({ORIGIN})" in warnings


def test_scale_tuned_twice_keeps_the_value_of_the_config_and_trainings_and_added_teachers_the_tuned_one(
    tmp_path: Path, dataset: Store
) -> None:
    once = record_scales(read_manifest(dataset), {"red": 43.0}, "tuned once")
    twice = record_scales(once, {"red": 47.0}, "tuned twice")["teachers"]["red"]
    assert (twice["logit_scale"], twice["logit_scale_from"]) == (47.0, "tuned twice")
    assert twice["logit_scale_tuned"]["before"] == 50.0
    dataset.write_json(record_scales(read_manifest(dataset), {"red": 43.0, "blue": 21.0}, ORIGIN), MANIFEST)
    student = trial_student(tmp_path / "student", data={"datasets": dataset.url})
    found = find_scales(student.loss, stored_teachers(student, {dataset.url: read_manifest(dataset)}))
    assert {name: scale for name, (scale, _) in found.items()} == {"red": 43.0, "blue": 21.0}
    assert found["red"][1] == f"logit scale 43 (dataset: {ORIGIN})"
    config = parse_config(config_of(f"{tmp_path}/source/*.tar", tmp_path / "out"))
    loaded = {
        ("teachers", "blue"): {"dim": 12, "logit_scale": 30.0}
    }  # the model's own scale does not replace the tuned one
    updated = update_manifest(read_manifest(dataset), config, make_plan(config).layers, loaded)
    assert updated["teachers"]["blue"]["logit_scale"] == 21.0
