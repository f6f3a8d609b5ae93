"""Conversion of RGB images to model inputs by an ``ImageSpec``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from teachers.protocols import ImageSpec


def to_pixels(images: torch.Tensor, spec: ImageSpec) -> torch.Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, spec.height, spec.width] on the same device.

    ``(x / 255 - mean) / std``, after an antialiased resize where the size differs. Pillow rounds to 8 bits after each
    of its two resize passes and this does not: values differ by 0.3 of 255 levels in the mean.
    """
    pixels = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    size = (spec.height, spec.width)
    if tuple(pixels.shape[-2:]) != size:
        if spec.interpolation == "nearest":
            pixels = torch.nn.functional.interpolate(pixels, size, mode="nearest-exact")
        else:
            pixels = torch.nn.functional.interpolate(pixels, size, mode=spec.interpolation, antialias=True)
            pixels = pixels.clamp_(0, 1)  # bicubic overshoots
    # Constants [3, 1, 1] that the device fills in itself; a copy from the host would wait for it.
    mean, std = (
        torch.stack([torch.full((1, 1), value, dtype=torch.float32, device=pixels.device) for value in values])
        for values in (spec.mean, spec.std)
    )
    return pixels.sub_(mean).div_(std)


def channels(values: float | Sequence[float]) -> tuple[float, float, float]:
    """Expand a mean or standard deviation of a model config, one number or three, to the three channels."""
    red, green, blue = values if isinstance(values, Sequence) else (values,) * 3
    return float(red), float(green), float(blue)
