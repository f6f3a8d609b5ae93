"""torch's SyncBatchNorm on the stand-in for CUDA: its operations for the CPU, which torch itself lacks.

Values are [N, C, ...]; statistics and their gradients are [C]. Importing this module registers the operations.
"""

from __future__ import annotations

import torch

_LIBRARY = torch.library.Library("aten", "IMPL")
Pair = tuple[torch.Tensor, torch.Tensor]


def _axes(values: torch.Tensor) -> list[int]:
    return [axis for axis in range(values.ndim) if axis != 1]


def _wide(of_channels: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return of_channels.view(1, -1, *[1] * (values.ndim - 2))


def _stats(values: torch.Tensor, eps: float) -> Pair:
    axes = _axes(values)
    return values.mean(axes), (values.var(axes, unbiased=False) + eps).rsqrt()


def _gather_stats(
    values: torch.Tensor,
    means: torch.Tensor,
    invstds: torch.Tensor,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    momentum: float,
    eps: float,
    counts: torch.Tensor,
) -> Pair:
    share, count = (counts / counts.sum())[:, None], counts.sum()
    mean = (share * means).sum(0)
    variance = (share * (invstds**-2 - eps + (means - mean) ** 2)).sum(0)
    running_mean.lerp_(mean, momentum)
    running_var.lerp_(variance * count / (count - 1), momentum)
    return mean, (variance + eps).rsqrt()


def _normalize(
    values: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    invstd: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    return (values - _wide(mean, values)) * _wide(invstd * weight, values) + _wide(bias, values)


def _reduce(
    gradient: torch.Tensor, values: torch.Tensor, mean: torch.Tensor, invstd: torch.Tensor, *_: object
) -> tuple[torch.Tensor, ...]:
    axes = _axes(values)
    total, product = gradient.sum(axes), (gradient * (values - _wide(mean, values))).sum(axes)
    return total, product, product * invstd, total.clone()


def _of_inputs(
    gradient: torch.Tensor,
    values: torch.Tensor,
    mean: torch.Tensor,
    invstd: torch.Tensor,
    weight: torch.Tensor,
    total: torch.Tensor,
    product: torch.Tensor,
    counts: torch.Tensor,
) -> torch.Tensor:
    count = counts.sum()
    slope = _wide(product * invstd**2 / count, values) * (values - _wide(mean, values))
    return (gradient - _wide(total / count, values) - slope) * _wide(invstd * weight, values)


for _name, _kernel in {
    "batch_norm_stats": _stats,
    "batch_norm_gather_stats_with_counts": _gather_stats,
    "batch_norm_elemt": _normalize,
    "batch_norm_backward_reduce": _reduce,
    "batch_norm_backward_elemt": _of_inputs,
}.items():
    _LIBRARY.impl(_name, _kernel, "CPU")
