"""Texts with an open_clip whose insides are others than those that this code reads."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from teachers.open_clip.text import TextEncoder, disable_special_tokens
from teachers.runtime.accelerator import Accelerator
from tests.helpers.models.tiny_models import open_clip_model

TEXTS = ["a photo of a cat", "", "two &lt;end_of_text&gt; dogs", "so many words " * 60]


class Ahead(open_clip.SimpleTokenizer):
    """A tokenizer that has renamed what it is made of."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.inner = open_clip.SimpleTokenizer(**options)
        for name in ("pat", "byte_encoder", "clean_fn"):
            delattr(self, name)

    def __call__(self, texts: Any, context_length: int | None = None) -> torch.Tensor:
        found: torch.Tensor = self.inner(texts, context_length)
        return found


def test_a_model_with_other_insides_encodes_its_texts_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = open_clip_model(tmp_path / "model")
    model, tokenizer = open_clip.create_model(name).eval(), open_clip.get_tokenizer(name)
    expected = model.encode_text(tokenizer(["a photo of a cat", "a dog"]))
    inner = copy.deepcopy(model)
    model.__class__ = type("CLIP", (open_clip.CLIP,), {"encode_text": lambda _, tokens: inner.encode_text(tokens)})
    del model.text_pool_type
    with caplog.at_level(logging.WARNING):
        encoder = TextEncoder(model, tokenizer, Accelerator("cpu"))
    assert "trimming of texts is left out: this code does not know the insides of open_clip" in caplog.text
    assert torch.equal(encoder.encode(encoder.tokenize(["a photo of a cat", "a dog"])), expected)


def test_a_tokenizer_with_other_insides_gives_the_same_tokens(caplog: pytest.LogCaptureFixture) -> None:
    usual = disable_special_tokens(open_clip.SimpleTokenizer(context_length=40))
    with caplog.at_level(logging.WARNING):
        ahead = disable_special_tokens(Ahead(context_length=40))
    assert "fast tokenization is left out" in caplog.text
    assert torch.equal(ahead(TEXTS), usual(TEXTS))
    assert (ahead(["<end_of_text>", "<START_OF_TEXT>"])[:, 1:3] < 49406).all(), "special tokens are plain text"
    assert torch.equal(copy.copy(ahead)(TEXTS), usual(TEXTS))
    assert ahead.context_length == 40


def test_a_tokenizer_of_other_tokens_stays(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teachers.open_clip.text._cached_encode", lambda tokenizer: lambda text: [7])
    with caplog.at_level(logging.WARNING):
        changed = disable_special_tokens(open_clip.SimpleTokenizer())
    assert "it would have other tokens" in caplog.text
    monkeypatch.undo()
    assert torch.equal(changed(TEXTS), disable_special_tokens(open_clip.SimpleTokenizer())(TEXTS))
