"""Fake quantisation: in the last part of a training run, a student computes with the int8 values of devices.

What is rounded is what exports round:

- weights, to 255 values symmetric to zero, each output channel with a scale of its own: of convolutions, linear layers,
  attention and projections; of token embeddings, each row. Blocks that exports merge are merged first and compute
  as one convolution. A batch normalisation that follows a single convolution scales output channels, which commutes
  with rounding them, so it stays where it is.
- with ``int8`` also the inputs of convolutions (each image with a range of its own) and of linear layers (each token),
  to 256 values, as runtimes with dynamic quantisation do. The input of an attention's output projection is not rounded.

Rounding has the gradient of the identity. Batch normalisations use their running statistics from here on, as the merged
kernels do. Modules keep their parameters and their names: a layer gets a subclass of its class, whose weight is rounded
where it is read in training mode. Nothing is added to checkpoints, and in eval mode the model is the plain one. A
frozen tower, which trains in eval mode, rounds with the others (``round_in_eval``).

A block is merged by the kernel that reparameterisation would give, as a function of the weights that are trained.
A FastViT trains several branches of convolutions and batch normalisations whose sum is one convolution. timm merges
them for inference (``reparameterize_model``), without gradients and by deleting the branches. With the running
statistics of a batch normalisation, y = (x - mean) / std * gamma + beta, a branch with kernel k is a convolution with
kernel k * gamma / std and bias beta - mean * gamma / std; branches add.

torchao's quantisation-aware training replaces linear layers alone, and torch's own a traced graph, with other names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import open_clip
import torch
from timm.models.fastvit import LayerScale2d, MobileOneBlock, ReparamLargeKernelConv, RepConditionalPosEnc, RepMixer
from torch.nn.functional import pad

from reinforce.student.config import Quantize

#: Kernel [out, in / groups, k, k] and bias [out].
Kernel = tuple[torch.Tensor, torch.Tensor]


def round_weights(weight: torch.Tensor, channel: int) -> torch.Tensor:
    """The nearest of 255 values k * s, s = largest absolute value / 127 along each index of the axis ``channel``."""
    weight = weight.float()
    with torch.no_grad():
        others = [axis for axis in range(weight.ndim) if axis != channel]
        scales = (weight.abs().amax(others) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        zeros = torch.zeros_like(scales, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scales, zeros, channel, -127, 127)


def round_inputs(values: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
    """The nearest of 256 values between the least and the largest along ``axes``, one of which is zero."""
    with torch.no_grad():
        exact = values.float()
        low, high = exact.amin(axes, keepdim=True).clamp_max(0), exact.amax(axes, keepdim=True).clamp_min(0)
        scale = ((high - low) / 255).clamp_min(torch.finfo(torch.float32).tiny)
        zero = (-low / scale).round()
        error = ((exact / scale).round() + zero).clamp(0, 255).sub(zero).mul(scale) - exact
    return values + error.to(values.dtype)


def quantize(model: torch.nn.Module, kind: Quantize, in_eval: bool = False) -> int:
    """Let a model compute with rounded weights, and with ``int8`` inputs, in training mode; ``in_eval``: always.

    Returns the number of layers that round; 0 means that the model has nothing to round and is unchanged.
    """
    return _change(model, _rounding_of(True, kind == "int8", in_eval))


def merge(model: torch.nn.Module) -> int:
    """Let merged blocks compute as one convolution in training mode, without rounding.

    Returns the number of blocks; 0 means that the model has none and is unchanged.
    """
    return _change(model, _rounding_of(False, False, False))


def _change(model: torch.nn.Module, rounding: _Rounding) -> int:
    """Give layers their rounding, merged blocks alone if weights are not rounded; returns their number."""
    layers = 0
    pending: list[Any] = [model]
    while pending:
        module = pending.pop()
        children = dict(module.named_children())
        if (mixin := _mixin(module)) is not None and (rounding.weights or issubclass(mixin, _Merged)):
            if not isinstance(module, mixin):
                own: Any = type(module)
                module.__class__ = _combined(mixin, own)
            module.rounding = rounding
            layers += 1
            if issubclass(mixin, _Merged):
                children = {name: child for name, child in children.items() if name in _AFTER_MERGED}
        pending += children.values()
    return layers


def round_in_eval(model: torch.nn.Module, rounds: bool) -> None:
    """Set whether the layers of a quantized model round in eval mode, too."""
    for module in model.modules():
        if isinstance(module, _Rounded):
            module.rounding = _rounding_of(module.rounding.weights, module.rounding.inputs, rounds)


def can_quantize(model: torch.nn.Module) -> bool:
    """Whether a model has anything to round."""
    return any(_mixin(module) is not None for module in model.modules())


def batch_norms(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Modules that normalise by the statistics of a batch in training, also those of timm with an activation."""
    return [module for module in model.modules() if getattr(module, "running_var", None) is not None]


#: Children of a merged block that follow its convolution.
_AFTER_MERGED = ("se", "act")


@dataclass(frozen=True)
class _Rounding:
    """Whether weights and inputs are rounded, and whether this applies in eval mode."""

    weights: bool
    inputs: bool
    in_eval: bool


#: One object for equal values: a compiled layer is compiled again for another object.
_rounding_of = cache(_Rounding)


