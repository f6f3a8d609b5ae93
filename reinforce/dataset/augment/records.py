"""Augmentation records: replay them, convert them for storage.

A record is one RandomResizedCrop and, unless skipped, one RandAugment, by torchvision's algorithms on PIL images.
Replaying needs only Pillow and is a pure function.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from reinforce.dataset.augment.operations import TORCHVISION, Operation

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
