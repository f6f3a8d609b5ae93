"""RandAugment's operations on RGB images, with the pixels of torchvision's on PIL images, and the tables of draws.

The operations take less CPU than Pillow's own: one on single values is a table of 256 values, and the smoothing filter
is computed in integers.

A draw picks an operation by its position, so one more operation in a table would change all later draws under an equal
fingerprint. Tables are therefore never changed: one more operation is a new table of a new backend, whose name is in
the fingerprint of the samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

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


def _shear_y(magnitude: float) -> tuple[float, ...]:
    angle = math.radians(math.degrees(math.atan(magnitude)))  # and back, as torchvision does, for the same double
    return 1, 0, 0, math.sin(angle) / math.cos(angle), 1, 0


#: Pillow's affine matrix of the operations that move pixels, by the magnitude.
MATRICES: Mapping[str, Callable[[float], tuple[float, ...]]] = {
    "ShearX": lambda magnitude: (1, math.tan(math.radians(math.degrees(math.atan(magnitude)))), 0, 0, 1, 0),
    "ShearY": _shear_y,
    "TranslateX": lambda magnitude: (1, 0, -int(magnitude), 0, 1, 0),
    "TranslateY": lambda magnitude: (1, 0, 0, 0, 1, -int(magnitude)),
}


def _move(name: str, image: Image.Image, magnitude: float) -> Image.Image:
    return affine(image, *MATRICES[name](magnitude))


def _blend_with(grey: int, image: Image.Image, magnitude: float) -> Image.Image:
    """``Image.blend`` of an image of one grey and this one, by a table."""
    table = Image.blend(Image.new("L", _VALUES.size, grey), _VALUES, 1.0 + magnitude)
    return image.point(list(table.tobytes()) * 3)


def contrast(image: Image.Image, magnitude: float) -> Image.Image:
    """``ImageEnhance.Contrast``."""
    counts = np.array(image.convert("L").histogram())
    return _blend_with(int(int(counts @ np.arange(256)) / int(counts.sum()) + 0.5), image, magnitude)


def sharpness(image: Image.Image, magnitude: float) -> Image.Image:
    """``ImageEnhance.Sharpness``: a blend with ``image.filter(ImageFilter.SMOOTH)``.

    That has rounded weighted means of 3 x 3 pixels; the outermost pixels stay. The sum of the weights is odd, so no
    mean is half-way between two integers, and Pillow's floating-point arithmetic rounds the same.
    """
    pixels = np.array(image)
    height, width = pixels.shape[:2]
    if height < 3 or width < 3:
        return Image.blend(image, image, 1.0 + magnitude)
    values = pixels.reshape(height, 3 * width).astype(np.uint16)  # a horizontal neighbour is 3 values away
    rows = values[:-2] + values[1:-1]
    rows += values[2:]
    means = rows[:, :-6] + rows[:, 3:-3]
    means += rows[:, 6:]
    means += (_SMOOTH_CENTRE - 1) * values[1:-1, 3:-3]
    means += _SMOOTH_SUM // 2
    means //= _SMOOTH_SUM
    pixels.reshape(height, 3 * width)[1:-1, 3:-3] = means
    return Image.blend(Image.fromarray(pixels), image, 1.0 + magnitude)


#: Every operation by torchvision's name.
TORCHVISION: Mapping[str, Operation] = {
    "Identity": lambda image, _: image,
    **{name: partial(_move, name) for name in MATRICES},
    "Rotate": lambda image, magnitude: image.rotate(magnitude, Image.Resampling.NEAREST, fillcolor=(0, 0, 0)),
    "Brightness": lambda image, magnitude: _blend_with(0, image, magnitude),
    "Color": lambda image, magnitude: Image.blend(image.convert("L").convert("RGB"), image, 1.0 + magnitude),
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


#: Name and version of what ``replay`` computes, the default backend; recorded in dataset.json.
AUGMENTATION_BACKEND = "torchvision-pil-1"

#: Bounds of a record, which may be untrusted; configs allow no larger side.
MAX_SIDE = 4096
_MAX_OPS = 256


@dataclass(frozen=True)
class Crop:
    """A box in the RGB image, in pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Op:
    """One RandAugment operation. The magnitude is signed float32; of TranslateX/Y, in pixels at the record's size."""

    name: str
    magnitude: float


