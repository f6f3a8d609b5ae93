"""Interfaces that all decoding strategies share: a decoder's rows of tokens, and which tokens may come next.

In this package *new tokens* are the tokens of a text without its start and end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch


class Decoder(Protocol):
    """A language model with the state of a batch of rows. It begins with one row per image, the start token alone."""

    def next_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Start token and new tokens so far, int64 [rows, 1 + new tokens] -> logits [rows, vocabulary]."""
        ...

    def select_rows(self, rows: torch.Tensor) -> None:
        """Continue with these rows, int64 indices on the device. A row may be selected several times."""
        ...


@dataclass(frozen=True)
class DecodingRules:
    """Which tokens may come next. ``impossible`` is bool [vocabulary]: tokens that are neither text nor the end.

    A text ends with the token ``end``, which is impossible before ``min_tokens`` new tokens, or at ``max_tokens``.
    ``repetition_penalty`` divides the positive logits of tokens that the text contains and multiplies the negative
    ones (CTRL, arXiv 1909.05858).
    """

    start: int
    end: int
    impossible: torch.Tensor
    min_tokens: int
    max_tokens: int
    repetition_penalty: float = 1.0

    def apply(self, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Input and output of ``Decoder.next_logits`` -> float32 [rows, vocabulary], -inf where impossible."""
        new = tokens[:, 1:]
        logits = self._penalize(logits.float(), new) if new.shape[1] else logits.float()
        mask = self.mask()
        if new.shape[1] < self.min_tokens:
            mask[self.end].fill_(-torch.inf)
        return logits + mask  # several times as fast as masked_fill

    def mask(self) -> torch.Tensor:
        """The bias that is added to logits, float32 [vocabulary]."""
        mask = torch.zeros(len(self.impossible), device=self.impossible.device)
        return mask.masked_fill_(self.impossible, -torch.inf)

    def apply_at(
        self, logits: torch.Tensor, new: torch.Tensor, position: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """As ``apply``, with the number of each row's new tokens on the device, ``position`` int64 [rows].

        ``new`` is [rows, any length], padded with the start token, which is impossible; ``mask`` is ``mask()``.
        """
        logits = self._penalize(logits.float(), new) + mask
        logits[:, self.end].masked_fill_(position < self.min_tokens, -torch.inf)
        return logits

    def _penalize(self, logits: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        if self.repetition_penalty == 1:
            return logits
        present = logits.gather(1, new)
        present = torch.where(present > 0, present / self.repetition_penalty, present * self.repetition_penalty)
        return logits.scatter(1, new, present)


def compact(active: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Indices of the active rows, in an order that keeps most rows in place: the last ones fill the gaps."""
    order = np.arange(active.sum())
    order[~active[: len(order)]] = len(order) + np.flatnonzero(active[len(order) :])
    return order
