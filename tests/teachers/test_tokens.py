"""Special tokens, the files of a tokenizer, and trimmed texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teachers.registry import describe_model, teacher_spec
from teachers.tokens import PROBE_TEXTS, check_tokenizer_files, special_token_escaper, trimming_is_exact
from tests.helpers.models import tiny_models
from tests.helpers.models.tiny_captioners import blip
from tests.helpers.models.tiny_coca import coca_model
from tests.helpers.specs import captioner_spec


@settings(max_examples=100)
@given(st.lists(st.sampled_from(["<s>", "</S>", "<", "s>", "[cls]", "x", " ", "<<s>>"])).map("".join))
def test_every_special_token_is_broken_and_characters_are_kept(text: str) -> None:
    special = ["<s>", "</s>", "[CLS]", "s><", "<"]
    result = special_token_escaper(special)(text)
    assert not any(token.lower() in result.lower() for token in special if len(token) > 1)
    assert result.replace(" ", "") == text.replace(" ", "")


FIX = r"has no tokenizer files.*tokenizer\.json, vocab\.json, vocab\.txt.*save_pretrained\("


@pytest.mark.parametrize("make", [tiny_models.transformers_clip, tiny_models.transformers_bert, blip])
def test_a_model_of_texts_saved_without_its_tokenizer_is_refused(tmp_path: Path, make: Any) -> None:
    spec = {"family": "transformers", "model": str(make(tmp_path / "model"))}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).unlink()
    parsed = captioner_spec(**spec) if make is blip else teacher_spec(**spec)
    with pytest.raises(FileNotFoundError, match=f"er mine: folder {tmp_path}/model {FIX}"):
        describe_model("mine", parsed)
    tiny_models.tokenizer(tmp_path / "model", start="<s>", end="</s>", pad="<pad>", length=24)
    assert describe_model("mine", parsed).texts == (make is not blip)


@pytest.mark.parametrize("make", [tiny_models.open_clip_model, coca_model])
def test_an_open_clip_folder_that_names_a_hugging_face_tokenizer_needs_its_files(tmp_path: Path, make: object) -> None:
    model = make(tmp_path / "vit")  # type: ignore[operator]
    assert describe_model("mine", teacher_spec(model=model)).texts
    path = tmp_path / "vit" / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "org/tokenizer"
    path.write_text(json.dumps(config))
    with pytest.raises(FileNotFoundError, match=FIX):
        describe_model("mine", teacher_spec(model=model))
    tiny_models.tokenizer(tmp_path / "vit", start="<s>", end="</s>", pad="<pad>", length=77)
    assert describe_model("mine", teacher_spec(model=model)).texts


@pytest.mark.parametrize("name", ["vocab.txt", "spiece.model", "source.spm", "qwen.tiktoken"])
def test_any_vocabulary_is_enough_and_a_tokenizer_of_bytes_needs_none(tmp_path: Path, name: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    with pytest.raises(FileNotFoundError, match=FIX):
        check_tokenizer_files(tmp_path)
    (tmp_path / name).touch()
    check_tokenizer_files(tmp_path)
    (tmp_path / name).unlink()
    for file, key in (("config.json", "model_type"), ("tokenizer_config.json", "tokenizer_class")):
        (tmp_path / file).write_text(json.dumps({key: "ByT5Tokenizer"}))
        check_tokenizer_files(tmp_path)
        (tmp_path / file).unlink()


def _encode(texts: Sequence[str], trim: bool, padding: float) -> torch.Tensor:
    """Embeddings by length, plus ``padding`` per position that is not trimmed."""
    longest = max(map(len, texts)) if trim else 1000
    return torch.stack([torch.tensor([len(text), 1.0, padding * (longest - len(text))]) for text in texts])


def test_an_encoder_is_exact_if_it_ignores_padding_in_all_batches(caplog: pytest.LogCaptureFixture) -> None:
    def in_the_longest(texts: Sequence[str], trim: bool) -> torch.Tensor:
        return _encode(texts, trim, padding=0.1 if len(texts) == len(PROBE_TEXTS) else 0.0)

    assert trimming_is_exact(partial(_encode, padding=0.0))
    assert not caplog.text
    assert not trimming_is_exact(in_the_longest)
    assert not trimming_is_exact(partial(_encode, padding=0.1))
    assert "texts are encoded at full length" in caplog.text
