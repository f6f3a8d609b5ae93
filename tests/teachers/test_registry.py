from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from teachers.protocols import ImageSpec
from teachers.registry import describe_captioner, describe_teacher, load_captioner, load_teacher
from teachers.spec import CaptionerSpec, TeacherSpec
from tests.helpers import tiny_models

SPEC = ImageSpec(8, (0.5,) * 3, (0.5,) * 3)  # type: ignore[arg-type]
HERE = __name__


class Radiology:
    """A teacher of a user's own, as the documentation shows it."""

    dim = 4
    image = SPEC
    logit_scale = 50.0
    version = 3

    def __init__(self, device: torch.device, weights: str, scale: float = 1.0) -> None:
        self.device, self.weights, self.scale = device, weights, scale

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(pixels.mean(dim=(2, 3)) @ torch.eye(3, 4), dim=-1)

    def encode_texts(self, texts: list[str]) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.ones(len(texts), 4), dim=-1)


class TextsOnly:
    def __init__(self, device: torch.device) -> None:
        self.dim = 4

    def encode_texts(self, texts: list[str]) -> torch.Tensor:
        return torch.ones(len(texts), 4) / 2


class NoDim(Radiology):
    dim = None  # type: ignore[assignment]


class NoImage(TextsOnly):
    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels


class WrongImage(NoImage):
    image = 224


class Neither:
    def __init__(self, device: torch.device) -> None: ...


class Fails(TextsOnly):
    def __init__(self, device: torch.device) -> None:
        raise KeyError("lost")


class Writer:
    image = SPEC

    def __init__(self, device: torch.device, captions: int | None = None) -> None:
        if captions is not None:
            self.captions = captions

    def caption(self, pixels: torch.Tensor, seeds: Any) -> list[list[str]]:
        return [["a"] * seeds.shape[1] for _ in pixels]


def _own(name: str, **spec: Any) -> TeacherSpec:
    return TeacherSpec.model_validate({"class": f"{HERE}:{name}", **spec})


def _writer(name: str = "Writer", **spec: Any) -> CaptionerSpec:
    return CaptionerSpec.model_validate({"class": f"{HERE}:{name}", **spec})


def test_a_users_class_is_built_with_the_device_and_its_options() -> None:
    spec = _own("Radiology", options={"weights": "here", "scale": 2.0})
    teacher: Any = load_teacher("ours", spec, "cpu")
    assert (teacher.device, teacher.weights, teacher.scale) == (torch.device("cpu"), "here", 2.0)
    assert teacher.logit_scale == 50
    info = describe_teacher("ours", spec)
    assert (info.dim, info.images, info.texts) == (4, True, True)
    assert info.identity == {"class": f"{HERE}:Radiology", "options": {"weights": "here", "scale": 2.0}, "version": 3}


def test_the_configs_logit_scale_goes_before_the_class_and_is_no_part_of_the_identity() -> None:
    plain = _own("Radiology", options={"weights": "here"})
    scaled = _own("Radiology", options={"weights": "here"}, logit_scale=70.0, dtype="int8")
    assert load_teacher("ours", scaled, "cpu").logit_scale == 70
    assert describe_teacher("ours", scaled) == describe_teacher("ours", plain)


