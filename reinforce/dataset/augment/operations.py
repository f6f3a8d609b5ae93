"""RandAugment's operations on RGB images, with the pixels of torchvision's on PIL images, and the tables of draws.

The operations take less CPU than Pillow's own: one on single values is a table of 256 values, and the smoothing filter
is computed in integers.

A draw picks an operation by its position, so one more operation in a table would change all later draws under an equal
fingerprint. Tables are therefore never changed: one more operation is a new table of a new backend, whose name is in
the fingerprint of the samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
from PIL import Image, ImageOps

#: One operation: (RGB image, magnitude) -> RGB image of the same size.
Operation = Callable[[Image.Image, float], Image.Image]
#: RandAugment's operations by torchvision's names; published records store an operation as its index here.
OPS = (
    "Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness",
    "Color", "Contrast", "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize",
)  # fmt: skip
_BINS = 31  # magnitude levels of RandAugment

_VALUES = Image.frombytes("L", (256, 1), bytes(range(256)))
_SMOOTH_CENTRE, _SMOOTH_SUM = 5, 13  # weights of Pillow's ImageFilter.SMOOTH: 5 in the centre, 1 around, sum 13


def affine(image: Image.Image, *matrix: float) -> Image.Image:
    """Transform with nearest interpolation and black fill."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=(0, 0, 0))


def _shear_x(magnitude: float) -> tuple[float, ...]:
    # To degrees and back as torchvision does, for the same double.
    return 1, math.tan(math.radians(math.degrees(math.atan(magnitude)))), 0, 0, 1, 0


def _shear_y(magnitude: float) -> tuple[float, ...]:
    angle = math.radians(math.degrees(math.atan(magnitude)))
    return 1, 0, 0, math.sin(angle) / math.cos(angle), 1, 0


#: Pillow's affine matrix of the operations that move pixels, by the magnitude.
MATRICES: Mapping[str, Callable[[float], tuple[float, ...]]] = {
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateX": lambda magnitude: (1, 0, -int(magnitude), 0, 1, 0),
    "TranslateY": lambda magnitude: (1, 0, 0, 0, 1, -int(magnitude)),
}


def _move(name: str, image: Image.Image, magnitude: float) -> Image.Image:
    return affine(image, *MATRICES[name](magnitude))


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
    **{name: partial(_move, name) for name in MATRICES},
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


@dataclass(frozen=True)
class OperationTable:
    """The operations that are drawn, each with the same probability, in the order of draws.

    ``magnitudes`` maps (level, size in pixels) to the magnitude of every operation, as float32 numbers. Those of
    ``signed`` operations are drawn with a sign.
    """

    names: tuple[str, ...]
    signed: frozenset[str]
    magnitudes: Callable[[int, int], Mapping[str, float]]


@lru_cache(maxsize=64)
def torchvision_magnitudes(level: int, size: int) -> Mapping[str, float]:
    """Magnitude of every operation at one of the 31 levels, by torchvision's table, as float32 numbers."""

    def between(start: float, end: float) -> float:
        return float(np.linspace(start, end, _BINS)[level].astype(np.float32))

    return {
        **dict.fromkeys(("Identity", "AutoContrast", "Equalize"), 0.0),
        **dict.fromkeys(("ShearX", "ShearY"), between(0.0, 0.3)),
        **dict.fromkeys(("TranslateX", "TranslateY"), between(0.0, 150.0 / 331.0 * size)),
        **dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), between(0.0, 0.9)),
        "Rotate": between(0.0, 30.0),
        "Posterize": float(8 - round(level / ((_BINS - 1) / 4))),
        "Solarize": between(255.0, 0.0),
    }


RAND_AUGMENT = OperationTable(OPS, frozenset(OPS[1:10]), torchvision_magnitudes)
