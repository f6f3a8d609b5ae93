"""Custom teacher and captioner classes, valid and invalid ones."""

from __future__ import annotations

from typing import Any

import torch

from teachers.protocols import ImageSpec

SPEC = ImageSpec(8, (0.5,) * 3, (0.5,) * 3)  # type: ignore[arg-type]


class Radiology:
    """A custom teacher as in teachers/protocols.py."""

    dim = 4
    image = SPEC
    logit_scale = 50.0
    version = 3

    def __init__(self, device: torch.device, weights: str, scale: float = 1.0) -> None:
        self.device, self.weights, self.scale = device, weights, scale

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(pixels.mean(dim=(2, 3)) @ torch.eye(3, 4), dim=-1)

    def encode_texts(self, texts: list[str]) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.ones(len(texts), 4), dim=-1)


class TextsOnly:
    def __init__(self, device: torch.device) -> None:
        self.dim = 4

    def encode_texts(self, texts: list[str]) -> torch.Tensor:
        return torch.ones(len(texts), 4) / 2


class Unplaced:
    """Built without a device."""


class Weighed:
    def __init__(self, weights: str) -> None:
        self.weights = weights


class NoDim(Radiology):
    dim = None  # type: ignore[assignment]


class NoImage(TextsOnly):
    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels


class WrongImage(NoImage):
    image = 224


class Neither:
    def __init__(self, device: torch.device) -> None: ...


class Fails(TextsOnly):
    def __init__(self, device: torch.device) -> None:
        raise KeyError("lost")


class Writer:
    image = SPEC

    def __init__(self, device: torch.device, captions: int | None = None) -> None:
        if captions is not None:
            self.captions = captions

    def caption(self, pixels: torch.Tensor, seeds: Any) -> list[list[str]]:
        return [["a"] * seeds.shape[1] for _ in pixels]


class TwoCaptions(Writer):
    captions = 2


class FourCaptions(Writer):
    def __init__(self, device: torch.device) -> None:
        self.captions = 4
