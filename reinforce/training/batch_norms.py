"""Batch normalisation with the statistics of all ranks."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from reinforce.training import gather
from reinforce.training.ranks import Ranks


def synchronize_batch_norms(model: torch.nn.Module, ranks: Ranks) -> None:
    """Let batch normalisations inside ``model`` take their statistics over all ranks, with the same weights."""
    if ranks.size == 1:
        return
    if ranks.accelerator.device.type == "cpu":
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                own: Any = type(module)
                module.__class__ = _shared(own)
        return
    from timm.layers import convert_sync_batchnorm  # torch's own drops the activation of timm's layers

    convert_sync_batchnorm(model)
    for module in model.modules():
        if isinstance(module, torch.nn.SyncBatchNorm):
            converted: Any = type(module)
            module.__class__ = _synchronized(converted)


class _Synchronized(torch.nn.SyncBatchNorm):
    """torch's layer, which waits for no rank inside ``gather.without_communication``."""

    def forward(self, values: torch.Tensor) -> Any:
        if gather.communicates():
            return super().forward(values)
        alone = values.numel() == values.shape[1]  # one value a channel, which has no variance without other ranks
        rows = torch.cat([values, values]) if alone else values
        return _BatchNorm.forward(self, rows)[: len(values)]


class _Shared(_BatchNorm):
    """Base that is put before a layer's class on CPUs, for which torch has no SyncBatchNorm.

    All ranks have equally many samples. With x of N samples and places of all ranks, mean m = sum(x) / N and variance
    v = sum((x - m)^2) / N, the output is (x - m) / sqrt(v + eps) * weight + bias; gradients pass through m and v.
    """

    def forward(self, values: torch.Tensor) -> Any:
        if not self.training:
            return super().forward(values)
        self._check_input_dim(values)
        exact, shape = values.float(), [1, -1, *[1] * (values.ndim - 2)]
        axes = [axis for axis in range(values.ndim) if axis != 1]
        count = values.numel() // values.shape[1] * gather.world_size()
        mean = _total(exact.sum(axes)) / count
        centred = exact - mean.view(shape)
        variance = _total(centred.square().sum(axes)) / count
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                factor = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean, factor)
                self.running_var.lerp_(variance * (count / (count - 1)), factor)
        outputs = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            outputs = outputs * self.weight.view(shape) + self.bias.view(shape)
        outputs = outputs.to(values.dtype)
        for name in ("drop", "act"):  # of timm's layers
            if hasattr(self, name):
                outputs = getattr(self, name)(outputs)
        return outputs


@torch.compiler.disable
def _total(sums: torch.Tensor) -> torch.Tensor:
    """The sum [C] over all ranks."""
    return gather.gather({"sums": sums[None]})["sums"].sum(0)


@cache
def _synchronized(own: Any) -> Any:
    """A class whose own ``forward``, such as that of timm's layers, calls that of ``_Synchronized``."""
    return _Synchronized if own is torch.nn.SyncBatchNorm else type(own.__name__, (own, _Synchronized), {})


@cache
def _shared(own: Any) -> Any:
    return type(own.__name__, (_Shared, own), {"__doc__": own.__doc__})