class _Rounded(torch.nn.Module):
    """Base of the classes that are put before a layer's own; itself for modules of which a parameter is rounded."""

    rounding: _Rounding

    def rounds(self) -> bool:
        return self.training or self.rounding.in_eval


class _RoundedLayer(_Rounded):
    axes: tuple[int, ...] = (-1,)  # of the inputs of one range: those of a token

    def forward(self, inputs: torch.Tensor) -> Any:
        return super().forward(round_inputs(inputs, self.axes) if self.rounding.inputs and self.rounds() else inputs)


class _RoundedConvolution(_RoundedLayer):
    axes = (1, 2, 3)


class _RoundedAttention(_Rounded):
    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **options: Any) -> Any:
        if self.rounding.inputs and self.rounds():
            itself = query is key is value  # torch recognises self-attention by the identity of its inputs
            query = round_inputs(query, (-1,))
            key, value = (query if itself else round_inputs(rows, (-1,)) for rows in (key, value))
        return super().forward(query, key, value, *args, **options)


class _RoundedEmbedding(_Rounded):
    def forward(self, tokens: torch.Tensor) -> Any:
        rows = super().forward(tokens)
        return round_weights(rows.flatten(0, -2), 0).view_as(rows) if self.rounds() else rows


class _Merged(_Rounded):
    """A block of branches that computes as the convolution to which exports merge it."""

    merge: Callable[[], Kernel]

    def forward(self, images: torch.Tensor) -> Any:
        if not self.rounds():
            return super().forward(images)
        block: Any = self
        kernel, bias = block.merge()
        inputs = round_inputs(images, (1, 2, 3)) if self.rounding.inputs else images
        groups, stride = getattr(block, "groups", len(kernel)), getattr(block, "stride", 1)
        weights = round_weights(kernel, 0) if self.rounding.weights else kernel
        outputs = torch.nn.functional.conv2d(inputs, weights, bias, stride, kernel.shape[-1] // 2, groups=groups)
        for name in _AFTER_MERGED:
            if hasattr(block, name):
                outputs = getattr(block, name)(outputs)
        return outputs


#: Classes and their parameters that are rounded, with the axis of the output channels.
_WEIGHTS: dict[type[torch.nn.Module], tuple[type[_Rounded], str, int]] = {
    torch.nn.Conv2d: (_RoundedConvolution, "weight", 0),
    torch.nn.Linear: (_RoundedLayer, "weight", 0),
    torch.nn.MultiheadAttention: (_RoundedAttention, "in_proj_weight", 0),
    open_clip.model.CLIP: (_Rounded, "text_projection", 1),
    open_clip.transformer.TextTransformer: (_Rounded, "text_projection", 1),
    open_clip.transformer.VisionTransformer: (_Rounded, "proj", 1),
}


def _mixin(module: torch.nn.Module) -> Any:
    """The class that is put before a module's own, or None if nothing of it is rounded."""
    if isinstance(module, torch.nn.Embedding):
        return _RoundedEmbedding
    kind: Any
    for kind in MERGES:
        if isinstance(module, kind) and module.reparam_conv is None:
            return _rounding(kind)
    layer: Any
    for layer, (_, name, _) in _WEIGHTS.items():
        if isinstance(module, layer) and module._parameters.get(name) is not None:
            return _rounding(layer)
    return None


@cache
def _rounding(kind: Any) -> type[_Rounded]:
    """The class for blocks or layers of a kind of ``MERGES`` or ``_WEIGHTS``."""
    if kind in MERGES:
        return type("Merged", (_Merged,), {"merge": MERGES[kind]})
    base, name, channel = _WEIGHTS[kind]

    def read(self: _Rounded) -> torch.Tensor | None:
        weight = self._parameters[name]
        return round_weights(weight, channel) if weight is not None and self.rounds() else weight

    return type(base.__name__, (base,), {name: property(read)})


@cache
def _combined(mixin: Any, own: Any) -> type[torch.nn.Module]:
    return type(own.__name__, (mixin, own), {"__doc__": own.__doc__})


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


#: Channels that oneDNN processes at once with AVX-512; with AVX2 it is half as many.
_BLOCK = 16


def avoid_faulty_convolutions(model: torch.nn.Module) -> int:
    """Let strided 1 x 1 convolutions of few channels compute in channels-first order on CPUs, around a fault of oneDNN.

    For an image in channels-last order with fewer than 16 channels, oneDNN writes past the end of a buffer when it
    computes the gradient of such a convolution's weights: wrong gradients, a crash or a hang
    (https://github.com/uxlfoundation/oneDNN/issues/6035). FastViT's stem has one, so MobileCLIP2-S0 and -S2 are
    affected. Images in channels-first order and depthwise convolutions are computed by other code. Outputs are in
    channels-last order. Returns the number of convolutions.
    """
    affected = [
        module
        for module in model.modules()
        if isinstance(module, torch.nn.Conv2d)
        and set(module.kernel_size) == {1}
        and max(module.stride) > 1
        and module.groups < module.in_channels
        and module.in_channels // module.groups < _BLOCK
    ]
    for convolution in affected:
        convolution.register_forward_pre_hook(
            lambda _, inputs: tuple(x.contiguous() if x.device.type == "cpu" else x for x in inputs)
        )
        convolution.register_forward_hook(
            lambda _, __, x: x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x
        )
    return len(affected)
