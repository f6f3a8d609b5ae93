"""The config and the job of a student. Trainings as users start them are in tests/integration/test_train.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from reinforce import settings
from reinforce.errors import UserError
from reinforce.student.config import Data, Loss, StudentConfig
from reinforce.student.train import make_job
from reinforce.training.config import describe_changes
from teachers.open_clip.catalog import DEFAULT_PREPROCESS


def test_datasets_are_urls_or_sections_and_captioners_names_or_weights() -> None:
    for datasets in ("a", ["a"], {"url": "a"}, [{"url": "a"}]):
        data = settings.parse(Data, {"datasets": datasets})
        assert [(source.url, source.weight) for source in data.datasets] == [("a", 1.0)]
    for captioners, weights in ((["a", "b"], {"a": 1.0, "b": 1.0}), ({"a": 3}, {"a": 3.0}), ([], {}), (None, None)):
        assert settings.parse(Data, {"datasets": "a", "captioners": captioners}).captioners == weights


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"targets": "online"}, "targets `online` needs `teachers`"),
        ({"teachers": {"a": {"model": "ViT-B-32"}}}, "`teachers` needs `targets: online`"),
        ({"logit_biases": {"a": -10.0}}, "`logit_biases` needs `form: sigmoid`"),
        ({"learn_scales": True, "form": "sigmoid"}, "learn_scales` needs `form: softmax`"),
        ({"learn_scales": True, "lambda": 0.0}, "a lambda above 0"),
        ({"lambda": 1.5}, "less than or equal to 1"),
        ({"lamda": 0.5}, "unknown key"),
    ],
)
def test_losses_that_contradict_themselves_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings.parse(Loss, keys)


def test_a_config_needs_an_output_a_student_data_and_a_length() -> None:
    with pytest.raises(UserError, match=r"(?s)output: .*student: .*data: .*train: "):
        settings.parse(StudentConfig, {})


CONFIG: dict[str, Any] = {
    "output": "out",
    "seed": 7,
    "student": {"model": "MobileCLIP2-S0"},
    "data": {"datasets": "a", "workers": 3},
    "train": {"steps": 5},
    "evaluate": {"every": 2},
}


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
    job = make_job(settings.parse(StudentConfig, CONFIG))
    assert (job.output, job.seed, job.evaluate_every, job.export) == ("out", 7, 2, "student")
    fixed = job.fixed_config
    assert {"seed", "student.model", "data.window", "data.streams", "loss.lambda", "train.batch"} <= fixed.keys()
    mutable = {"output", "data.workers", "data.prefetch", "train.steps", "train.compute.ranks"}
    assert not mutable & fixed.keys()
    assert not any(key.startswith("evaluate") for key in fixed)


def test_a_training_that_began_before_preprocessing_was_stated_resumes_with_what_it_had() -> None:
    def changes(**keys: Any) -> list[str]:
        stated = {**CONFIG, "student": {**CONFIG["student"], "preprocess": keys}}
        before, now = (make_job(settings.parse(StudentConfig, config)) for config in (CONFIG, stated))
        return describe_changes(before.fixed_config, now.fixed_config)

    assert changes(**DEFAULT_PREPROCESS) == []
    assert changes(**{**DEFAULT_PREPROCESS, "interpolation": "bilinear"}) == [
        "student.preprocess.interpolation: not set before, 'bilinear' now"
    ]