def test_a_class_with_one_side_has_one_side() -> None:
    info = describe_teacher("texts", _own("TextsOnly"))
    assert (info.dim, info.images, info.texts) == (None, False, True)
    teacher = load_teacher("texts", _own("TextsOnly"), "cpu")
    assert (teacher.image, teacher.logit_scale, teacher.dim) == (None, None, 4)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"class": "no.such.module:T"}, r"no\.such\.module:T cannot be imported: ModuleNotFoundError.*PYTHONPATH"),
        ({"class": f"{HERE}:Absent"}, r"test_registry\.py has no such name"),
        ({"class": f"{HERE}:SPEC"}, "an? ImageSpec of that name, not a class"),
        ({"class": f"{HERE}:Neither"}, "neither `encode_images` nor `encode_texts`"),
        ({"class": f"{HERE}:Radiology"}, "missing a required argument: 'weights'.*signature is Radiology"),
        ({"class": f"{HERE}:TextsOnly", "options": {"size": 3}}, "unexpected keyword argument 'size'"),
        ({"class": f"{HERE}:Radiology", "options": {"weights": {1, 2}}}, "not JSON serializable; use numbers, strings"),
        ({"class": f"{HERE}:TextsOnly", "precision": "bf16"}, "`precision` is not used with `class`"),
        ({"model": "ViT-L-14", "pretrained": "dfn2b"}, "use model ViT-L-14-quickgelu"),
        ({"model": "local-dir:/absent"}, "folder /absent does not exist"),
        ({"family": "transformers", "model": "/absent/it"}, "folder /absent/it does not exist"),
        ({"family": "transformers", "model": "a/b", "pretrained": "x"}, "`pretrained` is not used with family"),
    ],
)
def test_a_teacher_that_cannot_be_is_refused_before_loading(spec: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=f"teacher mine: .*(?:{message})"):
        describe_teacher("mine", TeacherSpec.model_validate(spec))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (_own("NoDim", options={"weights": "w"}), "must set `dim`, the length of its embeddings, got None"),
        (_own("NoImage"), "has `encode_images` and must set `image` to a teachers.protocols.ImageSpec"),
        (_own("WrongImage"), "`image` must be a teachers.protocols.ImageSpec, got 224"),
    ],
)
def test_a_class_that_states_too_little_is_told_what(spec: TeacherSpec, message: str) -> None:
    with pytest.raises(ValueError, match=f"teacher mine: .*{message}"):
        load_teacher("mine", spec, "cpu")


def test_errors_of_a_users_own_code_name_the_teacher() -> None:
    with pytest.raises(RuntimeError, match="teacher mine: KeyError: 'lost'") as caught:
        load_teacher("mine", _own("Fails"), "cpu")
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_device_that_is_not_there_names_the_teacher() -> None:
    with pytest.raises(ValueError, match="teacher mine: device 'cuda:64' is not available"):
        load_teacher("mine", _own("TextsOnly"), "cuda:64")


def test_an_open_clip_folder_is_known_by_its_content_wherever_it_lies(tmp_path: Path) -> None:
    model = tiny_models.open_clip_model(tmp_path / "a", embed_dim=24)
    info = describe_teacher("a", TeacherSpec(model=model))
    assert (info.dim, info.images, info.texts) == (24, True, True)
    json.dumps(info.identity)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert describe_teacher("b", TeacherSpec(model=f"local-dir:{tmp_path / 'b'}")) == info
    half = describe_teacher("a", TeacherSpec(model=model, precision="bf16"))
    assert half.identity != info.identity
    for place, change in ((tmp_path / "b", "weights"), (tmp_path / "c", "preprocessing")):
        changed = {"seed": 1} if change == "weights" else {"preprocess": {"std": 0.5}}
        other = tiny_models.open_clip_model(place, embed_dim=24, **changed)  # type: ignore[arg-type]
        assert describe_teacher("a", TeacherSpec(model=other)).identity != info.identity, change


def test_a_checkpoint_file_is_known_by_its_content_and_a_tag_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"weights")
    first = describe_teacher("a", TeacherSpec(model="ViT-B-32", pretrained=str(tmp_path / "a.pt")))
    (tmp_path / "a.pt").rename(tmp_path / "b.pt")
    assert describe_teacher("a", TeacherSpec(model="ViT-B-32", pretrained=str(tmp_path / "b.pt"))) == first
    (tmp_path / "b.pt").write_bytes(b"others")
    assert describe_teacher("a", TeacherSpec(model="ViT-B-32", pretrained=str(tmp_path / "b.pt"))) != first
    tagged = describe_teacher("a", TeacherSpec(model="ViT-L/14", pretrained="dfn2b-s39b"))
    assert tagged == describe_teacher("a", TeacherSpec(model="ViT-L-14", pretrained="dfn2b_s39b"))
    assert tagged.dim == 768
    assert tagged.identity == {
        "family": "open_clip",
        "model": "ViT-L-14",
        "pretrained": "dfn2b_s39b",
        "precision": "fp32",
    }


