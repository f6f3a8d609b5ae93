"""Descriptions and identities of models that are not loaded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from teachers.registry import captioner_spec, describe_captioner, describe_teacher, teacher_spec
from teachers.spec import CaptionerSpec, TeacherSpec
from tests.helpers import tiny_models
from tests.helpers.tiny_captioners import spec_of

CUSTOM = "tests.helpers.custom_models"
COCA = {"model": "coca_ViT-B-32", "pretrained": "laion2b_s13b_b90k"}


def _custom_teacher(name: str, **spec: Any) -> TeacherSpec:
    return teacher_spec(**{"class": f"{CUSTOM}:{name}", **spec})


def _custom_captioner(name: str = "Writer", **spec: Any) -> CaptionerSpec:
    return captioner_spec(**{"class": f"{CUSTOM}:{name}", **spec})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"class": "no.such.module:T"}, r"no\.such\.module:T cannot be imported: ModuleNotFoundError.*PYTHONPATH"),
        ({"class": f"{CUSTOM}:Absent"}, r"custom_models\.py has no such name"),
        ({"class": f"{CUSTOM}:SPEC"}, "an? ImageSpec of that name, not a class"),
        ({"class": f"{CUSTOM}:Neither"}, "neither `encode_images` nor `encode_texts`"),
        ({"class": f"{CUSTOM}:Radiology"}, "missing a required argument: 'weights'.*signature is Radiology"),
        ({"class": f"{CUSTOM}:TextsOnly", "options": {"size": 3}}, "unexpected keyword argument 'size'"),
        (
            {"class": f"{CUSTOM}:Radiology", "options": {"weights": {1, 2}}},
            "not JSON serializable; use numbers, strings",
        ),
        ({"class": f"{CUSTOM}:TextsOnly", "precision": "bf16"}, "`precision` is not used with `class`"),
        ({"model": "ViT-L-14", "pretrained": "dfn2b"}, "use model ViT-L-14-quickgelu"),
        ({"model": "local-dir:/absent"}, "folder /absent does not exist"),
        ({"family": "transformers", "model": "/absent/it"}, "folder /absent/it does not exist"),
        ({"family": "transformers", "model": "a/b", "pretrained": "x"}, "`pretrained` is not used with family"),
    ],
)
def test_a_wrong_teacher_spec_is_rejected_before_loading(spec: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=f"teacher mine: .*(?:{message})"):
        describe_teacher("mine", teacher_spec(**spec))


def test_the_identity_of_an_open_clip_folder_is_its_content_not_its_path(tmp_path: Path) -> None:
    model = tiny_models.open_clip_model(tmp_path / "a", embed_dim=24)
    info = describe_teacher("a", teacher_spec(model=model))
    assert (info.dim, info.images, info.texts) == (24, True, True)
    json.dumps(info.identity)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert describe_teacher("b", teacher_spec(model=f"local-dir:{tmp_path / 'b'}")) == info
    half = describe_teacher("a", teacher_spec(model=model, precision="bf16"))
    assert half.identity != info.identity
    for place, change in ((tmp_path / "b", "weights"), (tmp_path / "c", "preprocessing")):
        changed = {"seed": 1} if change == "weights" else {"preprocess": {"std": 0.5}}
        other = tiny_models.open_clip_model(place, embed_dim=24, **changed)  # type: ignore[arg-type]
        assert describe_teacher("a", teacher_spec(model=other)).identity != info.identity, change


def test_the_identity_of_a_checkpoint_is_its_content_and_of_a_tag_its_name(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"weights")
    first = describe_teacher("a", teacher_spec(model="ViT-B-32", pretrained=str(tmp_path / "a.pt")))
    (tmp_path / "a.pt").rename(tmp_path / "b.pt")
    assert describe_teacher("a", teacher_spec(model="ViT-B-32", pretrained=str(tmp_path / "b.pt"))) == first
    (tmp_path / "b.pt").write_bytes(b"others")
    assert describe_teacher("a", teacher_spec(model="ViT-B-32", pretrained=str(tmp_path / "b.pt"))) != first
    tagged = describe_teacher("a", teacher_spec(model="ViT-L/14", pretrained="dfn2b-s39b"))
    assert tagged == describe_teacher("a", teacher_spec(model="ViT-L-14", pretrained="dfn2b_s39b"))
    assert tagged.dim == 768
    assert tagged.identity == {
        "family": "open_clip",
        "model": "ViT-L-14",
        "pretrained": "dfn2b_s39b",
        "precision": "fp32",
    }


def test_hub_models_are_not_looked_up() -> None:
    for spec in (
        teacher_spec(model="hf-hub:apple/DFN2B-CLIP-ViT-L-14"),
        teacher_spec(family="transformers", model="google/siglip-base-patch16-224"),
    ):
        info = describe_teacher("hub", spec)
        assert (info.dim, info.images, info.texts) == (None, True, True)
        assert info.identity == {"family": spec.family, "model": spec.model, "precision": "fp32"}


def test_describing_models_does_not_import_torch(tmp_path: Path, captioner_folder: Callable[[str], Path]) -> None:
    folder = tiny_models.transformers_clip(tmp_path / "clip")
    code = f"""
