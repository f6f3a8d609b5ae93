"""The search space: settings, and the student config of each trial."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from reinforce.errors import UserError
from reinforce.tuning.config import load_tune_config
from reinforce.tuning.space import BaseStudent, Setting, Trial, lambda_settings, scale_settings
from tests.helpers.tuning import STUDENT, tune_config


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
