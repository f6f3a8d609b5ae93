"""Families of models: how their keys are validated, and how they are described without being loaded."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from teachers.registry import describe_model, teacher_spec
from teachers.spec import Clean
from tests.helpers.models import tiny_models
from tests.helpers.models.tiny_captioners import spec_of
from tests.helpers.specs import captioner_spec

Folder = Callable[[str], Path]

CLIP = {"model": "ViT-B-32-quickgelu", "pretrained": "openai"}
COCA = {"model": "coca_ViT-L-14", "pretrained": "laion2b_s13b_b90k"}
HUB = {"family": "transformers", "model": "google/siglip-base-patch16-224"}
SPECS: dict[str, Any] = {"teacher": teacher_spec, "captioner": captioner_spec}


@pytest.mark.parametrize(
    ("role", "spec", "message"),
    [
        ("teacher", {"model": "ViT-L-14", "pretrained": "dfn2b"}, "use model ViT-L-14-quickgelu"),
        ("teacher", {"model": "local-dir:/absent"}, "folder /absent does not exist"),
        ("teacher", {"family": "transformers", "model": "/absent/it"}, "folder /absent/it does not exist"),
        ("teacher", {**HUB, "pretrained": "x"}, "`pretrained` is not used with family"),
        ("captioner", CLIP, "is not a CoCa and cannot caption: use one of coca_ViT-B-32"),
        ("captioner", {**COCA, "prompt": "What?"}, "prompt: used only by chat models of `family: transformers`"),
        ("captioner", {**HUB, "pretrained": "x"}, "`pretrained` is not used with family transformers"),
        ("captioner", {**HUB, "compile": True}, "`compile` works only with CoCa"),
        ("captioner", {"family": "transformers", "model": "/absent/it"}, "folder /absent/it does not exist"),
    ],
)
def test_a_wrong_model_is_rejected_before_loading(role: str, spec: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=f"{role} mine: .*{message}"):
        describe_model("mine", SPECS[role](**spec))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("llava", {"prompt": None}, "'llava' needs a prompt, such as prompt: .Describe the image in one sentence"),
        ("blip", {"prompt": "a photo of"}, "`prompt` is not used by a model of type 'blip': remove it"),
        ("git", {"image_size": 64}, "`image_size` is not used by a model of type 'git'"),
        ("git", {"max_length": 65}, "max_length 65 exceeds the model's context of 64 tokens"),
        ("vision-encoder-decoder", {"max_length": 65}, "max_length 65 exceeds the model's context of 64 tokens"),
        ("qwen2_vl", {"max_length": 257}, "max_length 257 exceeds the model's context of 256 tokens"),
    ],
)
def test_keys_that_a_model_of_transformers_does_not_support_are_rejected_before_loading(
    captioner_folder: Folder, kind: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"captioner mine: .*{message}"):
        describe_model("mine", spec_of(captioner_folder(kind), kind, **options))


def test_a_model_that_cannot_caption_is_rejected(root: Path, tmp_path: Path, captioner_folder: Folder) -> None:
    with pytest.raises(ValueError, match=r"mine: .* type 'siglip' is not a supported captioner: use blip, git"):
        describe_model("mine", spec_of(root / "siglip", "siglip"))
    config = json.loads((captioner_folder("blip") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["BlipForQuestionAnswering"]}))
    with pytest.raises(ValueError, match="BlipForQuestionAnswering does not write captions"):
        describe_model("mine", spec_of(tmp_path, "blip"))


def test_hub_models_are_not_looked_up() -> None:
    for spec in (teacher_spec(model="hf-hub:apple/DFN2B-CLIP-ViT-L-14"), teacher_spec(**HUB)):
        info = describe_model("hub", spec)
        assert (info.dim, info.images, info.texts) == (None, True, True)
        assert info.identity == {"family": spec.family, "model": spec.model, "precision": "fp32"}


def test_describing_models_does_not_import_torch(tmp_path: Path, root: Path, captioner_folder: Folder) -> None:
    code = f"""