import sys
from teachers.registry import captioner_spec, describe_captioner, describe_teacher, teacher_spec
describe_teacher("a", teacher_spec(model="ViT-L-14-quickgelu", pretrained="dfn2b"))
describe_teacher("b", teacher_spec(model={tiny_models.open_clip_model(tmp_path / "m")!r}))
describe_teacher("c", teacher_spec(family="transformers", model={folder!r}))
describe_teacher("d", teacher_spec(family="transformers", model="openai/clip-vit-base-patch32"))
describe_captioner("e", captioner_spec(model="coca_ViT-L-14", pretrained="laion2b_s13b_b90k"))
describe_captioner("f", captioner_spec(family="transformers", model={str(captioner_folder("git"))!r}))
describe_captioner("g", captioner_spec(family="transformers", model="Salesforce/blip-image-captioning-base"))
print(sorted({{"torch", "open_clip", "transformers"}} & set(sys.modules)))
"""
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_a_captioners_identity_includes_its_sampling_options() -> None:
    name = {"model": "coca_ViT-L-14", "pretrained": "laion2b_s13b_b90k"}
    info = describe_captioner("c", captioner_spec(**name))  # type: ignore[arg-type]
    assert (info.dim, info.images, info.texts) == (None, True, False)
    for change in ({"captions": 2}, {"top_p": 0.5}, {"temperature": 0.7}, {"min_length": 3}, {"max_length": 20}):
        assert describe_captioner("c", captioner_spec(**name, **change)).identity != info.identity  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"class": f"{CUSTOM}:Radiology", "options": {"weights": "w"}}, r"has no method `caption\(pixels, seeds\)`"),
        ({"class": f"{CUSTOM}:Writer", "top_p": 0.5}, "top_p: not used with `class`"),
        ({"model": "ViT-B-32-quickgelu", "pretrained": "openai"}, "does not write captions: use one of coca_ViT-B-32"),
        ({"class": f"{CUSTOM}:Writer", "prompt": "What?"}, "prompt: not used with `class`"),
        (
            {"model": "coca_ViT-B-32", "pretrained": "laion2b_s13b_b90k", "prompt": "What?"},
            "prompt: used only by chat models of `family: transformers`",
        ),
    ],
)
def test_a_wrong_captioner_spec_is_rejected_before_loading(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"captioner mine: .*{message}"):
        describe_captioner("mine", captioner_spec(**spec))


def test_compile_is_rejected_for_other_models_than_coca():
    captioner = captioner_spec(**{"model": "any", "family": "transformers", "compile": True})
    with pytest.raises(ValueError, match="captioner blip: `compile` works only with CoCa"):
        describe_captioner("blip", captioner)


def test_cleaning_is_in_the_identity_only_if_it_is_configured() -> None:
    plain = describe_captioner("c", captioner_spec(**COCA)).identity
    asked = describe_captioner("c", captioner_spec(**{**COCA, "clean": {}})).identity
    assert "clean" not in plain
    assert {name: value for name, value in asked.items() if name != "clean"} == plain
    other = describe_captioner("c", captioner_spec(**{**COCA, "clean": {"words": 9}})).identity
    assert other["clean"] != asked["clean"]
    own = {"class": "tests.helpers.models:SeedCaptioner", "captions": 2}
    assert "clean" not in describe_captioner("c", captioner_spec(**own)).identity
    assert "clean" in describe_captioner("c", captioner_spec(**{**own, "clean": {}})).identity


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            "llava",
            {"prompt": None},
            r"type 'llava' needs a prompt, such as prompt: \"Describe the image in one sentence\.\"",
        ),
        ("blip", {"prompt": "a photo of"}, "`prompt` is not used by a model of type 'blip': remove it"),
        ("git", {"image_size": 64}, "`image_size` is not used by a model of type 'git'"),
        ("git", {"max_length": 65}, "max_length 65 exceeds the model's context of 64 tokens"),
        ("vision-encoder-decoder", {"max_length": 65}, "max_length 65 exceeds the model's context of 64 tokens"),
        ("qwen2_vl", {"max_length": 257}, "max_length 257 exceeds the model's context of 256 tokens"),
        ("blip", {"pretrained": "x"}, "`pretrained` is not used with family transformers"),
    ],
)
def test_unsupported_captioner_options_are_rejected_before_loading(
    captioner_folder: Callable[[str], Path], kind: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"captioner mine: .*{message}"):
        describe_captioner("mine", spec_of(captioner_folder(kind), kind, **options))


def test_a_model_that_cannot_caption_is_rejected_before_loading(
    tmp_path: Path, captioner_folder: Callable[[str], Path]
) -> None:
    name = tiny_models.transformers_siglip(tmp_path / "siglip")
    with pytest.raises(
        ValueError, match=r"captioner mine: .* type 'siglip' is not a supported captioner: use blip, git"
    ):
        describe_captioner("mine", spec_of(name, "siglip"))
    config = json.loads((captioner_folder("blip") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["BlipForQuestionAnswering"]}))
    with pytest.raises(ValueError, match="BlipForQuestionAnswering does not write captions"):
        describe_captioner("mine", spec_of(tmp_path, "blip"))
    with pytest.raises(FileNotFoundError, match="captioner mine: folder /absent/it does not exist"):
        describe_captioner("mine", spec_of("/absent/it", "blip"))


def test_a_transformers_captioners_identity_includes_files_prompt_and_sampling(
    captioner_folder: Callable[[str], Path],
) -> None:
    plain = describe_captioner("c", spec_of(captioner_folder("qwen2_vl"), "qwen2_vl"))
    assert (plain.dim, plain.images, plain.texts) == (None, True, False)
    files = {"model.safetensors", "config.json", "tokenizer.json", "generation_config.json", "chat_template.jinja"}
    assert files <= plain.identity["files"].keys()
    for change in ({"prompt": "What is it?"}, {"image_size": 64}, {"top_p": 0.5}, {"captions": 2}):
        assert (
            describe_captioner("c", spec_of(captioner_folder("qwen2_vl"), "qwen2_vl", **change)).identity
            != plain.identity
        )
    hub = describe_captioner("c", captioner_spec(family="transformers", model="Salesforce/blip-image-captioning-base"))
    assert hub.identity["model"] == "Salesforce/blip-image-captioning-base"
