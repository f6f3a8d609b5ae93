"""Classifiers of test data: classes are colors, and logits their nearness."""

from __future__ import annotations

import torch

from teachers.protocols import ImageSpec

NAMES = ("red", "green", "blue", "yellow", "black", "white")
_COLORS = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 0, 0), (1, 1, 1)]


class Colors:
    """Logits by the mean color of an image; those of images that are darker than ``nan_below`` are NaN."""

    classes = len(_COLORS)
    names = NAMES
    image = ImageSpec(size=8, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    version = 1

    def __init__(self, device: torch.device, sharpness: float = 5.0, nan_below: float = 0.0) -> None:
        self._colors = torch.tensor(_COLORS, dtype=torch.float32, device=device)
        self._sharpness, self._nan_below = sharpness, nan_below

    def classify(self, pixels: torch.Tensor) -> torch.Tensor:
        means = pixels.mean(dim=(2, 3))
        logits = -self._sharpness * (means[:, None] - self._colors).square().sum(dim=2)
        logits[means.mean(dim=1) < self._nan_below] = torch.nan
        return logits


class Unsized(Colors):
    """A classifier without its number of classes."""

    classes = None  # type: ignore[assignment]


class Misshapen(Colors):
    """A classifier that gives more logits than it has classes."""

    def classify(self, pixels: torch.Tensor) -> torch.Tensor:
        return super().classify(pixels).repeat(1, 2)