import sys
from tests.helpers.specs import captioner_spec
from teachers.registry import describe_model, teacher_spec
describe_model("a", teacher_spec(model="ViT-L-14-quickgelu", pretrained="dfn2b"))
describe_model("b", teacher_spec(model={tiny_models.open_clip_model(tmp_path / "m")!r}))
describe_model("c", teacher_spec(family="transformers", model={str(root / "clip")!r}))
describe_model("d", teacher_spec(family="transformers", model="openai/clip-vit-base-patch32"))
describe_model("e", captioner_spec(model="coca_ViT-L-14", pretrained="laion2b_s13b_b90k"))
describe_model("f", captioner_spec(family="transformers", model={str(captioner_folder("git"))!r}))
describe_model("g", captioner_spec(family="transformers", model="Salesforce/blip-image-captioning-base"))
print(sorted({{"torch", "open_clip", "transformers"}} & set(sys.modules)))
"""
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_a_captioners_identity_includes_its_files_its_prompt_and_its_sampling(captioner_folder: Folder) -> None:
    chat = {"family": "transformers", "model": str(captioner_folder("qwen2_vl")), "prompt": "Describe it."}
    sampling = [{"captions": 2}, {"top_p": 0.5}, {"temperature": 0.7}, {"min_length": 3}, {"max_length": 20}]
    for spec, changes in ((COCA, sampling), (chat, [*sampling, {"prompt": "What is it?"}, {"image_size": 64}])):
        info = describe_model("c", captioner_spec(**spec))
        assert (info.dim, info.images, info.texts) == (None, True, False)
        identities = [describe_model("c", captioner_spec(**{**spec, **change})).identity for change in changes]
        assert info.identity not in identities
    files = {"model.safetensors", "config.json", "tokenizer.json", "generation_config.json", "chat_template.jinja"}
    assert files <= info.identity["files"].keys()


def test_cleaning_is_in_the_identity_only_if_it_is_configured_and_wrong_rules_are_rejected() -> None:
    for spec in (COCA, {"class": "tests.helpers.models:SeedCaptioner", "captions": 2}):
        plain, asked, other = (
            describe_model("c", captioner_spec(**spec, **clean)).identity
            for clean in ({}, {"clean": {}}, {"clean": {"words": 9}})
        )
        assert {name: value for name, value in asked.items() if name != "clean"} == plain
        assert asked["clean"] != other["clean"]
    for wrong in ({"words": 0}, {"sentences": 1}, {"characters": "9"}):
        with pytest.raises(ValidationError):
            Clean.model_validate(wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "beams", "top_k": 5}, "`top_k` is not used by strategy beams: .* `strategy` to top_k"),
        ({"top_k": 5}, "`top_k` is not used by strategy nucleus"),
        ({"strategy": "top_k", "top_p": 0.5}, "`top_p` is not used by strategy top_k: .* nucleus"),
        ({"strategy": "greedy", "captions": 1, "temperature": 0.5}, "to nucleus or top_k"),
        ({"strategy": "beams", "groups": 2}, "`groups` is not used by strategy beams: .* diverse_beams"),
        ({"strategy": "greedy"}, "one caption per image: set `captions: 1`"),
        ({"strategy": "beams", "captions": 8}, "`captions: 8` exceeds `beams: 6`: set `beams` to 8"),
        ({"strategy": "diverse_beams", "beams": 8}, "8 beams cannot be divided among 3 groups"),
    ],
)
def test_incompatible_keys_are_rejected_with_the_fix(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        captioner_spec(model="any", **options)


def test_decoding_includes_later_options_only_if_they_are_used() -> None:
    lengths = {"min_length": 5, "max_length": 30}
    plain = captioner_spec(model="any", captions=5)
    assert plain.decoding() == {"captions": 5, "temperature": 1.0, "top_p": 0.9, **lengths}
    greedy = {"strategy": "greedy", "captions": 1, "repetition_penalty": 1.2}
    assert captioner_spec(model="any", compile=True, **greedy).decoding() == {**greedy, **lengths}
    beams = {"strategy": "beams", "captions": 3}
    assert captioner_spec(model="any", **beams).decoding() == {**beams, "beams": 6, "length_penalty": 1.0, **lengths}


@pytest.mark.parametrize(("code", "raised"), [(1, RuntimeError), (143, SystemExit)])
def test_a_class_that_exits_is_an_error_and_sigterm_while_it_is_imported_ends_the_program(
    code: int, raised: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = "raise SystemExit(1)" if code == 1 else "import signal; signal.raise_signal(signal.SIGTERM)"
    (tmp_path / f"ends_with_{code}.py").write_text(ends)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with pytest.raises(raised, match="ends: SystemExit: 1" if code == 1 else "143"):
            describe_model("ends", teacher_spec(**{"class": f"ends_with_{code}:Teacher"}))
    finally:
        signal.signal(signal.SIGTERM, before)
