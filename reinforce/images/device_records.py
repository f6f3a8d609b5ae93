"""The host's part of the augmentation backend ``device-1``: crops as they are, and records as numbers.

The device's part, `reinforce.images.device`, resizes crops and applies operations, for a whole batch at once.
The pixels are those of ``torchvision-pil-1``, except that a resized value near the middle of two levels may be rounded
to the other one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple, TypeAlias

import numpy as np
from PIL import Image

from reinforce.images.records import MATRICES, Augmentation, cut, operations_at, resize

DEVICE_BACKEND = "device-1"
#: A cell has room for a crop with this many times the pixels of a side of the result.
CELL = 2
_LONGEST = 4  # sides of the result; longer crops would be padded to a lot of memory

Numbers: TypeAlias = tuple[float, ...]


class CellRecord(NamedTuple):
    """A crop of ``height`` x ``width`` pixels at the start of a cell, and what to do with it, in order.

    The numbers of an operation are the factor of a blend, the bits of Posterize, the threshold of Solarize or the
    affine matrix in multiples of 2**-16.
    """

    height: int
    width: int
    ops: tuple[tuple[str, Numbers], ...]


def fill_cell(image: Image.Image, augmentation: Augmentation, size: int, cell: np.ndarray) -> CellRecord:
    """Write the crop of an RGB image to a cell, uint8 of at least 3 * size * size bytes.

    A crop without room there is resized here. Raises ValueError if the record does not fit the image or is damaged.
    """
    ops = tuple((op.name, _NUMBERS[op.name](op.magnitude, size)) for op in operations_at(augmentation, _NUMBERS, size))
    crop = cut(image, augmentation)
    if 3 * crop.width * crop.height > cell.size or max(crop.size) > _LONGEST * size:
        crop = resize(crop, size)
    pixels = np.asarray(crop)
    cell.reshape(-1)[: pixels.size] = pixels.reshape(-1)
    return CellRecord(crop.height, crop.width, ops)


def _affine(*matrix: float) -> Numbers:
    """Pillow's affine matrix of the centres of pixels, in multiples of 2**-16."""
    a, b, c, d, e, f = matrix
    return tuple(math.floor(v * 65536 + 0.5) for v in (a, b, c + a * 0.5 + b * 0.5, d, e, f + d * 0.5 + e * 0.5))


def _rotation(magnitude: float, size: int) -> Numbers:
    """As ``Image.rotate``."""
    angle = -math.radians(magnitude % 360.0)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    minus, half = round(-math.sin(angle), 15), size / 2
    return _affine(cos, sin, cos * -half + sin * -half + half, minus, cos, minus * -half + cos * -half + half)


def _moved(name: str, magnitude: float, _: int) -> Numbers:
    return _affine(*MATRICES[name](magnitude))


def _bits(magnitude: float, _: int) -> Numbers:
    if not 1 <= int(magnitude) <= 8:
        raise ValueError(f"Posterize to {int(magnitude)} bits in an augmentation record; 1 to 8")
    return (int(magnitude),)


_NUMBERS: Mapping[str, Callable[[float, int], Numbers]] = {
    **dict.fromkeys(("Identity", "AutoContrast", "Equalize"), lambda *_: ()),
    **dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), lambda magnitude, _: (1.0 + magnitude,)),
    **{name: partial(_moved, name) for name in MATRICES},
    "Rotate": _rotation,
    "Posterize": _bits,
    "Solarize": lambda magnitude, _: (magnitude,),
}
