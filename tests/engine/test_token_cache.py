"""Tokens that teachers share."""

from __future__ import annotations

from collections.abc import Sequence

from reinforce.engine.inference import models as token_cache
from reinforce.engine.inference.models import TokenCache


class Counting:
    """Counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, texts: Sequence[str]) -> list[int]:
        self.calls += 1
        return [len(text) for text in texts]


def test_equal_tokenizers_tokenize_a_batch_once() -> None:
    cache, first, second, other = TokenCache(), Counting(), Counting(), Counting()
    assert cache.get("a", ["one", "three"], first) == [3, 5]
    assert cache.get("a", ["one", "three"], second) == [3, 5]
    assert cache.get("b", ["one", "three"], other) == [3, 5]
    assert cache.get("a", ["one"], first) == [3]
    assert (first.calls, second.calls, other.calls) == (2, 0, 1)


def test_a_tokenizer_without_a_key_shares_nothing() -> None:
    cache, tokenize = TokenCache(), Counting()
    for _ in range(2):
        cache.get(None, ["one"], tokenize)
    assert tokenize.calls == 2


def test_only_recent_batches_are_kept() -> None:
    cache, tokenize = TokenCache(), Counting()
    for number in range(token_cache._MAX_BATCHES + 1):
        cache.get("a", [str(number)], tokenize)
        cache.get("a", ["0"], tokenize)
    assert tokenize.calls == token_cache._MAX_BATCHES + 1, "the one that is used again stays"
    cache.get("a", ["1"], tokenize)
    assert tokenize.calls == token_cache._MAX_BATCHES + 2
    assert len(cache._tokens) == token_cache._MAX_BATCHES
