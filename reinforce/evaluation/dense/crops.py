"""Crops of images and masks for the training of a segmentation head, and whole ones for inference."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from reinforce.evaluation.dense.masks import IGNORED


def random_crop(
    image: Image.Image,
    mask: np.ndarray,
    size: tuple[int, int],
    ratios: tuple[float, float],
    numbers: Sequence[float],
    fill: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """A crop of ``size`` (height, width) -> uint8 [height, width, 3] and class indices, uint8 [height, width].

    The shorter side of the image is resized to the shorter one of the crop times a ratio; then the crop is cut, and
    flipped in one of two cases. What lies outside of the image is ``fill``, and ignored. ``numbers`` are four in
    [0, 1): of the ratio, the top, the left and the flip.
    """
    height, width = size
    factor = min(size) * (ratios[0] + (ratios[1] - ratios[0]) * numbers[0]) / min(image.size)
    resized = [max(1, round(side * factor)) for side in (image.height, image.width)]
    inside = [min(side, of_image) for side, of_image in zip(size, resized, strict=True)]
    starts = [
        int(number * (of_image - part + 1))
        for number, of_image, part in zip(numbers[1:3], resized, inside, strict=True)
    ]
    scales = image.height / resized[0], image.width / resized[1]
    box = (
        starts[1] * scales[1], starts[0] * scales[0],
        (starts[1] + inside[1]) * scales[1], (starts[0] + inside[0]) * scales[0],
    )  # fmt: skip
    target = (inside[1], inside[0])
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[:] = fill
    labels = np.full((height, width), IGNORED, np.uint8)
    pixels[: inside[0], : inside[1]] = np.asarray(image.resize(target, Image.Resampling.BILINEAR, box))
    whole = Image.fromarray(mask)
    labels[: inside[0], : inside[1]] = np.asarray(whole.resize(target, Image.Resampling.NEAREST, box))
    if numbers[3] < 0.5:
        pixels, labels = pixels[:, ::-1], labels[:, ::-1]
    return np.ascontiguousarray(pixels), np.ascontiguousarray(labels)


def covering(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """The image resized such that it covers ``size`` (height, width) and one side is equal -> uint8 [H, W, 3]."""
    factor = max(size[0] / image.height, size[1] / image.width)
    target = max(size[1], round(image.width * factor)), max(size[0], round(image.height * factor))
    return np.asarray(image.resize(target, Image.Resampling.BILINEAR), np.uint8)


def squashed(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """The image resized to ``size`` (height, width), without regard to its aspect ratio -> uint8 [H, W, 3]."""
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BILINEAR), np.uint8)


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """The first pixels of windows along one side: every ``stride``, and the last window ends with the side."""
    return [min(start, length - window) for start in range(0, max(1, length - window + stride), stride)]
