"""The config of a tuning, the settings it tries, the config of each trial, and the config it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from reinforce import settings
from reinforce.errors import UserError
from reinforce.student.config import StudentConfig, load_student_config
from reinforce.tuning.config import load_tune_config
from reinforce.tuning.space import LAMBDA, BaseStudent, Setting, Trial, lambda_settings, scale_settings
from reinforce.tuning.student_yaml import render_student_yaml
from tests.helpers.tuning import STUDENT, tune_config

INVALID: list[tuple[dict[str, Any], str]] = [
    ({"scales": {"red": [10.0]}}, "scales.red: 10 is the only value, nothing to compare"),
    ({"scales": {}, "lambda": [1.0]}, "lambda: 1 is the only value, nothing to compare"),
    ({"scales": {}}, "nothing to try"),
    ({"mode": "joint", "scales": {"red": [10.0], "blue": [20.0]}}, "nothing to try"),
    ({"scales": {"red": [10.0, 10.0, 20.0]}}, "scales.red: duplicate value"),
    ({"seeds": [1, 1]}, "seeds: duplicate seed"),
    ({"scales": {"red": [0.0, 10.0]}}, "greater than 0"),
    ({"scales": {"red": {"from": 10, "to": 90}}}, "must be a list of values, or {from, to, count}"),
    ({"scales": {"red": {"from": -1, "to": 90, "count": 3}}}, "`from` and `to` must be numbers above 0"),
    ({"sample": 3}, "`sample` requires `mode: joint`"),
    ({"early_stopping": {"grase": 0.2}}, "known keys here: grace, reduction"),
]


def test_invalid_configs_are_rejected_and_a_grid_has_equal_ratios() -> None:
    for keys, message in INVALID:
        with pytest.raises(UserError, match=message):
            tune_config(**keys)
    assert tune_config(scales={"red": {"from": 10, "to": 90, "count": 3}}).scales == {"red": [10.0, 30.0, 90.0]}


def test_independent_mode_tries_each_teacher_alone_and_lambda_with_all() -> None:
    tuning = tune_config(scales={"red": [10.0, 20.0], "blue": [5.0, 50.0]}, **{"lambda": [0.5, 1.0]})
    settings_ = scale_settings(tuning)
    assert [s.name for s in settings_] == ["red-10", "red-20", "blue-5", "blue-50"]
    base = BaseStudent(tuning)
    alone = base.trial_config(Trial(settings_[3], 7))
    assert (alone.data.teachers, alone.loss.logit_scales, alone.loss.lambda_) == (["blue"], {"blue": 50.0}, 0.7)
    assert (alone.seed, alone.output) == (7, "tuning/trials/blue-50_seed-7")
    later = lambda_settings(tuning, {"red": 20.0, "blue": 5.0})
    both = base.trial_config(Trial(later[0], 0))
    assert (both.data.teachers, both.loss.lambda_) == (["red", "blue"], 0.5)
    assert both.loss.logit_scales == {"red": 20.0, "blue": 5.0}


def test_joint_mode_tries_every_combination_or_a_sample() -> None:
    keys: dict[str, Any] = {"mode": "joint", "scales": {"red": [10.0, 20.0], "blue": [5.0, 50.0]}, "lambda": [0.5, 1.0]}
    every = scale_settings(tune_config(**keys))
    assert len({setting.name for setting in every}) == 8
    assert Setting("joint", {"red": 20.0, "blue": 5.0}, 1.0) in every
    some = scale_settings(tune_config(**keys, sample=3))
    assert some == scale_settings(tune_config(**keys, sample=3))
    assert len(some) == 3
    assert set(some) < set(every)


def test_trial_keys_replace_those_of_the_student_and_leave_it_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "student.yaml"
    path.write_text(yaml.safe_dump(STUDENT))
    base = BaseStudent(tune_config(student=str(path), trial={"train": {"steps": 100}}))
    assert (base.short.train.steps, base.short.train.epochs, base.short.train.batch) == (100, None, 64)
    assert base.short.train.optimizer.warmup == 10
    assert base.full.train.epochs == 3
    with pytest.raises(UserError, match=r"trial\.seed: set for each trial by the tuning"):
        BaseStudent(tune_config(trial={"seed": 3}))
    with pytest.raises(UserError, match=r"(?s)with the keys of `trial`.*known keys here"):
        BaseStudent(tune_config(trial={"train": {"stepps": 100}}))


def test_demo_tuning_config_matches_its_student(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    tuning = load_tune_config("configs/tune-demo.yaml")
    base = BaseStudent(tuning)
    assert set(tuning.scales) == set(base.full.data.teachers or [])
    assert tuning.metric in base.short.evaluate.metrics
    assert base.short.train.steps is not None
    assert list(base.short.evaluate.zero_shot) == ["held-out"]  # none of the demo's tests
    assert not base.short.evaluate.retrieval
    assert (base.short.evaluate.every or 0) < base.short.train.steps


def raw_student(url: str, loss: dict[str, Any] | None = None) -> dict[str, Any]:
    """A student's config as a user writes it."""
    return {
        "output": "before",
        "student": {"model": "MobileCLIP2-S0"},
        "data": {"datasets": url, "teachers": ["red", "blue", "x"], "captioners": {"coca": 2.0}},
        **({} if loss is None else {"loss": loss}),
        "train": {"epochs": 8, "batch": 128, "optimizer": {"lr": 1e-3}},
    }


@pytest.mark.parametrize("loss", [None, {"lambda": 0.7, "logit_scales": {"red": 10.0, "x": 5.0}, "features": "all"}])
def test_written_config_differs_in_scales_and_lambda_and_states_their_origins(
    tmp_path: Path, loss: dict[str, Any] | None
) -> None:
    best = {"red": 43.0, LAMBDA: 0.5}
    origins = {
        "red": "reinforce tune: best at 43 (0.6), # plateau",
        "blue": "unchanged: 30, dataset: model",
        LAMBDA: "best",
    }
    path = tmp_path / "student.yaml"
    path.write_text(
        render_student_yaml(raw_student("data", loss), best, origins, "runs/tuning/student", "Written by a test.")
    )
    text = path.read_text()
    written = load_student_config(path)
    before = settings.parse(StudentConfig, raw_student("data", loss))
    assert written.loss.logit_scales == {**before.loss.logit_scales, "red": 43.0}
    assert (written.loss.lambda_, written.loss.features) == (0.5, before.loss.features)
    assert written.output == "runs/tuning/student"
    assert written.model_copy(update={"output": "before", "loss": before.loss}) == before
    assert text.startswith("# Written by a test.\n")
    lines = [line.strip() for line in text.splitlines()]
    assert lines[lines.index("red: 43.0") - 1] == "# reinforce tune: best at 43 (0.6), # plateau"
    assert "# blue: unchanged: 30, dataset: model" in lines
    assert yaml.safe_load(text)["data"] == json.loads(json.dumps(raw_student("data")["data"]))
