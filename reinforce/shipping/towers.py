"""The image and text towers of an open_clip model as separate modules, reparameterized for inference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import open_clip
import torch
from timm.utils.model import reparameterize_model
from torch.nn.functional import normalize

from teachers.protocols import ImageSpec


@dataclass(frozen=True)
class Tower:
    """A tower to export: ``name`` of its file, ``input`` of the graph, and ``example(n)`` inputs of n rows."""

    name: str
    input: str
    module: torch.nn.Module
    example: Callable[[int], torch.Tensor]


class ImageTower(torch.nn.Module):
    """uint8 RGB pixels [N, height, width, 3] -> float32 embeddings [N, dim] of unit norm.

    The normalization by mean and standard deviation is part of the graph, so that callers cannot get it wrong.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, clip: Any, spec: ImageSpec) -> None:
        super().__init__()
        self.clip, self.spec = clip, spec
        self.register_buffer("mean", torch.tensor(spec.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(spec.std).view(3, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.encode(images.permute(0, 3, 1, 2).float() / 255)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Float pixels [N, 3, height, width] between 0 and 1 -> float32 [N, dim] of unit norm."""
        return normalize(self.clip.encode_image((pixels - self.mean) / self.std), dim=-1)


class TextTower(torch.nn.Module):
    """int64 tokens [N, context length] -> float32 [N, dim] of unit norm."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return normalize(self.clip.encode_text(tokens), dim=-1)


def reparameterize(clip: Any) -> Any:
    """Return the model for inference, with the branches of a FastViT (or another model of timm) fused.

    The given model is unchanged and shares all other weights. Raises ValueError for a captioner.
    """
    if isinstance(clip, open_clip.CoCa):
        raise ValueError("it is a captioner, whose decoder cannot be exported: use a CLIP model")
    fused = copy.copy(clip.eval().requires_grad_(False))
    fused._modules = dict(clip._modules)  # a shallow copy shares the dict of submodules
    fused.visual = reparameterize_model(clip.visual)
    return fused


def split_towers(clip: Any, spec: ImageSpec, tokens: torch.Tensor | None) -> list[Tower]:
    """Return the towers of a model, with example inputs: smooth random images, and ``tokens`` [M, context length].

    Without tokens it is the image tower alone. The images are not pure noise, since most models give all
    noise the same embedding.
    """

    def images(count: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        smooth = torch.rand(count, 3, 4, 4, generator=generator)
        smooth = torch.nn.functional.interpolate(smooth, (spec.height, spec.width), mode="bicubic")
        noise = torch.rand(smooth.shape, generator=generator) - 0.5
        return ((smooth + 0.1 * noise).clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).contiguous()

    towers = [Tower("image", "images", ImageTower(clip, spec).eval(), images)]
    if tokens is not None:
        towers.append(
            Tower("text", "tokens", TextTower(clip).eval(), lambda count: tokens[torch.arange(count) % len(tokens)])
        )
    return towers


def count_parameters(clip: Any) -> dict[str, int]:
    """Return the number of parameters of each tower, without the logit scale and bias."""
    image = sum(parameter.numel() for parameter in clip.visual.parameters())
    whole = sum(parameter.numel() for name, parameter in clip.named_parameters() if not name.startswith("logit_"))
    return {"image": image, "text": whole - image}
