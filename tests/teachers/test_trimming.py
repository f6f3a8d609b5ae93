"""Trimming is used only if it does not change embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from teachers.tokens.trimming import PROBE_TEXTS, trimming_is_exact


def _encode(texts: Sequence[str], trim: bool, padding: float) -> torch.Tensor:
    """Embeddings by length, plus ``padding`` per position that is not trimmed."""
    longest = max(map(len, texts)) if trim else 1000
    return torch.stack([torch.tensor([len(text), 1.0, padding * (longest - len(text))]) for text in texts])


def test_an_encoder_that_ignores_padding_is_exact() -> None:
    assert trimming_is_exact(lambda texts, trim: _encode(texts, trim, padding=0.0))


def test_an_encoder_that_uses_padding_is_not_exact_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    assert not trimming_is_exact(lambda texts, trim: _encode(texts, trim, padding=0.1))
    assert "texts are encoded at full length" in caplog.text


def test_differences_of_longer_batches_are_found() -> None:
    def encode(texts: Sequence[str], trim: bool) -> torch.Tensor:
        return _encode(texts, trim, padding=0.1 if len(texts) == len(PROBE_TEXTS) else 0.0)

    assert not trimming_is_exact(encode)