@dataclass(frozen=True)
class Augmentation:
    """One record: crop, resize to (size, size), apply the ops in order. ``ops`` is None if RandAugment was skipped."""

    crop: Crop
    size: int
    ops: tuple[Op, ...] | None


#: Resizes an RGB image to (size, size) pixels.
Resize = Callable[[Image.Image, int], Image.Image]


def is_tall(width: int, height: int, size: int) -> bool:
    """Whether a crop's height is resized to ``size`` before its width, as by Pillow 13, which then computes less."""
    return size < height and 2 * width < height + size


def resize(image: Image.Image, size: int) -> Image.Image:
    """The image at (size, size) pixels, of each version of Pillow: those before 13 resize the width first in any case,
    which changes some pixels of tall crops by up to 4 levels."""
    half = (image.width, size) if is_tall(*image.size, size) else (size, image.height)
    return image.resize(half, Image.Resampling.BICUBIC).resize((size, size), Image.Resampling.BICUBIC)


def replay(
    image: Image.Image,
    augmentation: Augmentation,
    size: int | None = None,
    resize: Resize = resize,
    operations: Mapping[str, Operation] = TORCHVISION,
) -> Image.Image:
    """Apply a record to the RGB image it was sampled for -> RGB (size, size); by the backend ``torchvision-pil-1``, or
    by the functions of another.

    At the recorded size (the default) the pixels equal torchvision's on a PIL image of Pillow 13: ``resized_crop`` with
    bicubic interpolation, then RandAugment's operations with nearest interpolation and black fill. At another size,
    translations are scaled with it, so that they shift the image by the same fraction.
    Raises ValueError if the image is not RGB, the crop does not fit into it or an operation is unknown.
    """
    ops = operations_at(augmentation, operations, size)  # refuses sizes that would take too much memory
    # The crop is cut out first: resizing with a box would use pixels around it.
    out = resize(cut(image, augmentation), size or augmentation.size)
    for op in ops:
        out = operations[op.name](out, op.magnitude)
    return out


def cut(image: Image.Image, augmentation: Augmentation) -> Image.Image:
    """The record's crop of an RGB image. Raises ValueError if it does not fit into the image."""
    crop = augmentation.crop
    box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
    if image.mode != "RGB" or min(box) < 0 or box[2] > image.width or box[3] > image.height:
        raise ValueError(
            f"{crop} does not fit this {image.mode} image of {image.width} x {image.height}: the record is "
            "of another image, or the image was decoded by another image policy"
        )
    return image.crop(box)


def operations_at(augmentation: Augmentation, known: Collection[str], size: int | None = None) -> list[Op]:
    """The record's operations at a size (default: the recorded one), to which translations are scaled.

    Raises ValueError if there are too many, or one is not ``known`` or has a magnitude out of bounds.
    """
    size, ops = size or augmentation.size, augmentation.ops or ()
    if size > MAX_SIDE or len(ops) > _MAX_OPS:
        raise ValueError(f"a record of {size} pixels and {len(ops)} operations; at most {MAX_SIDE} and {_MAX_OPS}")
    scaled = []
    for op in ops:
        if op.name not in known:
            raise ValueError(f"unknown operation {op.name!r} in an augmentation record; known: {', '.join(known)}")
        if not abs(op.magnitude) <= MAX_SIDE:  # also not a number
            raise ValueError(f"magnitude {op.magnitude} in an augmentation record; at most {MAX_SIDE}")
        shifts = op.name in ("TranslateX", "TranslateY") and size != augmentation.size
        scaled.append(Op(op.name, op.magnitude * (size / augmentation.size)) if shifts else op)
    return scaled


def to_records(augmentations: Iterable[Augmentation]) -> list[dict[str, Any]]:
    """Convert records to dicts of ``schemas.AUGMENTATION``, for pyarrow."""
    return [
        {
            "crop": vars(augmentation.crop),
            "size": augmentation.size,
            "ops": None if augmentation.ops is None else [vars(op) for op in augmentation.ops],
        }
        for augmentation in augmentations
    ]


def from_records(records: Iterable[Mapping[str, Any]]) -> list[Augmentation]:
    """Convert the dicts of a Parquet column's ``to_pylist`` back; the inverse of ``to_records``."""
    return [
        Augmentation(
            crop=Crop(**record["crop"]),
            size=record["size"],
            ops=None if record["ops"] is None else tuple(Op(**op) for op in record["ops"]),
        )
        for record in records
    ]
