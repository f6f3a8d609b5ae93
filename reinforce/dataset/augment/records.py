"""Augmentation records: sample them, replay them, convert them for storage.

A record is one RandomResizedCrop and, unless skipped, one RandAugment, by torchvision's algorithms on PIL images.
Sampling needs only numpy and replaying only Pillow; both are pure functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from reinforce.config import Augmentations, RandAugment
from reinforce.dataset.augment.operations import TORCHVISION, Operation
from reinforce.seeds import philox_bits, seed_for

#: Name and version of what ``replay`` computes, the default backend; recorded in dataset.json.
AUGMENTATION_BACKEND = "torchvision-pil-1"

#: RandAugment's operations by torchvision's names; published records store an operation as its index here.
OPS = (
    "Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness",
    "Color", "Contrast", "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize",
)  # fmt: skip

_SIGNED = frozenset(OPS[1:10])
_BINS = 31  # magnitude levels of RandAugment
#: Bounds of a record, which may be from somebody else's dataset; configs allow no larger side.
MAX_SIDE = 4096
_MAX_OPS = 256
_ATTEMPTS = 10  # crops that are tried before falling back to a central one


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


def sample_augmentation(
    policy: Augmentations, seed: int, key: str, index: int, width: int, height: int
) -> Augmentation:
    """Sample record ``index`` of the sample ``key``, whose RGB image has ``width`` x ``height`` pixels.

    A function of the arguments only: the same in every process and on every machine.
    """
    draws = 2 * _ATTEMPTS + 2 + 1 + 2 * policy.rand_augment.ops
    bits = philox_bits(seed_for(seed, key, "augmentation", index), draws)
    uniforms: list[float] = ((bits >> np.uint64(11)) * 2.0**-53).tolist()
    for_crop, (apply, *for_ops) = uniforms[: 2 * _ATTEMPTS + 2], uniforms[2 * _ATTEMPTS + 2 :]
    crop = _sample_crop(for_crop, policy.scale, policy.ratio, width, height)
    ops = _sample_ops(for_ops, policy.rand_augment, policy.size) if apply < policy.rand_augment.probability else None
    return Augmentation(crop, policy.size, ops)


def _sample_crop(
    uniforms: Sequence[float], scale: tuple[float, float], ratio: tuple[float, float], width: int, height: int
) -> Crop:
    """RandomResizedCrop's box; ``uniforms`` are (area, ratio) of each attempt, then (top, left)."""
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for i in range(_ATTEMPTS):
        area = width * height * (scale[0] + uniforms[2 * i] * (scale[1] - scale[0]))
        aspect = math.exp(log_low + uniforms[2 * i + 1] * (log_high - log_low))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return Crop(int(uniforms[-2] * (height - h + 1)), int(uniforms[-1] * (width - w + 1)), h, w)
    # No attempt fitted: take a central crop with the closest ratio that fits. A side may round to 0 (ratios far from
    # 1 on tiny images), which torchvision does not handle.
    w, h = width, height
    if width / height < ratio[0]:
        h = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        w = max(1, round(height * ratio[1]))
    return Crop((height - h) // 2, (width - w) // 2, h, w)


def _sample_ops(uniforms: Sequence[float], policy: RandAugment, size: int) -> tuple[Op, ...]:
    """RandAugment's operations; ``uniforms`` are (operation, sign) of each."""
    magnitudes = _magnitudes(policy.magnitude, size)
    ops = []
    for operation, sign in zip(uniforms[::2], uniforms[1::2], strict=True):
        name = OPS[int(operation * len(OPS))]
        magnitude = magnitudes[name]
        ops.append(Op(name, -magnitude if name in _SIGNED and sign < 0.5 else magnitude))
    return tuple(ops)


@lru_cache(maxsize=64)
def _magnitudes(bin_: int, size: int) -> Mapping[str, float]:
    """Magnitude of every operation at one of the 31 bins, by torchvision's table, as float32 numbers."""

    def between(start: float, end: float) -> float:
        return float(np.linspace(start, end, _BINS)[bin_].astype(np.float32))

    return {
        **dict.fromkeys(("Identity", "AutoContrast", "Equalize"), 0.0),
        **dict.fromkeys(("ShearX", "ShearY"), between(0.0, 0.3)),
        **dict.fromkeys(("TranslateX", "TranslateY"), between(0.0, 150.0 / 331.0 * size)),
        **dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), between(0.0, 0.9)),
        "Rotate": between(0.0, 30.0),
        "Posterize": float(8 - round(bin_ / ((_BINS - 1) / 4))),
        "Solarize": between(255.0, 0.0),
    }


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
    ops = operations_at(augmentation, size)  # refuses sizes that would take too much memory
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


def operations_at(augmentation: Augmentation, size: int | None = None) -> list[Op]:
    """The record's operations at a size (default: the recorded one), to which translations are scaled.

    Raises ValueError if there are too many, or one is unknown or has a magnitude out of bounds.
    """
    size, ops = size or augmentation.size, augmentation.ops or ()
    if size > MAX_SIDE or len(ops) > _MAX_OPS:
        raise ValueError(f"a record of {size} pixels and {len(ops)} operations; at most {MAX_SIDE} and {_MAX_OPS}")
    scaled = []
    for op in ops:
        if op.name not in OPS:
            raise ValueError(f"unknown operation {op.name!r} in an augmentation record; known: {', '.join(OPS)}")
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