def test_hub_models_are_not_looked_up() -> None:
    for spec in (
        TeacherSpec(model="hf-hub:apple/DFN2B-CLIP-ViT-L-14"),
        TeacherSpec(family="transformers", model="google/siglip-base-patch16-224"),
    ):
        info = describe_teacher("hub", spec)
        assert (info.dim, info.images, info.texts) == (None, True, True)
        assert info.identity == {"family": spec.family, "model": spec.model, "precision": "fp32"}


@pytest.mark.parametrize("kind", ["clip", "dinov2", "bert"])
def test_a_transformers_folder_is_described_as_it_loads(tmp_path: Path, kind: str) -> None:
    model = getattr(tiny_models, f"transformers_{kind}")(tmp_path / kind)
    spec = TeacherSpec(family="transformers", model=model)
    info, teacher = describe_teacher("t", spec), load_teacher("t", spec, "cpu")
    assert info.dim == teacher.dim
    assert info.images == hasattr(teacher, "encode_images")
    assert info.texts == hasattr(teacher, "encode_texts")
    shutil.copytree(tmp_path / kind, tmp_path / "moved")
    assert describe_teacher("t", TeacherSpec(family="transformers", model=str(tmp_path / "moved"))) == info


def test_describing_models_does_without_torch(tmp_path: Path) -> None:
    folder = tiny_models.transformers_clip(tmp_path / "clip")
    code = f"""
import sys
from teachers.registry import describe_captioner, describe_teacher
from teachers.spec import CaptionerSpec, TeacherSpec
describe_teacher("a", TeacherSpec(model="ViT-L-14-quickgelu", pretrained="dfn2b"))
describe_teacher("b", TeacherSpec(model={tiny_models.open_clip_model(tmp_path / "m")!r}))
describe_teacher("c", TeacherSpec(family="transformers", model={folder!r}))
describe_teacher("d", TeacherSpec(family="transformers", model="openai/clip-vit-base-patch32"))
describe_captioner("e", CaptionerSpec(model="coca_ViT-L-14", pretrained="laion2b_s13b_b90k"))
print(sorted({{"torch", "open_clip", "transformers"}} & set(sys.modules)))
"""
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_a_captioners_identity_holds_how_it_samples() -> None:
    name = {"model": "coca_ViT-L-14", "pretrained": "laion2b_s13b_b90k"}
    info = describe_captioner("c", CaptionerSpec(**name))  # type: ignore[arg-type]
    assert (info.dim, info.images, info.texts) == (None, True, False)
    for change in ({"captions": 2}, {"top_p": 0.5}, {"temperature": 0.7}, {"min_length": 3}, {"max_length": 20}):
        assert describe_captioner("c", CaptionerSpec(**name, **change)).identity != info.identity  # type: ignore[arg-type]


def test_a_users_captioner_is_built_and_told_how_many_captions() -> None:
    captioner = load_captioner("mine", _writer(captions=3), "cpu")
    assert captioner.captions == 3
    assert describe_captioner("mine", _writer(captions=3)).identity["captions"] == 3
    with pytest.raises(
        ValueError, match=r"captioner mine: .* gives 2 captions an image .* `captions: 5`: make them equal"
    ):
        load_captioner("mine", _writer(options={"captions": 2}), "cpu")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"class": f"{HERE}:Radiology", "options": {"weights": "w"}}, r"has no method `caption\(pixels, seeds\)`"),
        ({"class": f"{HERE}:Writer", "top_p": 0.5}, "top_p: not used with `class`"),
        ({"model": "ViT-B-32-quickgelu", "pretrained": "openai"}, "does not write captions: use one of coca_ViT-B-32"),
        ({"class": f"{HERE}:Writer", "prompt": "What?"}, "prompt: not used with `class`"),
        (
            {"model": "coca_ViT-B-32", "pretrained": "laion2b_s13b_b90k", "prompt": "What?"},
            "prompt: used only by chat models of `family: transformers`",
        ),
    ],
)
def test_a_captioner_that_cannot_be_is_refused_before_loading(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"captioner mine: .*{message}"):
        describe_captioner("mine", CaptionerSpec.model_validate(spec))
