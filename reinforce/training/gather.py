"""Rows of all ranks, with gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def ranks() -> int:
    """Processes that train together; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if ranks() > 1 else 0


def gather(parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """[b, D] of every rank -> [ranks * b, D], rank after rank; all parts in one message. The same tensors on one rank.

    A row's gradient is the sum over the ranks that used it, so that gradients averaged over ranks are those of the
    mean of the ranks' losses. All ranks must have equally many rows; parts of one dtype.
    """
    if ranks() == 1 or not parts:
        return parts
    whole = _Gather.apply(torch.cat(list(parts.values()), dim=1))
    columns = whole.split([part.shape[1] for part in parts.values()], dim=1)
    return dict(zip(parts, columns, strict=True))


def mean(value: torch.Tensor) -> torch.Tensor:
    """The mean over the ranks, without gradients."""
    if ranks() == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / ranks()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        whole = rows.new_empty(ranks() * len(rows), *rows.shape[1:])
        _collective("all_gather_single", "all_gather_into_tensor")(whole, rows.contiguous())
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        own = gradient.new_empty(len(gradient) // ranks(), *gradient.shape[1:])
        _collective("reduce_scatter_single", "reduce_scatter_tensor")(own, gradient.contiguous())
        return own


def _collective(name: str, before: str) -> Any:
    """Of torch.distributed, by its name since torch 2.13, where the one before warns."""
    return getattr(dist, name, None) or getattr(dist, before)
