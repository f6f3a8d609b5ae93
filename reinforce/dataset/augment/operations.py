"""RandAugment's operations on RGB images, with the pixels of torchvision's on PIL images.

They take less CPU than Pillow's own: an operation on single values is a table of 256 values, and the smoothing filter
is computed in integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image, ImageOps

#: One operation: (RGB image, magnitude) -> RGB image of the same size.
Operation = Callable[[Image.Image, float], Image.Image]

_VALUES = Image.frombytes("L", (256, 1), bytes(range(256)))
_SMOOTH_CENTRE, _SMOOTH_SUM = 5, 13  # weights of Pillow's ImageFilter.SMOOTH: 5 in the centre, 1 around, sum 13


def affine(image: Image.Image, *matrix: float) -> Image.Image:
    """Transform with nearest interpolation and black fill."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=(0, 0, 0))


def _shear_x(image: Image.Image, magnitude: float) -> Image.Image:
    # To degrees and back as torchvision does, for the same double.
    return affine(image, 1, math.tan(math.radians(math.degrees(math.atan(magnitude)))), 0, 0, 1, 0)


def _shear_y(image: Image.Image, magnitude: float) -> Image.Image:
    angle = math.radians(math.degrees(math.atan(magnitude)))
    return affine(image, 1, 0, 0, math.sin(angle) / math.cos(angle), 1, 0)


def _rotate(image: Image.Image, magnitude: float) -> Image.Image:
    return image.rotate(magnitude, Image.Resampling.NEAREST, fillcolor=(0, 0, 0))


def _blend_with(grey: int, image: Image.Image, magnitude: float) -> Image.Image:
    """``Image.blend`` of an image of one grey and this one, by a table."""
    table = Image.blend(Image.new("L", _VALUES.size, grey), _VALUES, 1.0 + magnitude)
    return image.point(list(table.tobytes()) * 3)


def contrast(image: Image.Image, magnitude: float) -> Image.Image:
    """``ImageEnhance.Contrast``."""
    counts = np.array(image.convert("L").histogram())
    return _blend_with(int(int(counts @ np.arange(256)) / int(counts.sum()) + 0.5), image, magnitude)


def color(image: Image.Image, magnitude: float) -> Image.Image:
    """``ImageEnhance.Color``."""
    return Image.blend(image.convert("L").convert("RGB"), image, 1.0 + magnitude)


def sharpness(image: Image.Image, magnitude: float) -> Image.Image:
    """``ImageEnhance.Sharpness``."""
    return Image.blend(_smooth(image), image, 1.0 + magnitude)


def _smooth(image: Image.Image) -> Image.Image:
    """``image.filter(ImageFilter.SMOOTH)``: rounded weighted means of 3 x 3 pixels; the outermost pixels stay.

    The sum is odd, so no mean is half-way between two integers, and Pillow's floating-point arithmetic rounds the same.
    """
    pixels = np.array(image)
    height, width = pixels.shape[:2]
    if height < 3 or width < 3:
        return image
    values = pixels.reshape(height, 3 * width).astype(np.uint16)  # a horizontal neighbour is 3 values away
    rows = values[:-2] + values[1:-1]
    rows += values[2:]
    means = rows[:, :-6] + rows[:, 3:-3]
    means += rows[:, 6:]
    means += (_SMOOTH_CENTRE - 1) * values[1:-1, 3:-3]
    means += _SMOOTH_SUM // 2
    means //= _SMOOTH_SUM
    pixels.reshape(height, 3 * width)[1:-1, 3:-3] = means
    return Image.fromarray(pixels)


#: Every operation by torchvision's name.
TORCHVISION: Mapping[str, Operation] = {
    "Identity": lambda image, _: image,
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateX": lambda image, magnitude: affine(image, 1, 0, -int(magnitude), 0, 1, 0),
    "TranslateY": lambda image, magnitude: affine(image, 1, 0, 0, 0, 1, -int(magnitude)),
    "Rotate": _rotate,
    "Brightness": lambda image, magnitude: _blend_with(0, image, magnitude),
    "Color": color,
    "Contrast": contrast,
    "Sharpness": sharpness,
    "Posterize": lambda image, magnitude: ImageOps.posterize(image, int(magnitude)),
    "Solarize": ImageOps.solarize,  # type: ignore[dict-item]
    "AutoContrast": lambda image, _: ImageOps.autocontrast(image),
    "Equalize": lambda image, _: ImageOps.equalize(image),
}
