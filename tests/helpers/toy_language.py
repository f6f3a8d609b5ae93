"""A toy language small enough to enumerate all texts. Logits depend on the image and on all tokens so far."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch

from teachers.decoding.rules import DecodingRules

WORDS, START, END = (0, 1, 2), 3, 4
VOCABULARY = 5


class ToyDecoder:
    """A ``Decoder`` of the toy language. Raises AssertionError if rows and tokens do not match."""

    def __init__(self, images: Sequence[int]) -> None:
        self._rows = [(image, [START]) for image in images]
        self.steps: list[int] = []

    def next_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        assert len(tokens) == len(self._rows)
        for (_, before), now in zip(self._rows, tokens.tolist(), strict=True):
            assert now[: len(before)] == before
            assert len(now) == len(self.steps) + 1
        self._rows = [(image, now) for (image, _), now in zip(self._rows, tokens.tolist(), strict=True)]
        self.steps.append(len(tokens))
        return torch.stack([logits_of(image, now[1:]) for image, now in self._rows])

    def select_rows(self, rows: torch.Tensor) -> None:
        self._rows = [self._rows[row] for row in rows.tolist()]


def logits_of(image: int, words: Sequence[int]) -> torch.Tensor:
    seed = image
    for word in words:
        seed = seed * 7 + word + 1
    return 2 * torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed))


def rules(min_tokens: int = 1, max_tokens: int = 4, repetition_penalty: float = 1.0) -> DecodingRules:
    impossible = torch.tensor([token == START for token in range(VOCABULARY)])
    return DecodingRules(START, END, impossible, min_tokens, max_tokens, repetition_penalty)


def log_probabilities(image: int, words: Sequence[int], rules: DecodingRules) -> list[float]:
    """Log-probabilities of the next token, by the definition of the rules."""
    logits = logits_of(image, words).tolist()
    for word in set(words):
        logits[word] *= 1 / rules.repetition_penalty if logits[word] > 0 else rules.repetition_penalty
    logits[START] = -torch.inf
    if len(words) < rules.min_tokens:
        logits[END] = -torch.inf
    result: list[float] = torch.tensor(logits, dtype=torch.float64).log_softmax(0).tolist()
    return result


def all_texts(image: int, rules: DecodingRules) -> Iterator[tuple[list[int], float]]:
    """Yield every possible text with its log-probability. A text of ``max_tokens`` ends with certainty."""
    for length in range(rules.min_tokens, rules.max_tokens + 1):
        for words in itertools.product(WORDS, repeat=length):
            tokens = [*words, *([] if length == rules.max_tokens else [END])]
            yield list(words), sum(log_probabilities(image, words[:i], rules)[t] for i, t in enumerate(tokens))
