"""The two halves of an open_clip model as modules of their own, in the shape in which they are shipped."""

from __future__ import annotations

import copy
from typing import Any

import open_clip
import torch
from timm.utils.model import reparameterize_model
from torch.nn.functional import normalize

from reinforce.shipping.graph import Side
from teachers.protocols import ImageSpec


class ImageTower(torch.nn.Module):
    """uint8 [N, height, width, 3], RGB as Pillow gives it -> float32 [N, dim] of unit norm.

    Mean and standard deviation are inside, so that nobody can get them wrong outside.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, clip: Any, spec: ImageSpec) -> None:
        super().__init__()
        self.clip = clip
        self.register_buffer("mean", torch.tensor(spec.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(spec.std).view(3, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pixels = (images.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        return normalize(self.clip.encode_image(pixels), dim=-1)


class TextTower(torch.nn.Module):
    """int64 tokens [N, context length] -> float32 [N, dim] of unit norm."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return normalize(self.clip.encode_text(tokens), dim=-1)


def reparameterised(clip: Any) -> Any:
    """The model as it is shipped, for inference: the branches of a FastViT, and of what else timm can, become one.

    The model that is given stays as it is and shares all other weights. Raises ValueError for a captioner.
    """
    if isinstance(clip, open_clip.CoCa):
        raise ValueError("it is a captioner, whose decoder has no place in two towers: give a CLIP model")
    shipped = copy.copy(clip.eval().requires_grad_(False))
    shipped._modules = dict(clip._modules)  # a shallow copy shares the table of its parts
    shipped.visual = reparameterize_model(clip.visual)
    return shipped


def sides(clip: Any, spec: ImageSpec, tokens: torch.Tensor) -> list[Side]:
    """Both towers of a model, with clouds of colour as images and ``tokens`` [M, context length], repeated, as texts.

    Noise alone is the same to most models, whatever its pixels.
    """

    def images(count: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        clouds = torch.rand(count, 3, 4, 4, generator=generator)
        clouds = torch.nn.functional.interpolate(clouds, (spec.height, spec.width), mode="bicubic")
        noise = torch.rand(clouds.shape, generator=generator) - 0.5
        return ((clouds + 0.1 * noise).clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).contiguous()

    def texts(count: int) -> torch.Tensor:
        return tokens[torch.arange(count) % len(tokens)]

    return [
        Side("image", "images", ImageTower(clip, spec).eval(), images),
        Side("text", "tokens", TextTower(clip).eval(), texts),
    ]


def parameters(clip: Any) -> dict[str, int]:
    """How many parameters each half has; the logit scale and bias are in neither."""
    image = sum(parameter.numel() for parameter in clip.visual.parameters())
    whole = sum(parameter.numel() for name, parameter in clip.named_parameters() if not name.startswith("logit_"))
    return {"image": image, "text": whole - image}
