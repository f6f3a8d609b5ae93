"""The convolutional blocks in the text tower of MobileCLIP-S0, which open_clip does not have.

Parameters have the names and shapes of the published weights. Source: ``mobileclip/modules/text/repmixer.py`` of
apple/ml-mobileclip, and FastViT (arXiv 2303.14189).
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

_START_SCALE = 1e-5


class MixerBlock(nn.Module):
    """Mixes neighbouring tokens [B, L, D] by depthwise convolutions, then channels; a block of open_clip's tower."""

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        self.token_mixer = _TokenMixer(dim, kernel)
        self.convffn = _ChannelMixer(dim, kernel)
        self.layer_scale = nn.Parameter(torch.full((dim, 1, 1), _START_SCALE))

    def forward(
        self, x: torch.Tensor, k_x: None = None, v_x: None = None, attn_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Arguments are those of open_clip's blocks; the mask is not used."""
        mixed = self.token_mixer(x.transpose(1, 2).unsqueeze(2))  # [B, D, 1, L]
        mixed = mixed + self.layer_scale * self.convffn(mixed)
        return mixed.squeeze(2).transpose(1, 2)

    def get_weight_dtype(self) -> torch.dtype:
        return self.convffn.fc1.weight.dtype


class _TokenMixer(nn.Module):
    """x + scale * (mixer(x) - norm(x)), or the one convolution that equals it in evaluation."""

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        self.norm = nn.ModuleDict({"rbr_skip": nn.BatchNorm2d(dim)})
        branch = nn.Sequential(OrderedDict(conv=_depthwise(dim, kernel, bias=False), bn=nn.BatchNorm2d(dim)))
        self.mixer = nn.ModuleDict({"rbr_skip": nn.BatchNorm2d(dim), "rbr_conv": nn.ModuleList([branch])})
        self.layer_scale = nn.Parameter(torch.full((dim, 1, 1), _START_SCALE))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if hasattr(self, "reparam_conv"):
            fused: torch.Tensor = self.reparam_conv(x)
            return fused
        mixed = self.mixer["rbr_skip"](x) + self.mixer["rbr_conv"][0](x)  # type: ignore[index]
        return x + self.layer_scale * (mixed - self.norm["rbr_skip"](x))

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Fuse the branches into one convolution; timm's ``reparameterize_model`` calls it."""
        if hasattr(self, "reparam_conv"):
            return
        conv, norm = self.mixer["rbr_conv"][0]  # type: ignore[index]
        dim, _, _, kernel = conv.weight.shape
        gain, shift = _affine(norm)
        weight, bias = conv.weight * gain.reshape(-1, 1, 1, 1), shift
        for bn, sign in ((self.mixer["rbr_skip"], 1), (self.norm["rbr_skip"], -1)):
            gain, shift = _affine(bn)
            weight[..., kernel // 2] += sign * gain.reshape(-1, 1, 1)
            bias = bias + sign * shift
        weight = weight * self.layer_scale.unsqueeze(-1)
        weight[..., kernel // 2] += 1
        fused = _depthwise(dim, kernel, bias=True)
        fused.weight.copy_(weight)
        fused.bias.copy_(bias * self.layer_scale.flatten())  # type: ignore[union-attr]
        del self.norm, self.mixer, self.layer_scale
        self.reparam_conv = fused


class _ChannelMixer(nn.Module):
    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        depthwise = _depthwise(dim, kernel, bias=False)
        self.conv = nn.Sequential(OrderedDict(conv=depthwise, bn=nn.BatchNorm2d(dim)))
        self.fc1 = nn.Conv2d(dim, 4 * dim, 1)
        self.fc2 = nn.Conv2d(4 * dim, dim, 1)
        for convolution in (depthwise, self.fc1, self.fc2):
            nn.init.trunc_normal_(convolution.weight, std=0.02)
        nn.init.zeros_(self.fc1.bias)  # type: ignore[arg-type]
        nn.init.zeros_(self.fc2.bias)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc2(nn.functional.gelu(self.fc1(self.conv(x))))
        return out


def _depthwise(dim: int, kernel: int, bias: bool) -> nn.Conv2d:
    return nn.Conv2d(dim, dim, (1, kernel), padding=(0, kernel // 2), groups=dim, bias=bias)


def _affine(norm: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """The gain and shift [D] of a batch normalisation in evaluation."""
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_var is not None
    assert norm.running_mean is not None
    gain = norm.weight / (norm.running_var + norm.eps).sqrt()
    return gain, norm.bias - norm.running_mean * gain
