"""The anchor of weights (L2-SP, arXiv 1802.01483): the student's weights w stay near those it starts from, w0.

    L = weight / 2 * sum (w - w0)^2

over all weights of the open_clip model that are trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from reinforce.student.loss_config import Loss
from reinforce.student.terms.base import Models, Tensors, Term


@dataclass(frozen=True)
class AnchorWeights(Term):
    """``anchor_weights``, one number for both towers and the logit scale."""

    weight: float
    key = "anchor.weights"
    needs_start = True

    def losses_of_weights(self, weights: Tensors, start: Tensors) -> Mapping[str, torch.Tensor]:
        squares = [(weights[name] - value).square().sum() for name, value in start.items()]
        return {"anchor_weights": self.weight / 2 * torch.stack(squares).sum()}


def make(loss: Loss, models: Models) -> AnchorWeights | None:
    """The term of a config."""
    return None if loss.anchor is None or loss.anchor.weights is None else AnchorWeights(loss.anchor.weights)
