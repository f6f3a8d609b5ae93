"""The choice of the next token by the config's ``strategy``, for strategies without beams."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from teachers.decoding.sampling import sample_narrow_nuclei, sample_nucleus, sample_top_k, sample_wide_nuclei
from teachers.spec import CaptionerSpec

Tensor = torch.Tensor


@dataclass(frozen=True)
class TokenChooser:
    """Chooses tokens from logits [rows, vocabulary] and float64 numbers [rows] in (0, 1]."""

    spec: CaptionerSpec

    def __call__(self, logits: Tensor, u: Tensor) -> Tensor:
        """The tokens [rows]; may wait for a device."""
        spec = self.spec
        if spec.strategy == "greedy":
            return greedy(logits, u)
        if spec.strategy == "top_k":
            return sample_top_k(logits, u, spec.temperature, spec.top_k)
        return sample_nucleus(logits, u, spec.temperature, spec.top_p)

    @property
    def keeps_probabilities(self) -> bool:
        """Whether ``without_waiting`` may leave tokens open."""
        return self.spec.strategy == "nucleus" and self.spec.top_p < 1

    def without_waiting(self, logits: Tensor, u: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor | None]:
        """The tokens [rows], and bool [rows] or None: those that are open.

        If ``keeps_probabilities``, the probabilities are written to the given tensor, from which ``remaining`` chooses
        the open tokens.
        """
        if self.keeps_probabilities:
            return sample_narrow_nuclei(logits, u, self.spec.temperature, self.spec.top_p, probabilities)
        return self(logits, u), None

    def remaining(self, probabilities: Tensor, u: Tensor) -> Tensor:
        """The tokens [rows] of rows that were left open."""
        return sample_wide_nuclei(probabilities, u, self.spec.top_p)


def greedy(logits: Tensor, _: Tensor) -> Tensor:
    """Logits [rows, vocabulary] -> the most probable tokens [rows]."""
    return logits.argmax(dim=-1)
