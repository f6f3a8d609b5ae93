"""What every way of decoding shares: the rows that grow, and the words that may come next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch


class Decoder(Protocol):
    """A model's rows of words that grow together: at first one for each image, whose start token is all it has."""

    def next_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """The start token and the words so far, int64 [rows, 1 + words] -> [rows, vocabulary]."""
        ...

    def select_rows(self, rows: torch.Tensor) -> None:
        """Go on with these rows: int64 indices on the CPU; one may be taken several times."""
        ...


@dataclass(frozen=True)
class DecodingRules:
    """Which words may come next. ``impossible`` is bool [vocabulary]: outputs that are no word and do not end a text.

    A text ends by the token ``end``, which is impossible before ``min_tokens`` words, or at ``max_tokens`` words.
    ``repetition_penalty`` divides the logits of words that the text has, where they are positive, and multiplies
    them where they are negative (CTRL, arXiv 1909.05858).
    """

    start: int
    end: int
    impossible: torch.Tensor
    min_tokens: int
    max_tokens: int
    repetition_penalty: float = 1.0

    def apply(self, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """What ``Decoder.next_logits`` took and gave -> float32 [rows, vocabulary], -inf where impossible."""
        logits = logits.float()
        words = tokens[:, 1:]
        if self.repetition_penalty != 1 and words.shape[1]:
            had = logits.gather(1, words)
            had = torch.where(had > 0, had / self.repetition_penalty, had * self.repetition_penalty)
            logits = logits.scatter(1, words, had)
        barred = torch.zeros_like(logits[0]).masked_fill_(self.impossible, -torch.inf)
        if words.shape[1] < self.min_tokens:
            barred[self.end] = -torch.inf
        return logits + barred  # several times as fast as masked_fill


def compact(going: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Which rows go on -> their indices, in an order that leaves most where they are: the last fill the gaps."""
    order = np.arange(going.sum())
    order[~going[: len(order)]] = len(order) + np.flatnonzero(going[len(order) :])
    return order
