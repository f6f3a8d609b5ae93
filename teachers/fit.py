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
    width, height = image.size
    if spec.resize == "squash":
        return np.asarray(_resize(image, (spec.width, spec.height), spec), dtype=np.uint8)
    # the smallest size of the image's aspect ratio that covers the target
    if spec.width == spec.height:
        # torchvision's Resize(int) truncates the longer side
        side = spec.width
        size = (side, int(side * height / width)) if width <= height else (int(side * width / height), side)
    else:  # open_clip's ResizeKeepRatio, for targets that are not square, rounds it
        ratio = min(width / spec.width, height / spec.height)
        size = round(width / ratio), round(height / ratio)
    resized = _resize(image, size, spec)
    left = round((resized.width - spec.width) / 2)
    top = round((resized.height - spec.height) / 2)
    return np.asarray(resized.crop((left, top, left + spec.width, top + spec.height)), dtype=np.uint8)


def _resize(image: Image.Image, size: tuple[int, int], spec: ImageSpec) -> Image.Image:
    return image if image.size == size else image.resize(size, _RESAMPLING[spec.interpolation])
