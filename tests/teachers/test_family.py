"""Teachers and captioners that are classes of the user's."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import pytest
import torch

from teachers import protocols
from teachers.protocols import ImageSpec
from teachers.registry import describe_model, load_model, teacher_spec
from teachers.spec import TeacherSpec
from tests.helpers.specs import captioner_spec

MODULE = "tests.helpers.models.custom_models"
WEIGHTS = {"weights": "here"}
SPECS: dict[str, Any] = {"teacher": teacher_spec, "captioner": captioner_spec}


def custom(name: str, **spec: Any) -> TeacherSpec:
    return teacher_spec(class_=f"{MODULE}:{name}", **spec)


@pytest.mark.parametrize(
    ("role", "name", "spec", "message"),
    [
        ("teacher", "no.such.module:T", {}, r"no\.such\.module:T cannot be imported: ModuleNotFoundError.*PYTHONPATH"),
        ("teacher", "Absent", {}, r"custom_models\.py has no such name"),
        ("teacher", "SPEC", {}, "an? ImageSpec of that name, not a class"),
        ("teacher", "Neither", {}, "neither `encode_images` nor `encode_texts`"),
        ("teacher", "Radiology", {}, "missing a required argument: 'weights'.*signature is Radiology"),
        ("teacher", "Unplaced", {}, r"Unplaced\(\), and it is built with a torch\.device first: add `device` as"),
        ("teacher", "Weighed", {"options": WEIGHTS}, "add `device` as the first parameter of its `__init__`"),
        ("teacher", "TextsOnly", {"options": {"size": 3}}, "unexpected keyword argument 'size'"),
        ("teacher", "Radiology", {"options": {"weights": {1, 2}}}, "not JSON serializable; use numbers, strings"),
        ("teacher", "TextsOnly", {"precision": "bf16"}, "`precision` is not used with `class`"),
        ("teacher", "TextsOnly", {"compile": True}, "`compile` is not used with `class`"),
        ("captioner", "Radiology", {"options": WEIGHTS}, r"has no method `caption\(pixels, seeds\)`"),
        ("captioner", "Writer", {"top_p": 0.5}, "top_p: not used with `class`"),
        ("captioner", "Writer", {"prompt": "What?"}, "prompt: not used with `class`"),
    ],
)
def test_a_wrong_class_is_rejected_before_loading(role: str, name: str, spec: dict[str, Any], message: str) -> None:
    values = {"class_": name if ":" in name else f"{MODULE}:{name}", **spec}
    with pytest.raises(ValueError, match=f"{role} mine: .*(?:{message})"):
        describe_model("mine", SPECS[role](**values))


def test_a_class_with_one_encoder_or_both_is_built_with_the_device_and_its_options() -> None:
    spec = custom("Radiology", options={"weights": "here", "scale": 2.0})
    teacher: Any = load_model("ours", spec, "cpu")
    assert (teacher.device, teacher.weights, teacher.scale) == (torch.device("cpu"), "here", 2.0)
    assert teacher.logit_scale == 50
    info = describe_model("ours", spec)
    assert (info.dim, info.images, info.texts) == (4, True, True)
    assert info.identity == {"class": f"{MODULE}:Radiology", "options": {"weights": "here", "scale": 2.0}, "version": 3}
    scaled = custom("Radiology", options=WEIGHTS, logit_scale=70.0, codec="int8")
    assert load_model("ours", scaled, "cpu").logit_scale == 70
    assert describe_model("ours", scaled) == describe_model("ours", custom("Radiology", options=WEIGHTS))
    info = describe_model("texts", custom("TextsOnly"))
    assert (info.dim, info.images, info.texts) == (None, False, True)
    teacher = load_model("texts", custom("TextsOnly"), "cpu")
    assert (teacher.image, teacher.logit_scale, teacher.dim) == (None, None, 4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("NoDim", "must set `dim`, the length of its embeddings, got None"),
        ("NoImage", "has `encode_images` and must set `image` to a teachers.protocols.ImageSpec, got None"),
        ("WrongImage", "must set `image` to a teachers.protocols.ImageSpec, got 224"),
    ],
)
def test_missing_attributes_of_a_class_are_named(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"teacher mine: .*{message}"):
        load_model("mine", custom(name, options=WEIGHTS if name == "NoDim" else {}), "cpu")


def test_errors_of_the_class_and_of_the_device_name_the_teacher() -> None:
    with pytest.raises(RuntimeError, match="teacher mine: KeyError: 'lost'") as caught:
        load_model("mine", custom("Fails"), "cpu")
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(ValueError, match="teacher mine: device 'cuda:64' is not available"):
        load_model("mine", custom("TextsOnly"), "cuda:64")


def test_a_captioner_s_number_of_captions_is_the_config_s_or_its_own_and_they_may_not_differ() -> None:
    writer, two = {"class_": f"{MODULE}:Writer"}, {"class_": f"{MODULE}:TwoCaptions"}
    of_options = {**writer, "options": {"captions": 2}}
    for values, number in (({**writer, "captions": 3}, 3), (of_options, 2), (two, 2)):
        spec = captioner_spec(**values)
        assert describe_model("mine", spec).identity["captions"] == spec.count == number
        assert load_model("mine", spec, "cpu").captions == number
    assert captioner_spec(**writer).count == 5
    message = r"captioner mine: .* gives 2 captions an image, not 3: set `captions: 2` or change the class"
    for values in (two, of_options):
        with pytest.raises(ValueError, match=message):
            describe_model("mine", captioner_spec(**values, captions=3))
    with pytest.raises(ValueError, match=r"captioner mine: .* gives 4 captions an image, not 5: set `captions: 4`"):
        load_model("mine", captioner_spec(class_=f"{MODULE}:FourCaptions"), "cpu")  # which only its objects have


def test_the_documented_example_is_a_valid_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [line for line in str(protocols.__doc__).splitlines() if line.startswith("    ") or not line]
    module = ModuleType("documented_teacher")
    vars(module).update(ImageSpec=ImageSpec, Sequence=Sequence, torch=torch)
    exec(textwrap.dedent("\n".join(lines)), vars(module))
    monkeypatch.setitem(sys.modules, "documented_teacher", module)
    options = {"weights": "s3://bucket/rad.pt"}
    info = describe_model("ours", teacher_spec(class_="documented_teacher:Radiology", options=options))
    assert (info.dim, info.images, info.texts) == (512, True, True)
    assert info.identity == {"class": "documented_teacher:Radiology", "options": options, "version": 1}
