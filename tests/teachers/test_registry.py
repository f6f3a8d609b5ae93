"""Loading of models from their specs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from teachers.registry import (
    captioner_spec,
    describe_captioner,
    describe_teacher,
    load_captioner,
    load_teacher,
    teacher_spec,
)
from teachers.spec import CaptionerSpec, TeacherSpec
from tests.helpers import tiny_models

CUSTOM = "tests.helpers.custom_models"


def _custom_teacher(name: str, **spec: Any) -> TeacherSpec:
    return teacher_spec(**{"class": f"{CUSTOM}:{name}", **spec})


def _custom_captioner(name: str = "Writer", **spec: Any) -> CaptionerSpec:
    return captioner_spec(**{"class": f"{CUSTOM}:{name}", **spec})


def test_a_custom_class_is_built_with_the_device_and_its_options() -> None:
    spec = _custom_teacher("Radiology", options={"weights": "here", "scale": 2.0})
    teacher: Any = load_teacher("ours", spec, "cpu")
    assert (teacher.device, teacher.weights, teacher.scale) == (torch.device("cpu"), "here", 2.0)
    assert teacher.logit_scale == 50
    info = describe_teacher("ours", spec)
    assert (info.dim, info.images, info.texts) == (4, True, True)
    assert info.identity == {"class": f"{CUSTOM}:Radiology", "options": {"weights": "here", "scale": 2.0}, "version": 3}


def test_the_configs_logit_scale_overrides_the_class_and_is_not_in_the_identity() -> None:
    plain = _custom_teacher("Radiology", options={"weights": "here"})
    scaled = _custom_teacher("Radiology", options={"weights": "here"}, logit_scale=70.0, dtype="int8")
    assert load_teacher("ours", scaled, "cpu").logit_scale == 70
    assert describe_teacher("ours", scaled) == describe_teacher("ours", plain)


def test_a_class_with_one_encoder_is_supported() -> None:
    info = describe_teacher("texts", _custom_teacher("TextsOnly"))
    assert (info.dim, info.images, info.texts) == (None, False, True)
    teacher = load_teacher("texts", _custom_teacher("TextsOnly"), "cpu")
    assert (teacher.image, teacher.logit_scale, teacher.dim) == (None, None, 4)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (_custom_teacher("NoDim", options={"weights": "w"}), "must set `dim`, the length of its embeddings, got None"),
        (_custom_teacher("NoImage"), "has `encode_images` and must set `image` to a teachers.protocols.ImageSpec"),
        (_custom_teacher("WrongImage"), "`image` must be a teachers.protocols.ImageSpec, got 224"),
    ],
)
def test_missing_attributes_of_a_class_are_named(spec: TeacherSpec, message: str) -> None:
    with pytest.raises(ValueError, match=f"teacher mine: .*{message}"):
        load_teacher("mine", spec, "cpu")


def test_errors_of_custom_code_name_the_teacher() -> None:
    with pytest.raises(RuntimeError, match="teacher mine: KeyError: 'lost'") as caught:
        load_teacher("mine", _custom_teacher("Fails"), "cpu")
    assert isinstance(caught.value.__cause__, KeyError)


def test_an_unavailable_device_error_names_the_teacher() -> None:
    with pytest.raises(ValueError, match="teacher mine: device 'cuda:64' is not available"):
        load_teacher("mine", _custom_teacher("TextsOnly"), "cuda:64")


@pytest.mark.parametrize("kind", ["clip", "dinov2", "bert"])
def test_a_transformers_folder_loads_as_described(tmp_path: Path, kind: str) -> None:
    model = getattr(tiny_models, f"transformers_{kind}")(tmp_path / kind)
    spec = teacher_spec(family="transformers", model=model)
    info, teacher = describe_teacher("t", spec), load_teacher("t", spec, "cpu")
    assert info.dim == teacher.dim
    assert info.images == hasattr(teacher, "encode_images")
    assert info.texts == hasattr(teacher, "encode_texts")
    shutil.copytree(tmp_path / kind, tmp_path / "moved")
    assert describe_teacher("t", teacher_spec(family="transformers", model=str(tmp_path / "moved"))) == info


def test_a_custom_captioner_gets_its_number_of_captions() -> None:
    captioner = load_captioner("mine", _custom_captioner(captions=3), "cpu")
    assert captioner.captions == 3
    assert describe_captioner("mine", _custom_captioner(captions=3)).identity["captions"] == 3
    with pytest.raises(
        ValueError, match=r"captioner mine: .* gives 2 captions an image .* `captions: 5`: make them equal"
    ):
        load_captioner("mine", _custom_captioner(options={"captions": 2}), "cpu")
