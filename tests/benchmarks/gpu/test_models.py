"""The models of the benchmark need no network."""

from __future__ import annotations

import pytest

from benchmarks.gpu.bench import Size
from benchmarks.gpu.models import load_tokenizer, vocabulary_size


@pytest.mark.parametrize("name", Size().teachers)
def test_tokenizers_are_not_downloaded_and_their_tokens_are_in_the_vocabulary(name: str) -> None:
    tokens = load_tokenizer(name)(["a photo of a dog", ""])
    assert tokens.shape[0] == 2
    assert tokens.min() >= 0
    assert tokens.max() < vocabulary_size(name)
