"""Fingerprints: what changes them, what does not, and ``precision: auto``, which is resolved before."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from reinforce.config import load_config, parse_config
from reinforce.engine.plan.plan import Plan, build_layers, describe_models, make_plan, version_notes
from reinforce.errors import UserError
from reinforce.processes.parallel import nodes_of_run
from reinforce.source.config import Limits
from reinforce.source.urls import expand
from reinforce.student.config import StudentConfig
from reinforce.student.train import student_job
from teachers.runtime.accelerator import Accelerator
from tests.helpers.commands import printed_by
from tests.helpers.data import config_of
from tests.helpers.models.tiny_coca import coca_model
from tests.helpers.models.tiny_models import open_clip_model
from tests.helpers.reinforced import reinforce_here

ROOT = Path(__file__).parents[3]


def layers_for(**changes: Any) -> dict[str, str]:
    config = parse_config(config_of("x/{0..1}.tar", "out", **changes))
    return {name: layer.fingerprint for name, layer in build_layers(config, describe_models(config)).items()}


def test_fingerprints_cover_the_input_but_for_where_its_files_are() -> None:
    def samples(**spec: Any) -> str:
        config = parse_config({"source": "x.tar", "output": "out", "input": spec})
        return build_layers(config, {})["samples"].fingerprint

    assert samples() == "dcf813d5e870e3d7", "the fingerprint of every dataset made with the defaults"
    assert samples(limits="standard") == samples(format="parquet") == samples()
    limits = [{"limits": limits} for limits in ("wide", Limits(members=65), Limits(key_chars=10))]
    others = [*limits, {"image": "jpg"}, {"key": "id"}, {"rows_per_shard": 4}]
    assert len({samples(), *(samples(**spec) for spec in others)}) == 7


def test_teachers_with_one_side_have_that_sides_layers_only() -> None:
    teachers = {"eye": {"class": "tests.helpers.models:ImageOnly"}, "ear": {"class": "tests.helpers.models:TextOnly"}}
    layers = {name for name in layers_for(teachers=teachers) if name.startswith("embeddings/")}
    assert layers == {"embeddings/eye/images", "embeddings/ear/caption", "embeddings/ear/namer"}
    for name, missing in (("eye", "texts"), ("ear", "images")):
        with pytest.raises(UserError, match=rf"scores\.fit: teacher {name} encodes no {missing}\. Name one that does"):
            layers_for(teachers=teachers, scores={"fit": {"similarity": name}})


def test_images_alone_have_the_rows_of_no_captions_and_no_layer_of_captions_of_the_source() -> None:
    none, without = (layers_for(input={"captions": captions}) for captions in ("none", []))
    assert none == {name: found for name, found in without.items() if not name.endswith("/caption")}
    assert without.keys() - none.keys() == {"embeddings/red/caption", "embeddings/blue/caption"}
    assert "embeddings/red/namer" in none, "a captioner's captions are encoded"


_ALONE = r": it needs captions of the source, and input.captions is none. Remove it, or set input.captions to where"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"teachers": {"ear": {"class": "tests.helpers.models:TextOnly"}}, "captioners": {}},
            rf"teachers\.ear{_ALONE}",
        ),
        ({"scores": {"fit": {"similarity": "red"}}}, rf"scores\.fit{_ALONE}"),
        ({"scores": {"long": {"facts": ["width", "words"]}}}, rf"scores\.long{_ALONE}"),
        ({"scores": {"own": {"class": "tests.helpers.models.scorers:Described"}}}, rf"scores\.own{_ALONE}"),
        (
            {"input": {"captions": "none", "templates": ["a {}."]}},
            "`templates` is for captions, and with `captions: none`",
        ),
        ({"input": {"captions": "none", "captions_per_sample": 2}}, "`captions_per_sample` is for captions"),
        (
            {"input": {"captions": "txt"}},
            r"has 1 error:\n  input.captions: must be a list such .*, or none",
        ),
    ],
)
def test_captions_that_are_asked_of_images_alone_are_one_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        layers_for(**{"input": {"captions": "none"}, **changes})


def test_a_change_reaches_the_layers_that_depend_on_it_and_no_others() -> None:
    before, config = layers_for(), config_of("x/{0..1}.tar", "out")
    config["teachers"]["red"]["logit_scale"] = 99.0
    same = layers_for(teachers=config["teachers"], workers={"cpus": 4, "batch": 3, "recycle": 2})
    assert same == before, "no stored value changes"
    config["captioners"]["namer"] |= {"captions": 3, "options": {"captions": 3}}
    changed = {n for n, f in layers_for(captioners=config["captioners"]).items() if before[n] != f}
    assert changed == {"captions/namer", "embeddings/red/namer", "embeddings/blue/namer"}
    assert all(before[name] != fingerprint for name, fingerprint in layers_for(seed=1).items())
    config["teachers"]["blue"]["codec"] = "float32"
    changed = {n for n, f in layers_for(teachers=config["teachers"]).items() if before[n] != f}
    assert changed == {"embeddings/blue/images", "embeddings/blue/caption", "embeddings/blue/namer"}


def test_the_config_for_datacompdr_has_the_layers_of_its_dataset_card() -> None:
    config = load_config(ROOT / "configs/datacompdr12m.yaml")
    layers = build_layers(config, describe_models(config))
    assert [(name, layer.count, layer.dim) for name, layer in layers.items() if layer.published] == [
        ("captions/coca", 5, None),
        *(
            (f"embeddings/{teacher}/{what}", count, 768)
            for teacher in ("openai", "datacomp-xl")
            for what, count in (("images", 30), ("caption", 1), ("coca", 5))
        ),
    ]
    assert len(expand(str(config.reinforcements))) == len(expand(config.source)) == 1024


def test_each_class_without_a_version_is_named_once() -> None:
    custom = "tests.helpers.models.custom_models"
    teachers = {name: {"class": f"{custom}:TextsOnly"} for name in ("one", "two")}
    teachers["versioned"] = {"class": f"{custom}:Radiology", "options": {"weights": "w"}}  # type: ignore[dict-item]
    config = parse_config(config_of("x.tar", "out", teachers=teachers))
    notes = version_notes(info.identity for info in describe_models(config).values())
    assert [note.partition(",")[0] for note in notes] == [
        f"class {custom}:TextsOnly has no `version`",
        "class tests.helpers.models:SeedCaptioner has no `version`",
    ]
    assert "part of the fingerprint" in notes[0]


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
        "loss": {"teachers": {"vit": teacher}},
        "train": {"steps": 2000},
    }
    assert student_job(StudentConfig.model_validate(data)).fixed_config["loss.teachers.vit.precision"] == "fp32"
    data["loss"] = {"teachers": {"vit": {**teacher, "precision": "auto"}}}
    with pytest.raises(ValueError, match=r"`precision: auto` is for `reinforce run`"):
        StudentConfig.model_validate(data)
