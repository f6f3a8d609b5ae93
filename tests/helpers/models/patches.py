"""Teachers whose patches are exact."""

from __future__ import annotations

from typing import Any

import torch

from tests.helpers.models import ColorTeacher

SIDE = 4


class Cells(ColorTeacher):
    """A patch is the mean color of a cell of a grid, by default of one of the quarters, repeated to ``channels``."""

    def __init__(self, device: torch.device, rows: int = 2, columns: int = 2, channels: int = 3) -> None:
        super().__init__(device)
        self._grid, self._channels = (rows, columns), channels

    def encode_patches(self, pixels: torch.Tensor) -> torch.Tensor:
        means = torch.nn.functional.adaptive_avg_pool2d(pixels, self._grid)
        return means.repeat(1, -(-self._channels // 3), 1, 1)[:, : self._channels].permute(0, 2, 3, 1)


class PatchTeacher(ColorTeacher):
    """Patches are the pixels of squares of 4 x 4, of 48 numbers; ``broken`` gives NaN for dark images."""

    version = 1

    def __init__(self, device: torch.device, broken: bool = False, **options: Any) -> None:
        super().__init__(device, **options)
        self._broken = broken

    def encode_patches(self, pixels: torch.Tensor) -> torch.Tensor:
        parts = pixels.unfold(2, SIDE, SIDE).unfold(3, SIDE, SIDE)  # [B, 3, h, w, 4, 4]
        patches = parts.permute(0, 2, 3, 1, 4, 5).flatten(3)
        if self._broken:
            patches = patches.where(pixels.mean((1, 2, 3)).sub(-0.6)[:, None, None, None] > 0, float("nan"))
        return patches.contiguous()
