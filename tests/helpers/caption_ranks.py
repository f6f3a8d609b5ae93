"""The captioning losses of two ranks. Each rank is a process, which imports only what the losses need."""

from __future__ import annotations

import torch

from reinforce.captioning.config import Loss
from reinforce.captioning.loss import captioning_losses

RANKS, PAIRS = 2, 3  # pairs per rank
LENGTHS = [2, 3, 4, 30, 40, 50]  # the ranks differ in their number of tokens


def compute(rows: slice) -> dict[str, torch.Tensor]:
    """Losses and gradients by feature, for some rows of the batch."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"image": (RANKS * PAIRS, 5), "text": (RANKS * PAIRS, 5), "nll": (RANKS * PAIRS,)}
    whole = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    features = {name: value[rows].clone().requires_grad_() for name, value in whole.items()}
    losses = captioning_losses(Loss(), features, torch.tensor(10.0), LENGTHS[rows])
    torch.stack(list(losses.values())).sum().backward()
    gradients = {f"of {name}": value.grad for name, value in features.items() if value.grad is not None}
    return {name: value.detach() for name, value in losses.items()} | gradients


def of_rank(rank: int) -> dict[str, torch.Tensor]:
    return compute(slice(rank * PAIRS, (rank + 1) * PAIRS))
