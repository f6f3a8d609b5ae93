"""Local model folders without the files of their tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from teachers.registry import describe_captioner, describe_teacher, teacher_spec
from teachers.tokens.files import check_tokenizer_files
from tests.helpers import tiny_models
from tests.helpers.tiny_captioners import blip, spec_of
from tests.helpers.tiny_coca import coca_model

FIX = r"has no tokenizer files.*tokenizer\.json, vocab\.json, vocab\.txt.*save_pretrained\("


def delete_tokenizer(folder: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    return folder


def test_a_clip_folder_saved_without_its_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = delete_tokenizer(Path(tiny_models.transformers_clip(tmp_path / "clip")))
    with pytest.raises(FileNotFoundError, match=f"teacher mine: folder {folder} {FIX}"):
        describe_teacher("mine", teacher_spec(family="transformers", model=str(folder)))
    tiny_models.tokenizer(folder, start="<s>", end="</s>", pad="<pad>", length=24)
    assert describe_teacher("mine", teacher_spec(family="transformers", model=str(folder))).texts


def test_a_text_encoder_and_a_captioner_without_a_tokenizer_are_refused(tmp_path: Path) -> None:
    bert = delete_tokenizer(Path(tiny_models.transformers_bert(tmp_path / "bert")))
    with pytest.raises(FileNotFoundError, match=FIX):
        describe_teacher("mine", teacher_spec(family="transformers", model=str(bert)))
    folder = delete_tokenizer(Path(blip(tmp_path / "blip")))
    with pytest.raises(FileNotFoundError, match=f"captioner mine: .*{FIX}"):
        describe_captioner("mine", spec_of(folder, "blip"))


def test_an_image_encoder_needs_no_tokenizer(tmp_path: Path) -> None:
    folder = tiny_models.transformers_dinov2(tmp_path / "dino")
    assert not describe_teacher("mine", teacher_spec(family="transformers", model=folder)).texts


@pytest.mark.parametrize("make", [tiny_models.open_clip_model, coca_model])
def test_an_open_clip_folder_that_names_a_hugging_face_tokenizer_needs_its_files(tmp_path: Path, make: object) -> None:
    model = make(tmp_path / "vit")  # type: ignore[operator]
    assert describe_teacher("mine", teacher_spec(model=model)).texts
    path = tmp_path / "vit" / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "org/tokenizer"
    path.write_text(json.dumps(config))
    with pytest.raises(FileNotFoundError, match=FIX):
        describe_teacher("mine", teacher_spec(model=model))
    tiny_models.tokenizer(tmp_path / "vit", start="<s>", end="</s>", pad="<pad>", length=77)
    assert describe_teacher("mine", teacher_spec(model=model)).texts


@pytest.mark.parametrize("name", ["vocab.txt", "spiece.model", "source.spm", "qwen.tiktoken"])
def test_any_vocabulary_is_enough(tmp_path: Path, name: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    with pytest.raises(FileNotFoundError, match=FIX):
        check_tokenizer_files(tmp_path)
    (tmp_path / name).touch()
    check_tokenizer_files(tmp_path)


@pytest.mark.parametrize(("file", "key"), [("tokenizer_config.json", "tokenizer_class"), ("config.json", "model_type")])
def test_a_tokenizer_of_bytes_needs_no_vocabulary(tmp_path: Path, file: str, key: str) -> None:
    (tmp_path / file).write_text(json.dumps({key: "ByT5Tokenizer"}))
    check_tokenizer_files(tmp_path)
