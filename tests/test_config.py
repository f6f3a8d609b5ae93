"""Configs: errors name the key, however deeply its section is nested, and the fix."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import BeforeValidator, Field

from reinforce import settings
from reinforce.config import Workers, load_config, parse_config
from reinforce.errors import UserError
from reinforce.evaluation.command import EvaluationCommand
from reinforce.settings import Section, flatten
from reinforce.student.config import Data, Loss, StudentConfig
from reinforce.training.config import Training, describe_changes, fixed_config
from reinforce.tuning.adapt_config import AdaptConfig
from reinforce_docs import keys
from tests.helpers.pages import ROOT

MINIMAL = {"source": "shards/{0..3}.tar", "output": "out"}


def test_the_default_augmentations_are_those_of_datacompdr() -> None:
    config = parse_config(MINIMAL)
    policy = config.augmentations
    augment = policy.rand_augment
    assert (policy.size, policy.scale, augment.ops, augment.magnitude) == (224, (0.08, 1.0), 2, 9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bogus": 1}, "bogus: unknown key; known keys here: source, output"),
        ({"workers": {"cpu": 2}}, "workers.cpu: unknown key; known keys here: min, max, gpus, cpus"),
        (
            {"teachers": {"t": {"model": "m", "scale": 3}}},
            "teachers.t.scale: unknown key; known keys here: family, model",
        ),
        ({"input": {"limits": {"pixels": 1}}}, "input.limits: must be standard or wide, got {'pixels': 1}"),
        ({"augmentations": {"count": "3"}}, "augmentations.count: Input should be a valid integer, got '3'"),
        ({"augmentations": {"scale": [0.5, 2.0]}}, "augmentations: scale: a crop cannot be larger than the image"),
        ({"workers": {"min": 9, "max": 2}}, "min (9) is above max (2)"),
        ({"teachers": {"images": {"model": "m"}}}, "'images' cannot name a layer"),
        ({"captioners": {"a/b": {"model": "m"}}}, "'a/b' cannot name a layer"),
        ({"teachers": {"t": {}}}, "set either `model`"),
        ({"teachers": {"t": {"class": "nocolon"}}}, "`class` must be package.module:Class"),
        ({"captioners": {"c": {"model": "m", "min_length": 30}}}, "max_length must be at least min_length + 2"),
        ({"images": "link"}, "images: Input should be 'embed' or 'reference', got 'link'"),
    ],
)
def test_an_error_names_the_key_and_the_fix(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_config({**MINIMAL, **changes})
    assert message in str(caught.value)


def test_overrides_are_yaml_values_of_nested_keys_and_rates_need_no_point(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("source: a.tar\noutput: out\nworkers: {cpus: 1}\n")
    config = load_config(path, ["workers.cpus=4", "teachers.t.model=ViT-B-32", "augmentations.scale=[0.5, 1.0]"])
    assert (config.workers.cpus, config.teachers["t"].model, config.augmentations.scale) == (4, "ViT-B-32", (0.5, 1.0))
    path.write_text("{output: o, student: {model: m}, data: {datasets: d}, train: {steps: 1, optimizer: {lr: 1e-5}}}")
    optimizer = settings.load(StudentConfig, path, ["train.optimizer.final_lr=1e-6"]).train.optimizer
    assert (optimizer.lr, optimizer.final_lr) == (1e-5, 1e-6)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-5", 1e-5), ("-2E3", -2000.0), ("1.e+2", 100.0), (".5e1", 5.0), ("1.0e-5", 1e-5), ("'1e-5'", "1e-5"),
     ("1e5a", "1e5a"), ("e5", "e5"), ("12e3456", "12e3456"), ("0x1e5", 0x1E5)],
)  # fmt: skip
def test_a_number_with_an_exponent_needs_no_point(text: str, value: Any) -> None:
    found = settings.load_yaml(f"key: {text}")["key"]
    assert (found, type(found)) == (value, type(value))


def test_a_file_that_is_not_a_config_and_a_malformed_override_are_user_errors(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    with pytest.raises(UserError, match="Give the path of a YAML file"):
        load_config(path)
    for text in ("- a list", "a: [", ""):
        path.write_text(text)
        with pytest.raises(UserError, match=str(path)):
            load_config(path)
    path.write_text("source: a.tar\noutput: out\n")
    for override in ("workers", "=3", "source.x=1", "seed=[1"):
        with pytest.raises(UserError, match="--set"):
            load_config(path, [override])
    with pytest.raises(UserError, match="3 errors"):
        parse_config({"output": "x", "seed": "a", "bogus": 1})


@pytest.mark.parametrize(
    ("given", "nodes", "cpus", "gpus"),
    [
        ({}, [{"CPU": 16.0}], 1, 0),
        ({}, [{"CPU": 96.0, "GPU": 8.0}, {"CPU": 16.0}], 12, 1),
        ({"gpus": 0}, [{"CPU": 96.0, "GPU": 8.0}], 1, 0),
        ({"gpus": 0.5}, [{"CPU": 96.0, "GPU": 8.0}], 6, 0.5),
        ({"cpus": 4}, [{"CPU": 96.0, "GPU": 8.0}], 4, 1),
        ({"gpus": 1, "cpus": 3}, [], 3, 1),
        ({}, [], 1, 0),
    ],
)
def test_numbers_of_workers_that_are_left_open_suit_the_nodes(
    given: dict[str, float], nodes: list[dict[str, float]], cpus: int, gpus: float
) -> None:
    workers = Workers.model_validate(given).fitted_to(nodes)
    assert (workers.cpus, workers.cores, workers.gpus) == (cpus, cpus, gpus)
    if nodes and nodes[0].get("GPU"):  # without models, only if it is given
        assert Workers().fitted_to(nodes, models=False).describe() == "1 CPU"
        assert Workers(gpus=1).fitted_to(nodes, models=False).describe() == "12 CPUs and 1 GPU"


class Leaf(Section):
    size: int = 1
    lambda_: float = Field(1.0, alias="lambda")


class Root(Section):
    name: str
    one: Leaf = Leaf()
    many: list[Leaf] = Field(default_factory=list)
    named: dict[str, Leaf] = Field(default_factory=dict)
    maybe: Leaf | None = None
    either: str | list[str] = "a"
    wrapped: Annotated[list[Leaf], BeforeValidator(lambda v: v if isinstance(v, list) else [v])] = Field(
        default_factory=list
    )


def test_errors_name_keys_and_indices_at_any_depth_and_the_known_keys() -> None:
    places: list[tuple[dict[str, Any], str]] = [
        ({"one": {"sise": 2}}, "one.sise"),
        ({"maybe": {"sise": 2}}, "maybe.sise"),
        ({"many": [{}, {"sise": 2}]}, "many.1.sise"),
        ({"named": {"x": {"sise": 2}}}, "named.x.sise"),
        ({"wrapped": {"sise": 2}}, "wrapped.0.sise"),
    ]
    for data, place in places:
        with pytest.raises(UserError, match=f"{place}: unknown key; known keys here: size, lambda"):
            settings.parse(Root, {"name": "n", **data})
    with pytest.raises(UserError) as caught:
        settings.parse(Root, {"name": "n", "either": 3})
    assert all(line.strip().startswith("either:") for line in str(caught.value).splitlines()[1:])
    root = settings.parse(Root, {"name": "n", "one": {"lambda": 0.5}})
    assert root.one.lambda_ == 0.5
    with pytest.raises(ValueError, match="frozen"):
        root.one.size = 3


def test_flatten_yields_dotted_keys_and_keeps_empty_mappings() -> None:
    assert dict(flatten({"a": {"b": {"c": 1}, "d": [2]}, "e": {}})) == {"a.b.c": 1, "a.d": [2], "e": {}}


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "train.optimizer.max_grad_norm=1",
            "max_grad_norm: unknown key; max_grad_norm of Hugging Face is `train.optimizer.grad_clip_norm` here",
        ),
        ("warmup_steps=5", "warmup_steps: unknown key; .* is `train.optimizer.warmup` here: in steps"),
        ("train.learning_rate=5", "train.learning_rate: unknown key; .* is `train.optimizer.lr` here"),
        ("train.grad-clip-norm=5", "train.grad-clip-norm: unknown key; grad_clip_norm of open_clip is"),
        ("data.accum_freq=5", "is `train.compute.accumulate` here: it divides `train.batch` and does not multiply it"),
        ("student.lock_image=true", r"is `student.freeze` here: a list: \[image\]"),
        ("train.precision=amp_bf16", r"`train.compute.precision` here: fp32, bf16 \(for amp_bf16\) or auto"),
        ("batch_size=8", "is `train.batch` here: samples of a step of all ranks"),
        ("evaluate.batch_size=8", "is `evaluate.batch` here"),
        ("evaluate.segmentation.a.lr=8", "is `evaluate.segmentation.NAME.learning_rate` here"),
        ("resume=latest", "resume: unknown key; resume of open_clip: the same command again"),
        ("train.optimizer={clip: 1.0}", "train.optimizer.clip: unknown key; known keys here: "),
        ("evaluate.segmentation.a={images: x, dropout: 0.2}", "dropout: unknown key; known keys here: "),
        ("train.beams=3", "train.beams: unknown key; known keys here: steps"),
        ("num_beams=3", "num_beams: unknown key; known keys here: output"),
    ],
)
def test_a_name_of_another_library_is_answered_with_the_key_here(override: str, line: str) -> None:
    config = {"output": "o", "student": {"model": "m"}, "data": {"datasets": "d"}, "train": {"steps": 3}}
    settings.apply_override(config, override)
    for given in ((config, {}), (None, config)):
        with pytest.raises(UserError, match=line):
            settings.as_config(StudentConfig, given[0], **given[1])


def test_names_of_other_libraries_are_found_in_sections_alone_and_in_runs() -> None:
    adapting = {"source": "s", "output": "o", "released": {"model": "m"}}
    for section, given, key in (
        (Training, {"steps": 3, "lr": 1e-3}, "optimizer.lr"),
        (Training, {"max_steps": 3}, "steps"),
        (Data, {"datasets": "d", "teacher": "t"}, "teachers"),
        (Loss, {"siglip": True}, "form"),
        (EvaluationCommand, {"batch_size": 8}, "batch"),
        (AdaptConfig, {**adapting, "lr": 1e-3}, "student.train.optimizer.lr"),
        (AdaptConfig, {**adapting, "num_beams": 3}, "run.captioners.NAME.beams"),
        (AdaptConfig, {**adapting, "out": "a"}, "output"),
    ):
        with pytest.raises(UserError, match=f"unknown key; .* is `{re.escape(key)}` here"):
            settings.parse(section, given)
    with pytest.raises(UserError) as caught:
        parse_config(
            {**MINIMAL, "batch_size": 3, "captioners": {"c": {"model": "m", "num_beams": 3}}, "train_data": "a"}
        )
    for line in ("`workers.batch` here", "`captioners.NAME.beams` here", "train_data of open_clip is `source` here"):
        assert line in str(caught.value)


def test_the_page_of_names_has_every_name_beside_its_key_and_every_key_exists() -> None:
    rows = [line for line in (ROOT / "docs/names.md").read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    cells = [line.replace("-", "_").strip("| ").split(" | ") for line in rows]
    models = [model for model, _ in keys.CONFIGS.values()]
    for row in settings.names_elsewhere():
        assert None not in row.values(), row
        key = row["key"].split(".")
        assert not row["key"] or any(settings.has_key(model, key) for model in models), row
        of_name = [cell for cell in cells if re.search(rf"(?<!\w)(?:__)?{row['name']}(?!\w)", cell[0])]
        assert any(not row["key"] or re.search(rf"(?<!\w){key[-1]}(?!\w)", cell[-1]) for cell in of_name), row
    known = {row["name"] for row in settings.names_elsewhere()}
    flags = re.findall(r"`--([a-z0-9-]+)", "\n".join(rows))
    assert {flag.replace("-", "_") for flag in flags} <= known


def test_a_key_that_changes_is_named_as_in_the_config() -> None:
    config = settings.as_config(StudentConfig, {
        "output": "o", "student": {"model": "m"}, "data": {"datasets": "d"},
        "train": {"steps": 3, "optimizer": {"grad_clip_norm": 2.0}},
    })  # fmt: skip
    changed = settings.as_config(StudentConfig, config, train={"optimizer": {"grad_clip_norm": 3.0}})
    assert changed.train.optimizer.grad_clip_norm == 3.0
    assert describe_changes(*(fixed_config(one, ()) for one in (config, changed))) == [
        "train.optimizer.grad_clip_norm: 2.0 before, 3.0 now"
    ]
