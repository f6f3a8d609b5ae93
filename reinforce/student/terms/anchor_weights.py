"""The anchor of weights (L2-SP, arXiv 1802.01483): the student's weights w stay near those it starts from, w0.

    L = weight / 2 * sum (w - w0)^2

over all weights of the open_clip model that are trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from reinforce.errors import UserError
from reinforce.student.config import Loss
from reinforce.student.terms.base import TargetModels, Tensors, Term


@dataclass(frozen=True)
class AnchorWeights(Term):
    """``anchor_weights``, one number for both towers and the logit scale."""

    weight: float
    key = "anchor.weights"
    needs_start = True

    def losses_of_weights(self, weights: Tensors, start: Tensors) -> Mapping[str, torch.Tensor]:
        return {"anchor_weights": self.weight * distance_from_start(weights, start)}


def make(loss: Loss, models: TargetModels) -> AnchorWeights | None:
    """The term of a config."""
    return None if loss.anchor is None or loss.anchor.weights is None else AnchorWeights(loss.anchor.weights)


def distance_from_start(weights: Mapping[str, torch.Tensor], start: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Half the squared distance of weights by name from those of the ``start`` of a fine-tuning (L2-SP).

    ``start`` has detached copies: ``{name: p.detach().clone() for name, p in model.named_parameters()}``.
    """
    if not isinstance(weights, Mapping) or not isinstance(start, Mapping) or not start:
        raise UserError("distance_from_start: want weights and start by name, and start with one weight at least.")
    if missing := start.keys() - weights.keys():
        raise UserError(f"distance_from_start: weights has no {min(missing)!r}, which start has. Name the same model.")
    if other := [name for name, value in start.items() if weights[name].shape != value.shape]:
        raise UserError(f"distance_from_start: {min(other)!r} has another shape in start. Name the same model.")
    return torch.stack([(weights[name] - value).square().sum() for name, value in start.items()]).sum() / 2
