"""Differentiable gathering of rows over all ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

_state = SimpleNamespace(alone=False)  # of the process, since backward passes on CUDA have threads of their own


@contextmanager
def without_communication() -> Iterator[None]:
    """Let ``gather`` and ``mean`` take copies of this rank's rows for those of others, without waiting for them.

    Batch normalisations with the statistics of all ranks take those of this rank.
    """
    _state.alone = True
    try:
        yield
    finally:
        _state.alone = False


def communicates() -> bool:
    """Whether ranks may wait for each other: not inside ``without_communication``."""
    return not _state.alone


def world_size() -> int:
    """Number of ranks; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def local_world_size() -> int:
    """Number of ranks on this machine, as torchrun and Ray Train set it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or world_size())


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def gather(parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Concatenate tensors [b, D] of all ranks to [ranks * b, D], in the order of the ranks, in one collective.

    The gradient of a row is summed over the ranks, so averaging gradients over the ranks (as DistributedDataParallel
    does) gives the gradient of the mean of the ranks' losses. All ranks must pass the same number of rows b, and all
    tensors must have the same dtype. With one rank, the tensors are returned as they are.
    """
    if world_size() == 1 or not parts:
        return parts
    whole = _Gather.apply(torch.cat(list(parts.values()), dim=1))
    columns = whole.split([part.shape[1] for part in parts.values()], dim=1)
    return dict(zip(parts, columns, strict=True))


def mean(value: torch.Tensor) -> torch.Tensor:
    """Mean over the ranks, without gradients."""
    if world_size() == 1 or _state.alone:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / world_size()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        if _state.alone:
            return rows.repeat(world_size(), 1)
        whole = rows.new_empty(world_size() * len(rows), *rows.shape[1:])
        # since torch 2.13 the second name warns
        gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather_single(whole, rows.contiguous())
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        if _state.alone:
            return gradient.chunk(world_size())[0]
        own = gradient.new_empty(len(gradient) // world_size(), *gradient.shape[1:])
        scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        scatter_single(own, gradient.contiguous())
        return own
