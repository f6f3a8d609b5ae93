"""Conversion of RGB images to model inputs by an ``ImageSpec``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from teachers.protocols import ImageSpec

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


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
    mean = torch.tensor(spec.mean, device=pixels.device).view(3, 1, 1)
    std = torch.tensor(spec.std, device=pixels.device).view(3, 1, 1)
    return pixels.sub_(mean).div_(std)


def fit(image: Image.Image, spec: ImageSpec) -> np.ndarray:
    """Resize a whole RGB image -> uint8 [spec.height, spec.width, 3], pixel for pixel as open_clip's validation does.

    ``crop`` resizes the shorter side and cuts the center; ``squash`` resizes both sides. Both use Pillow.
    """
    target = (spec.width, spec.height)
    if spec.resize == "squash":
        return _array(_resize(image, target, spec))
    resized = _resize(image, _cover(image.size, target), spec)
    left = round((resized.width - spec.width) / 2)
    top = round((resized.height - spec.height) / 2)
    return _array(resized.crop((left, top, left + spec.width, top + spec.height)))


def channels(values: float | Sequence[float]) -> tuple[float, float, float]:
    """Expand a mean or standard deviation of a model config, one number or three, to the three channels."""
    red, green, blue = values if isinstance(values, Sequence) else (values,) * 3
    return float(red), float(green), float(blue)


def _cover(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """The smallest (width, height) of the image's aspect ratio that covers the target."""
    width, height = size
    if target[0] == target[1]:
        # torchvision's Resize(int) truncates the longer side
        side = target[0]
        return (side, int(side * height / width)) if width <= height else (int(side * width / height), side)
    # open_clip's ResizeKeepRatio, for targets that are not square, rounds it
    ratio = min(width / target[0], height / target[1])
    return round(width / ratio), round(height / ratio)


def _resize(image: Image.Image, size: tuple[int, int], spec: ImageSpec) -> Image.Image:
    return image if image.size == size else image.resize(size, _RESAMPLING[spec.interpolation])


def _array(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.uint8)
