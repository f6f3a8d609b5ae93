"""A tuned scale in dataset.json, in the config that is written, and in what trainings and runs say."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

from reinforce import settings
from reinforce.config import parse_config
from reinforce.dataset.manifest import read_manifest, record_scales, update_manifest
from reinforce.dataset.store import MANIFEST, Store
from reinforce.engine.plan import make_plan
from reinforce.engine.runner import run
from reinforce.student.config import StudentConfig, load_student_config
from reinforce.student.distillation import plan_distillation, stored_teachers
from reinforce.tuning.space import LAMBDA
from reinforce.tuning.written import student_yaml
from tests.helpers.data import config_of
from tests.helpers.reinforced import small_dataset

ORIGIN = "tuned by retrieval/own/text_to_image/r1, plateau 40 to 60, see runs/tuning"


@pytest.fixture
def dataset(tmp_path: Path) -> Store:
    return Store(small_dataset(tmp_path, sizes=(5,)))


def run_again(tmp_path: Path, caplog: pytest.LogCaptureFixture, **red: Any) -> tuple[dict[str, Any], str]:
    """`reinforce run` with other scales: what dataset.json says of them then, and what was told."""
    config = config_of(f"{tmp_path}/source/*.tar", tmp_path / "out")
    teacher = {**config["teachers"]["red"], **red}
    config["teachers"]["red"] = {key: value for key, value in teacher.items() if value is not None}
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        run(config)
    return read_manifest(Store(str(tmp_path / "out")))["teachers"]["red"], caplog.text


def test_a_tuned_scale_stays_in_force_until_the_config_changes(
    tmp_path: Path, dataset: Store, caplog: pytest.LogCaptureFixture
) -> None:
    dataset.write_json(record_scales(read_manifest(dataset), {"red": 43.0}, ORIGIN), MANIFEST)
    entry, told = run_again(tmp_path, caplog)  # with the 50 that was there before
    assert (entry["logit_scale"], entry["logit_scale_from"]) == (43.0, ORIGIN)
    assert entry["logit_scale_tuned"] == {"config": 50.0, "before": 50.0, "before_from": "config"}
    assert f"teacher red: logit scale 43 ({ORIGIN}) stays in force, not the 50 of this config" in told
    entry, told = run_again(tmp_path, caplog, logit_scale=None)
    assert entry["logit_scale"] == 43.0
    assert told == ""
    entry, told = run_again(tmp_path, caplog, logit_scale=55.0)
    assert (entry["logit_scale"], entry["logit_scale_from"]) == (55.0, "config")
    assert "logit_scale_tuned" not in entry
    assert f"teacher red: logit scale 55 of this config replaces 43 ({ORIGIN})" in told


def test_a_scale_that_is_tuned_anew_keeps_what_the_config_said(dataset: Store) -> None:
    once = record_scales(read_manifest(dataset), {"red": 43.0}, "tuned once")
    twice = record_scales(once, {"red": 47.0}, "tuned twice")["teachers"]["red"]
    assert (twice["logit_scale"], twice["logit_scale_from"]) == (47.0, "tuned twice")
    assert twice["logit_scale_tuned"]["before"] == 50.0


def test_a_teacher_that_is_added_leaves_a_tuned_scale_alone(tmp_path: Path, dataset: Store) -> None:
    dataset.write_json(record_scales(read_manifest(dataset), {"blue": 21.0}, ORIGIN), MANIFEST)
    config = parse_config(config_of(f"{tmp_path}/source/*.tar", tmp_path / "out"))
    loaded = {"blue": {"dim": 12, "logit_scale": 30.0}}  # what the model says is not what was tuned
    updated = update_manifest(read_manifest(dataset), config, make_plan(config).layers, loaded)
    assert updated["teachers"]["blue"]["logit_scale"] == 21.0


def test_a_training_says_that_its_scale_was_tuned(dataset: Store) -> None:
    dataset.write_json(record_scales(read_manifest(dataset), {"red": 43.0}, ORIGIN), MANIFEST)
    written = student(dataset.url, {"logit_scales": {"blue": 21.0}})
    config = settings.parse(StudentConfig, {**written, "data": {"datasets": dataset.url}})
    lesson = plan_distillation(config.loss, stored_teachers(config, {dataset.url: read_manifest(dataset)}))
    assert lesson.scales == {"red": 43.0, "blue": 21.0}
    assert f"logit scale 43 (dataset: {ORIGIN})" in lesson.notes[0]


def student(url: str, loss: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "output": "before",
        "student": {"model": "MobileCLIP2-S0"},
        "data": {"datasets": url, "teachers": ["red", "blue", "x"], "captioners": {"coca": 2.0}},
        **({} if loss is None else {"loss": loss}),
        "train": {"epochs": 8, "batch": 128, "optimizer": {"lr": 1e-3}},
    }


@pytest.mark.parametrize("loss", [None, {"lambda": 0.7, "logit_scales": {"red": 10.0, "x": 5.0}, "features": "all"}])
def test_the_written_config_is_the_students_with_what_was_found_and_why(
    tmp_path: Path, loss: dict[str, Any] | None
) -> None:
    found = {"red": 43.0, LAMBDA: 0.5}
    origins = {
        "red": "reinforce tune: best at 43 (0.6), # plateau",
        "blue": "stays at 30, dataset: model",
        LAMBDA: "best",
    }
    path = tmp_path / "student.yaml"
    path.write_text(student_yaml(student("data", loss), found, origins, "runs/tuning/student", "Said at the top."))
    text = path.read_text()
    written = load_student_config(path)
    before = settings.parse(StudentConfig, student("data", loss))
    assert written.loss.logit_scales == {**before.loss.logit_scales, "red": 43.0}
    assert (written.loss.lambda_, written.loss.features) == (0.5, before.loss.features)
    assert written.output == "runs/tuning/student"
    assert written.model_copy(update={"output": "before", "loss": before.loss}) == before
    assert text.startswith("# Said at the top.\n")
    lines = [line.strip() for line in text.splitlines()]
    assert lines[lines.index("red: 43.0") - 1] == "# reinforce tune: best at 43 (0.6), # plateau"
    assert "# blue: stays at 30, dataset: model" in lines
    assert yaml.safe_load(text)["data"] == json.loads(json.dumps(student("data")["data"]))
