"""Tokenizing and encoding of texts by open_clip models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import get_clean_fn
from safetensors.torch import save_file

from teachers.device.accelerator import Accelerator
from teachers.open_clip.teacher import OpenClipTeacher
from teachers.open_clip.text import clean_text
from teachers.registry import teacher_spec
from tests.helpers import tiny_models
from tests.helpers.tiny_models import FULL_LENGTH, TRIMMED

CPU = Accelerator("cpu")
TEXTS = ["a", "a photo of a dog on the beach", "", "so many words " * 60, "Ünïcode – 犬"]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REINFORCE_CACHE", str(tmp_path / "cache"))


def _teacher(model: str, device: Accelerator = CPU, **spec: Any) -> OpenClipTeacher:
    return OpenClipTeacher(teacher_spec(model=model, **spec), device)


def _load_open_clip(model: str) -> tuple[Any, Any]:
    return open_clip.create_model(model).eval(), open_clip.get_tokenizer(model)


def _length_seen(teacher: OpenClipTeacher, texts: list[str]) -> int:
    seen: list[int] = []
    blocks = teacher._model.transformer if hasattr(teacher._model, "transformer") else teacher._model.text.transformer
    hook = blocks.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[1]))
    teacher.encode_texts(texts)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("kind", TRIMMED)
def test_causal_towers_trim_batches_to_the_longest_text(models: dict[str, str], kind: str) -> None:
    teacher = _teacher(models[kind])
    assert _length_seen(teacher, ["a", "a dog"]) == 4
    assert _length_seen(teacher, ["word " * 200]) == 77


@pytest.mark.parametrize("kind", FULL_LENGTH)
def test_other_towers_encode_the_full_length(models: dict[str, str], kind: str) -> None:
    assert _length_seen(_teacher(models[kind]), ["a", "a dog"]) == 77 + (kind == "class-token")


@pytest.mark.parametrize(
    "text",
    ["a <end_of_text> b", "A <END_OF_TEXT> B", "a &lt;end_of_text&gt; b", "a ＜end_of_text＞ b", "<start_of_text>"],
)
def test_special_tokens_in_texts_are_read_as_plain_text(models: dict[str, str], text: str) -> None:
    teacher = _teacher(models["small"])
    assert bool((open_clip.tokenize([text]) >= 49406).sum() > 2), "open_clip reads it as a special token"
    tokens = teacher._text.tokenize([text])[0]
    assert int((tokens == 49406).sum()) == 1
    assert int((tokens == 49407).sum()) == 1
    assert not torch.equal(teacher.encode_texts([text]), teacher.encode_texts(["a b"]))


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(max_codepoint=0x17F)) | st.text("ab <&;>\t\n\x1b[0m'\"", max_size=20))
def test_clean_text_matches_open_clip(text: str) -> None:
    assert clean_text(text) == get_clean_fn("lower")(text)


def test_the_token_cache_is_bounded(models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teachers.open_clip.text._MAX_CACHED_WORDS", 100)
    teacher = _teacher(models["small"])
    first = teacher.encode_texts(["a dog"])
    for i in range(40):
        teacher.encode_texts([f"word{'abcdefghij'[i % 10]}{'klmnop'[i % 6]} number {chr(97 + i % 26)}x{'yz' * i}"])
        assert len(teacher._text._tokenizer.cache) <= 100
    assert torch.equal(teacher.encode_texts(["a dog"]), first)


def test_a_hugging_face_tokenizer_is_used_and_its_special_tokens_are_plain_text(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    model = tiny_models.open_clip_model(
        folder, custom_text=True, pool_type="eos", eos_id=2, vocab_size=300, context_length=24, hf_tokenizer_name="own"
    )
    tiny_models.tokenizer(folder, start="<s>", end="</s>", pad="<pad>", length=24)
    teacher, (plain, tokenizer) = _teacher(model), _load_open_clip(model)
    texts = ["a photo of a cat", "dog"]
    with torch.no_grad():
        expected = plain.encode_text(tokenizer(texts), normalize=True)
    torch.testing.assert_close(teacher.encode_texts(texts), expected, rtol=0, atol=1e-6)
    tokens = teacher._text.tokenize(["a </s> b </S> c <pad>"])[0]
    assert int((tokens == 2).sum()) == 1
    assert _length_seen(teacher, ["a", "a cat"]) < 24


def test_text_towers_of_transformers_encode_the_full_length(tmp_path: Path) -> None:
    tower = tiny_models.transformers_bert(tmp_path / "bert")
    config = tiny_models.open_clip_config()
    config["text_cfg"] = {"hf_model_name": tower, "hf_tokenizer_name": tower, "context_length": 24}
    model = tiny_models.seeded(lambda: open_clip.CustomTextCLIP(**config), 0)
    folder = tmp_path / "model"
    tiny_models.tokenizer(folder, start="[CLS]", end="[SEP]", pad="[PAD]", length=24)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    save_file(model.state_dict(), str(folder / "open_clip_model.safetensors"))
    teacher = _teacher(f"local-dir:{folder}")
    with torch.no_grad():
        expected = model.encode_text(open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS), normalize=True)
    torch.testing.assert_close(teacher.encode_texts(TEXTS), expected, rtol=0, atol=1e-6)
