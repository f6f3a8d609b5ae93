"""Resizing of whole images to a model's input with Pillow, without torch."""

from __future__ import annotations

import numpy as np
from PIL import Image

from teachers.protocols import ImageSpec

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


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
