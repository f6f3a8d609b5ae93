"""Readers of segmentation sets as they lie on disk: Pascal VOC 2012 and ADE20K, and sets of users in these layouts.

A mask is an image of indices. In the layout of VOC the value of a class is its index, and 255 is ignored; in that of
ADE20K it is its index plus one, and 0 is ignored.
"""

from __future__ import annotations

import functools
import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from reinforce.errors import UserError
from reinforce.evaluation.reading import make_loader
from reinforce.source.file_types import is_image_name
from reinforce.source.urls import canonical, filesystem, read_whole, storage_errors

LayoutName = Literal["voc2012", "ade20k"]
#: Index of pixels that count for nothing.
IGNORED = 255
_NO_CLASS = -1


@dataclass(frozen=True)
class Layout:
    """Where a set has its images, masks and the names of a part, ``{}``; ``folder`` shows that a set has the layout.

    Without ``names`` all images of the part's folder are used. ``first`` is the mask value of the first class and
    ``ignored`` that of ignored pixels.
    """

    folder: str
    images: str
    masks: str
    names: str | None
    first: int
    ignored: int
    classes: int
    train: str
    test: str

    def table(self, classes: int) -> np.ndarray:
        """Class indices by mask value, int16 [256]: ``IGNORED`` for ignored ones, -1 for values that no class has."""
        table = np.full(256, _NO_CLASS, np.int16)
        table[self.first : self.first + classes] = np.arange(classes)
        table[self.ignored] = IGNORED
        return table


LAYOUTS: dict[LayoutName, Layout] = {
    "voc2012": Layout(
        "ImageSets/Segmentation", "JPEGImages", "SegmentationClass", "ImageSets/Segmentation/{}.txt",
        first=0, ignored=255, classes=21, train="train", test="val",
    ),
    "ade20k": Layout(
        "annotations", "images/{}", "annotations/{}", None,
        first=1, ignored=0, classes=150, train="training", test="validation",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """An image with its mask; each is loaded when it is called. ``training`` says which part it belongs to."""

    key: str
    training: bool
    load_image: Callable[[], bytes]
    load_mask: Callable[[], bytes]

    @property
    def content(self) -> list[str | bool]:
        """What a digest of the set covers, beside the image."""
        return [self.training, hashlib.blake2b(self.load_mask(), digest_size=16).hexdigest()]


def recognise(url: str, where: str) -> LayoutName:
    """The layout of a folder. Raises UserError."""
    fs, root = filesystem(url)
    with storage_errors(f"{where}: {canonical(url)} cannot be reached", "Check the URL and your credentials for it."):
        for name, layout in LAYOUTS.items():
            if fs.isdir(f"{root.rstrip('/')}/{layout.folder}"):
                return name
    folders = " or ".join(f"{layout.folder} of {name}" for name, layout in LAYOUTS.items())
    raise UserError(f"{where}: {canonical(url)} has no folder {folders}: name the folder that has it.")


def list_pairs(url: str, layout: Layout, part: str, training: bool, where: str, limit: int | None = None) -> list[Pair]:
    """The pairs of a part in the order of its list, or of names; the first ``limit``. Raises UserError for gaps."""
    fs, path = filesystem(url)
    root = path.rstrip("/")
    own = "Aug" if layout.names and part.endswith("aug") else ""  # ``trainaug`` of VOC has its own masks
    folders = [f"{root}/{layout.images.format(part)}", f"{root}/{layout.masks.format(part)}{own}"]
    with storage_errors(f"{where}: {canonical(url)} cannot be read", "Check that the set is complete."):
        images, masks = (
            {
                name.rpartition(".")[0]: file
                for file in sorted(str(entry) for entry in fs.ls(folder, detail=False))
                if is_image_name(name := file.rpartition("/")[2]) and not name.startswith(".")
            }
            for folder in folders
        )
        if layout.names is None:
            names = sorted(images)
        else:
            names = read_whole(fs, f"{root}/{layout.names.format(part)}").decode().split()
    names = names[:limit]
    if not names:
        raise UserError(f"{where}: {canonical(url)} has no image of the part {part!r}: check `train` and `test`.")
    for found, folder in zip((images, masks), folders, strict=True):
        if missing := [name for name in names if name not in found]:
            raise UserError(
                f"{where}: {len(missing):,} of {len(names):,} files of the part {part!r} are missing in {folder}, such "
                f"as {missing[0]}: complete the set."
            )
    load = make_loader(url)
    return [
        Pair(name, training, functools.partial(load, images[name]), functools.partial(load, masks[name]))
        for name in names
    ]


def read_mask(pair: Pair, table: np.ndarray, size: Sequence[int], where: str) -> np.ndarray:
    """Class indices of a mask, uint8 [height, width], by ``Layout.table``. ``size`` is the image's (width, height).

    Raises UserError for a mask that is no image of indices, of another size, or with a value that no class has.
    """
    try:
        image = Image.open(io.BytesIO(pair.load_mask()))
        if image.mode not in ("P", "L"):
            raise ValueError(f"its pixels are {image.mode}, not indices of 8 bits")
        values = np.asarray(image, np.uint8)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{where}: the mask of {pair.key} cannot be used: {error}. Check the file.") from error
    if image.size != tuple(size):
        shown = f"{image.width} x {image.height} pixels, and its image {size[0]} x {size[1]}"
        raise UserError(f"{where}: the mask of {pair.key} has {shown}. Check the files.")
    labels = table[values]
    if (labels == _NO_CLASS).any():
        value, classes = int(values[labels == _NO_CLASS][0]), int(((table >= 0) & (table != IGNORED)).sum())
        raise UserError(
            f"{where}: the mask of {pair.key} has the value {value}, which none of {classes} classes has: set "
            "`classes` or `layout`, or correct the mask."
        )
    return labels.astype(np.uint8)


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
