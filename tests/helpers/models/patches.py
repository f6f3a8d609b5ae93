"""A teacher whose patches are exact."""

from __future__ import annotations

import torch

from tests.helpers.models import ColorTeacher


class Cells(ColorTeacher):
    """A patch is the mean color of a cell of a grid, by default of one of the quarters, repeated to ``channels``."""

    def __init__(self, device: torch.device, rows: int = 2, columns: int = 2, channels: int = 3) -> None:
        super().__init__(device)
        self._grid, self._channels = (rows, columns), channels

    def encode_patches(self, pixels: torch.Tensor) -> torch.Tensor:
        means = torch.nn.functional.adaptive_avg_pool2d(pixels, self._grid)
        return means.repeat(1, -(-self._channels // 3), 1, 1)[:, : self._channels].permute(0, 2, 3, 1)
