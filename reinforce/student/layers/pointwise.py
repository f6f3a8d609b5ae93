"""A way around a fault of oneDNN that spoils training runs on CPUs: strided 1 x 1 convolutions of few channels.

For an image in channels-last order with fewer than 16 channels, oneDNN writes past the end of a buffer when it computes
the gradient of such a convolution's weights: wrong gradients, a crash or a hang
(https://github.com/uxlfoundation/oneDNN/issues/6035). FastViT's stem has one, so MobileCLIP2-S0 and -S2 are affected.
Images in channels-first order and depthwise convolutions are computed by other code.
"""

from __future__ import annotations

from typing import Any

import torch

#: Channels that oneDNN processes at once with AVX-512; with AVX2 it is half as many.
_BLOCK = 16


def avoid_faulty_convolutions(model: torch.nn.Module) -> int:
    """Let the affected convolutions of a channels-last model compute in channels-first order on CPUs.

    Their outputs are in channels-last order. Returns the number of convolutions.
    """
    affected = [module for module in model.modules() if _is_affected(module)]
    for convolution in affected:
        convolution.register_forward_pre_hook(_to_channels_first)
        convolution.register_forward_hook(_to_channels_last)
    return len(affected)


def _is_affected(module: torch.nn.Module) -> bool:
    return (
        isinstance(module, torch.nn.Conv2d)
        and set(module.kernel_size) == {1}
        and max(module.stride) > 1
        and module.groups < module.in_channels
        and module.in_channels // module.groups < _BLOCK
    )


def _to_channels_first(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(x.contiguous() if x.device.type == "cpu" else x for x in inputs)


def _to_channels_last(_: torch.nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
    return output.contiguous(memory_format=torch.channels_last) if output.device.type == "cpu" else output
