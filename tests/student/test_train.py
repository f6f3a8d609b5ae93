"""The job of a student config. Trainings as users start them are in tests/integration/test_train.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from reinforce import settings
from reinforce.errors import UserError
from reinforce.student.config import StudentConfig
from reinforce.student.train import make_job, train

CONFIG: dict[str, Any] = {
    "output": "out",
    "seed": 7,
    "student": {"model": "MobileCLIP2-S0"},
    "data": {"datasets": "a", "workers": 3},
    "train": {"steps": 5},
    "evaluate": {"every": 2},
}


def test_the_job_has_the_output_the_seed_and_the_evaluation_of_the_config() -> None:
    job = make_job(settings.parse(StudentConfig, CONFIG))
    assert (job.output, job.seed, job.evaluate_every, job.export) == ("out", 7, 2, "student")


def test_the_job_has_the_config_of_a_model_in_a_folder(tmp_path: Path) -> None:
    settings_of_model = {"model_cfg": {"vision_cfg": {"image_size": 48}}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(settings_of_model))
    name = f"local-dir:{tmp_path}"
    config = settings.parse(StudentConfig, {**CONFIG, "student": {"model": name}})
    assert make_job(config).model_config == {f"{name}/open_clip_config.json: model_cfg.vision_cfg.image_size": 48}
    (tmp_path / "open_clip_config.json").unlink()
    assert make_job(config).model_config is None
    assert make_job(settings.parse(StudentConfig, CONFIG)).model_config is None


def test_keys_that_change_what_is_learnt_may_not_change_on_resume() -> None:
    fixed = make_job(settings.parse(StudentConfig, CONFIG)).fixed_config
    assert {"seed", "student.model", "data.window", "data.streams", "loss.lambda", "train.batch"} <= fixed.keys()
    mutable = {"output", "data.workers", "data.prefetch", "train.steps", "train.compute.ranks"}
    assert not mutable & fixed.keys()
    assert not any(key.startswith("evaluate") for key in fixed)


def test_a_wrong_config_is_refused_as_a_dict_too() -> None:
    with pytest.raises(UserError, match=r"train\.stepz: unknown key"):
        train({**CONFIG, "train": {"stepz": 5}})
