"""NaFlex models, which take patches of images of any size: here of square images of one size."""

from __future__ import annotations

from math import isqrt
from typing import Any

import torch


def takes_patches(processor: dict[str, Any]) -> bool:
    """Whether an image processor's config is that of a NaFlex model."""
    return "max_num_patches" in processor


def square_size(processor: dict[str, Any], size: int | None) -> int | None:
    """Side of the images of a NaFlex model in pixels; ``size`` as it is for other models.

    Without ``size`` it is that of the largest square image whose patches the processor does not reduce.
    Raises ValueError for a size that is not a multiple of the patch.
    """
    if not takes_patches(processor):
        return size
    patch = int(processor["patch_size"])
    if size is not None and size % patch:
        near = max(1, round(size / patch)) * patch
        raise ValueError(f"`image_size: {size}` is not a multiple of the model's patch of {patch} pixels: use {near}")
    return size or isqrt(int(processor["max_num_patches"])) * patch


def patch_inputs(pixels: torch.Tensor, patch: int) -> dict[str, torch.Tensor]:
    """Pixels [B, 3, H, W] -> inputs of a NaFlex model, whose N patches are in row order with channels last.

    ``pixel_values`` [B, N, patch * patch * 3], ``pixel_attention_mask`` [B, N] and ``spatial_shapes`` [B, 2].
    """
    batch, channels, height, width = pixels.shape
    rows, columns = height // patch, width // patch
    grid = pixels.reshape(batch, channels, rows, patch, columns, patch).permute(0, 2, 4, 3, 5, 1)
    return {
        "pixel_values": grid.reshape(batch, rows * columns, patch * patch * channels),
        "pixel_attention_mask": pixels.new_ones((batch, rows * columns), dtype=torch.int32),
        "spatial_shapes": torch.tensor([[rows, columns]] * batch),  # on the CPU, since the model compares its values
    }
