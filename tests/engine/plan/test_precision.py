"""``precision: auto`` is resolved before fingerprints, and finished datasets keep theirs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from reinforce.config import parse_config
from reinforce.engine.plan.plan import Plan, make_plan
from reinforce.engine.plan.recipe import build_layers, describe_models
from reinforce.nodes import nodes_of_run
from reinforce.student.config import StudentConfig
from reinforce.student.train import make_job
from teachers.device.accelerator import Accelerator
from tests.helpers.commands import printed_by
from tests.helpers.data import config_of
from tests.helpers.reinforced import reinforce_here
from tests.helpers.tiny_coca import coca_model
from tests.helpers.tiny_models import open_clip_model

TEACHER = "embeddings/vit/images"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The sections of a config with an open model of each kind and a class, without any precision."""
    folder = tmp_path_factory.mktemp("models")
    red = config_of("x.tar", "y")["teachers"]["red"]
    return {
        "teachers": {"vit": {"model": open_clip_model(folder / "vit")}, "red": red},
        "captioners": {"coca": {"model": coca_model(folder / "coca"), "captions": 1, "max_length": 10}},
    }


def planned(config: dict[str, Any], gpus: float | None = None, nodes: Any = nodes_of_run) -> Plan:
    return make_plan(parse_config({**config, "workers": {"gpus": gpus}}), nodes=nodes)


def precisions(plan: Plan) -> dict[str, str]:
    return {name: spec.precision for name, spec in (*plan.config.teachers.items(), *plan.config.captioners.items())}


def of_explicit(config: dict[str, Any], precision: str) -> dict[str, str]:
    """The fingerprints that the models have in an explicit precision."""
    explicit = json.loads(json.dumps(config))
    for spec in (explicit["teachers"]["vit"], explicit["captioners"]["coca"]):
        spec["precision"] = precision
    parsed = parse_config(explicit)
    return {name: layer.fingerprint for name, layer in build_layers(parsed, describe_models(parsed)).items()}


@pytest.mark.parametrize(
    ("gpus", "nodes", "precision", "reason"),
    [
        (0, [{"GPU": 8}], "fp32", "workers use CPUs"),
        (0.5, [], "bf16", "workers use GPUs"),
        (None, [{"CPU": 4}], "fp32", "workers use CPUs"),
        (None, [{"CPU": 4}, {"CPU": 4, "GPU": 8}], "bf16", "workers use GPUs"),
    ],
)
def test_a_new_dataset_is_made_in_bf16_where_workers_use_gpus(
    shards: Callable[..., str], tmp_path: Path, models: Any, gpus: Any, nodes: Any, precision: str, reason: str
) -> None:
    config = config_of(shards(2), tmp_path / "out", **models)
    plan = planned(config, gpus, lambda: nodes)
    assert precisions(plan) == {"vit": precision, "coca": precision, "red": "auto"}
    assert {name: layer.fingerprint for name, layer in plan.layers.items()} == of_explicit(config, precision)
    assert plan.notes == [f"precision: {precision} for coca, vit (auto: {reason})"]
    config["teachers"] = {"vit": {**models["teachers"]["vit"], "precision": "tf32"}}
    assert precisions(planned(config, gpus, lambda: nodes))["vit"] == "tf32", "an explicit precision stays"


def test_a_dataset_that_was_made_in_fp32_stays_complete_on_gpus(
    shards: Callable[..., str], tmp_path: Path, models: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(shards(2), tmp_path / "out", teachers=models["teachers"], captioners={})
    reinforce_here(config)
    plan = planned(config, gpus=1)
    assert not plan.pending
    assert plan.notes == ["precision: fp32 for vit (auto: as dataset.json records)"]
    config["teachers"] = {**config["teachers"], "new": models["teachers"]["vit"]}
    plan = planned(config, gpus=1)
    assert precisions(plan) == {"vit": "fp32", "red": "auto", "new": "bf16"}
    [shard] = plan.pending
    assert shard.layers == ("embeddings/new/images", "embeddings/new/caption")

    path = tmp_path / "my.yaml"
    path.write_text(json.dumps({**config, "workers": {"gpus": 1}}))
    shown = printed_by(capsys, "plan", str(path))
    assert "precision: bf16 for new (auto: workers use GPUs)" in shown
    assert "precision: fp32 for vit (auto: as dataset.json records)" in shown


def test_an_accelerator_without_bf16_is_reported_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    with pytest.raises(ValueError, match=r"Tesla T4 has no bf16: set `precision` of this model to fp16 or fp32"):
        Accelerator("cuda", "bf16")


def test_online_teachers_of_a_student_stay_in_fp32_so_that_its_checkpoints_fit(tmp_path: Path, models: Any) -> None:
    teacher = models["teachers"]["vit"]
    data = {
        "output": str(tmp_path / "out"),
        "data": {"datasets": "my-data"},
        "student": {"model": "ViT-B-32"},
        "loss": {"targets": "online", "teachers": {"vit": teacher}},
        "train": {"steps": 2000},
    }
    assert make_job(StudentConfig.model_validate(data)).fixed_config["loss.teachers.vit.precision"] == "fp32"
    data["loss"] = {"targets": "online", "teachers": {"vit": {**teacher, "precision": "auto"}}}
    with pytest.raises(ValueError, match=r"`precision: auto` is for `reinforce run`"):
        StudentConfig.model_validate(data)
