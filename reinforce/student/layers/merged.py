"""Kernels that reparameterisation would give, as functions of the weights that are trained.

A FastViT trains several branches of convolutions and batch normalisations whose sum is one convolution. timm merges
them for inference (``reparameterize_model``), without gradients and by deleting the branches. With the running
statistics of a batch normalisation, y = (x - mean) / std * gamma + beta, a branch with kernel k is a convolution with
kernel k * gamma / std and bias beta - mean * gamma / std; branches add.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models.fastvit import LayerScale2d, MobileOneBlock, ReparamLargeKernelConv, RepConditionalPosEnc, RepMixer
from torch.nn.functional import pad

#: Kernel [out, in / groups, k, k] and bias [out].
Kernel = tuple[torch.Tensor, torch.Tensor]


def merge_block(block: Any) -> Kernel:
    """Kernel and bias of a ``MobileOneBlock``, before its squeeze-and-excitation and activation."""
    kernels = [_fold(branch.conv.weight, branch.bn) for branch in block.conv_kxk or ()]
    if block.conv_scale is not None:
        kernels.append(_fold(block.conv_scale.conv.weight, block.conv_scale.bn))
    if block.identity is not None:
        identity = _identity(block.in_chs, block.groups, block.kernel_size, block.identity.weight)
        kernels.append(_fold(identity, block.identity))
    return _add(kernels, block.kernel_size)


def merge_large_kernel(block: Any) -> Kernel:
    """Kernel and bias of a ``ReparamLargeKernelConv``, before its squeeze-and-excitation and activation."""
    branches = [branch for name in ("large_conv", "small_conv") if (branch := getattr(block, name, None)) is not None]
    return _add([_fold(branch.conv.weight, branch.bn) for branch in branches], block.kernel_size)


def merge_mixer(block: Any) -> Kernel:
    """Kernel and bias of a ``RepMixer``: x + scale * (mixer(x) - norm(x))."""
    (kernel, bias), (norm_kernel, norm_bias) = merge_block(block.mixer), merge_block(block.norm)
    kernel, bias = kernel - norm_kernel, bias - norm_bias
    if isinstance(block.layer_scale, LayerScale2d):
        gamma = block.layer_scale.gamma.flatten()
        kernel, bias = kernel * gamma.view(-1, 1, 1, 1), bias * gamma
    return kernel + _identity(block.dim, block.dim, block.kernel_size, kernel), bias


def merge_position(block: Any) -> Kernel:
    """Kernel and bias of a ``RepConditionalPosEnc``: x + convolution(x)."""
    kernel = block.pos_enc.weight
    return kernel + _identity(block.dim, block.groups, kernel.shape[-1], kernel), block.pos_enc.bias


#: How the branches of a block that is not reparameterised are merged, by its class.
MERGES = {
    MobileOneBlock: merge_block,
    ReparamLargeKernelConv: merge_large_kernel,
    RepMixer: merge_mixer,
    RepConditionalPosEnc: merge_position,
}


def _fold(kernel: torch.Tensor, norm: Any) -> Kernel:
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return kernel * scale.view(-1, 1, 1, 1), norm.bias - norm.running_mean * scale


def _add(kernels: list[Kernel], size: int) -> Kernel:
    """The sum of branches; smaller kernels are padded to ``size`` x ``size``."""
    padded = [pad(kernel, [(size - kernel.shape[-1]) // 2] * 4) for kernel, _ in kernels]
    return torch.stack(padded).sum(0), torch.stack([bias for _, bias in kernels]).sum(0)


def _identity(channels: int, groups: int, size: int, like: torch.Tensor) -> torch.Tensor:
    """The kernel [channels, channels / groups, size, size] that returns its input."""
    width = channels // groups
    kernel = torch.eye(width, dtype=like.dtype, device=like.device).repeat(groups, 1)
    return pad(kernel.view(channels, width, 1, 1), [size // 2] * 4)
