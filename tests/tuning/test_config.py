"""What a tuning's config may say, and what is tried by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from reinforce import settings
from reinforce.errors import UserError
from reinforce.tuning.config import TuneConfig, load_tune_config
from reinforce.tuning.space import Base, Setting, Trial, lambda_settings, scale_settings

STUDENT: dict[str, Any] = {
    "output": "out",
    "student": {"model": "MobileCLIP2-S0"},
    "data": {"datasets": "data", "teachers": ["red", "blue"]},
    "loss": {"lambda": 0.7, "logit_scales": {"red": 33.0}},
    "train": {"epochs": 3, "batch": 64, "optimizer": {"warmup": 10}},
    "evaluate": {"retrieval": {"own": {"pairs": "data"}}},
}


def config(**keys: Any) -> TuneConfig:
    plain = {"output": "tuning", "student": STUDENT, "scales": {"red": [10.0, 20.0]}}
    return settings.parse(TuneConfig, {**plain, **keys})


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"scales": {"red": [10.0]}}, "scales.red: with 10 alone there is nothing to compare"),
        ({"scales": {}, "lambda": [1.0]}, "lambda: with 1 alone there is nothing to compare"),
        ({"scales": {}}, "nothing to try"),
        ({"mode": "joint", "scales": {"red": [10.0], "blue": [20.0]}}, "nothing to try"),
        ({"scales": {"red": [10.0, 10.0, 20.0]}}, "scales.red: a value stands there twice"),
        ({"seeds": [1, 1]}, "seeds: a seed stands there twice"),
        ({"scales": {"red": [0.0, 10.0]}}, "greater than 0"),
        ({"scales": {"red": {"from": 10, "to": 90}}}, "want a list of values, or {from, to, count}"),
        ({"scales": {"red": {"from": -1, "to": 90, "count": 3}}}, "`from` and `to` must be numbers above 0"),
        ({"sample": 3}, "`sample` belongs to `mode: joint`"),
        ({"early_stopping": {"grase": 0.2}}, "known keys here: grace, reduction"),
    ],
)
def test_what_cannot_be_tuned_is_told(keys: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        config(**keys)


def test_a_grid_has_equal_ratios() -> None:
    assert config(scales={"red": {"from": 10, "to": 90, "count": 3}}).scales == {"red": [10.0, 30.0, 90.0]}


def test_each_teacher_is_tried_alone_and_lambda_with_all() -> None:
    tuning = config(scales={"red": [10.0, 20.0], "blue": [5.0, 50.0]}, **{"lambda": [0.5, 1.0]})
    settings_ = scale_settings(tuning)
    assert [s.name for s in settings_] == ["red-10", "red-20", "blue-5", "blue-50"]
    base = Base(tuning)
    alone = base.of(Trial(settings_[3], 7))
    assert (alone.data.teachers, alone.loss.logit_scales, alone.loss.lambda_) == (["blue"], {"blue": 50.0}, 0.7)
    assert (alone.seed, alone.output) == (7, "tuning/trials/blue-50_seed-7")
    later = lambda_settings(tuning, {"red": 20.0, "blue": 5.0})
    both = base.of(Trial(later[0], 0))
    assert (both.data.teachers, both.loss.lambda_) == (["red", "blue"], 0.5)
    assert both.loss.logit_scales == {"red": 20.0, "blue": 5.0}


def test_jointly_every_combination_is_tried_or_some_of_them() -> None:
    keys: dict[str, Any] = {"mode": "joint", "scales": {"red": [10.0, 20.0], "blue": [5.0, 50.0]}, "lambda": [0.5, 1.0]}
    every = scale_settings(config(**keys))
    assert len({setting.name for setting in every}) == 8
    assert Setting("joint", {"red": 20.0, "blue": 5.0}, 1.0) in every
    some = scale_settings(config(**keys, sample=3))
    assert some == scale_settings(config(**keys, sample=3))
    assert len(some) == 3
    assert set(some) < set(every)


def test_trials_are_as_long_as_they_are_told_and_the_student_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "student.yaml"
    path.write_text(yaml.safe_dump(STUDENT))
    base = Base(config(student=str(path), trial={"train": {"steps": 100}}))
    assert (base.short.train.steps, base.short.train.epochs, base.short.train.batch) == (100, None, 64)
    assert base.short.train.optimizer.warmup == 10
    assert base.whole.train.epochs == 3
    with pytest.raises(UserError, match=r"trial\.seed: each trial has its own"):
        Base(config(trial={"seed": 3}))
    with pytest.raises(UserError, match=r"(?s)with the keys of `trial`.*known keys here"):
        Base(config(trial={"train": {"stepps": 100}}))


def test_the_demos_tuning_fits_its_student(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    tuning = load_tune_config("configs/tune-demo.yaml")
    base = Base(tuning)
    assert set(tuning.scales) == set(base.whole.data.teachers or [])
    assert tuning.metric in base.short.evaluate.metrics
    assert base.short.train.steps is not None
    assert (base.short.evaluate.every or 0) < base.short.train.steps
