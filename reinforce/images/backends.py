"""Augmentation backends: the tables that augmentation records are sampled from, and the functions that replay them.

Both are named and versioned: dataset.json records the backend of a dataset, and whoever replays its records loads it by
that name. Sampling is a pure function of seeds, which needs only numpy.

The backend ``fixed-point-1`` takes less CPU, and gives the same pixels on every processor:

- Crops are resized by a separable Catmull-Rom filter (bicubic with a = -0.5, widened when reducing, as Pillow's) with
  16-bit fixed-point weights, the height before the width, rounded to uint8 in between. Two packages compute this bit by
  bit alike: ``cykooz-resizer`` (Rust, several times faster than Pillow) and torch, which is used where the former is
  not installed. Natural images differ from Pillow's resizing by at most 2 of 255 levels.
- The operations are those of ``torchvision-pil-1`` with magnitudes rounded so that Pillow's floating-point arithmetic
  is exact: to multiples of 1/128 for Brightness, Color, Contrast and Sharpness, and of 2**-16 for the matrices of
  ShearX, ShearY and Rotate. So fused multiply-add instructions, which some processors have, change nothing.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from PIL import Image

from reinforce.errors import UserError
from reinforce.images import records
from reinforce.images.records import (
    AUGMENTATION_BACKEND,
    RAND_AUGMENT,
    TORCHVISION,
    Augmentation,
    Crop,
    Op,
    Operation,
    OperationTable,
    Resize,
    affine,
)
from schemas.seeds import philox_bits, seed_for

if TYPE_CHECKING:
    from reinforce.config import Augmentations

FIXED_POINT_BACKEND = "fixed-point-1"

#: SHA-256 of the resized images of ``resizing_digest``. Part of the definition of the backend.
_DIGEST = "fb1c744eaab09e4dbeecc34a067ee8e76a71871edefefa22e6e17214b93a385b"
_FACTOR_STEPS = 128
_MATRIX_STEPS = 2**16


def resize_with_cykooz() -> Resize:
    """Resizing by cykooz-resizer. Raises ImportError if it is not installed."""
    from cykooz_resizer import FilterType, ResizeAlg, ResizeOptions, Resizer

    options = ResizeOptions(ResizeAlg.convolution(FilterType.catmull_rom), use_alpha=False)

    def resize(image: Image.Image, size: int) -> Image.Image:
        out = Image.new("RGB", (size, size))
        Resizer().resize_pil(image, out, options)  # one object for each call, because it is not thread-safe
        return out

    return resize


def resize_with_torch() -> Resize:
    """The same resizing, computed by torch."""
    import torch

    def resize(image: Image.Image, size: int) -> Image.Image:
        # Transposed, because torch resizes the width first. Pillow transposes and interleaves faster than torch.
        pixels = torch.from_numpy(np.array(image.transpose(Image.Transpose.TRANSPOSE))).permute(2, 0, 1)
        out = torch.nn.functional.interpolate(pixels[None], (size, size), mode="bicubic", antialias=True)[0]
        bands = [Image.fromarray(band).transpose(Image.Transpose.TRANSPOSE) for band in out.numpy()]
        return Image.merge("RGB", bands)

    return resize


#: The packages that can resize, in the order in which they are tried.
RESIZERS: Mapping[str, Callable[[], Resize]] = {"cykooz-resizer": resize_with_cykooz, "torch": resize_with_torch}


def load_resizer() -> Resize:
    """Load the first package that gives the pixels of this backend. Raises UserError if there is none."""
    refused = []
    for package, load in RESIZERS.items():
        try:
            resize = load()
        except ImportError:
            continue
        if resizing_digest(resize) == _DIGEST:
            return resize
        refused.append(f"{package} {importlib.metadata.version(package)}")
    raise UserError(
        f"augmentation backend {FIXED_POINT_BACKEND}: {' and '.join(refused) or 'no installed package'} does not give "
        "its pixels on this machine. Install the versions of constraints.txt."
    )


def resizing_digest(resize: Resize) -> str:
    """SHA-256 of a few resized images: enlarged, reduced, distorted, and with extreme values."""
    digest = hashlib.sha256()
    for number, (width, height, size) in enumerate(((5, 3, 24), (61, 45, 32), (40, 97, 41), (150, 8, 9), (1, 1, 8))):
        values = np.arange(1, 3 * width * height + 1, dtype=np.uint32) * np.uint32(2654435761) >> np.uint32(24)
        pixels = values.astype(np.uint8).reshape(height, width, 3)
        image = Image.fromarray(pixels if number % 2 else pixels // 128 * 255)
        digest.update(np.asarray(resize(image, size)).tobytes())
    return digest.hexdigest()


def _blend(operation: Operation, image: Image.Image, magnitude: float) -> Image.Image:
    return operation(image, round(magnitude * _FACTOR_STEPS) / _FACTOR_STEPS)


def _exact_affine(image: Image.Image, *matrix: float) -> Image.Image:
    return affine(image, *(round(value * _MATRIX_STEPS) / _MATRIX_STEPS for value in matrix))


def _rotate(image: Image.Image, magnitude: float) -> Image.Image:
    """Rotate counter-clockwise around the centre, by ``magnitude`` degrees."""
    angle = math.radians(magnitude)
    cos, sin = math.cos(angle), math.sin(angle)
    x, y = image.width / 2, image.height / 2
    return _exact_affine(image, cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y)


#: Every operation by torchvision's name.
OPERATIONS: Mapping[str, Operation] = {
    **TORCHVISION,
    **{name: functools.partial(_blend, TORCHVISION[name]) for name in ("Brightness", "Color", "Contrast", "Sharpness")},
    "ShearX": lambda image, magnitude: _exact_affine(image, 1, magnitude, 0, 0, 1, 0),
    "ShearY": lambda image, magnitude: _exact_affine(image, 1, 0, 0, magnitude, 1, 0),
    "Rotate": _rotate,
}


_ATTEMPTS = 10  # crops that are tried before falling back to a central one


class Replayer(Protocol):
    """Applies a record to the RGB image it was sampled for. Thread-safe."""

    def __call__(self, image: Image.Image, augmentation: Augmentation, size: int | None = None) -> np.ndarray:
        """Return uint8 [size, size, 3]; ``size`` is by default the recorded one.

        At another size, translations are scaled with it, so that they shift the image by the same fraction.
        Raises ValueError if the image is not RGB, the crop does not fit into it or an operation is unknown.
        """


@dataclass(frozen=True)
class Backend:
    """How crops are resized, loaded when it is used; the operations by name; and the table that records draw from."""

    load_resize: Callable[[], records.Resize]
    operations: Mapping[str, Operation]
    table: OperationTable


#: Every backend by its name.
BACKENDS: dict[str, Backend] = {
    AUGMENTATION_BACKEND: Backend(lambda: records.resize, TORCHVISION, RAND_AUGMENT),
    FIXED_POINT_BACKEND: Backend(load_resizer, OPERATIONS, RAND_AUGMENT),
}


def known_operations() -> tuple[str, ...]:
    """The names of the operations of all backends, in the order of their tables."""
    return tuple(dict.fromkeys(name for backend in BACKENDS.values() for name in backend.table.names))


@functools.cache
def load_backend(name: str) -> Replayer:
    """Load the backend of a name, once per process. Raises UserError if there is none or a package is missing."""
    if name not in BACKENDS:
        raise UserError(
            f"unknown augmentation backend {name!r}; this version has {', '.join(BACKENDS)}. Use the version of the "
            "program that wrote the dataset."
        )
    backend = BACKENDS[name]
    resize = backend.load_resize()

    def replay(image: Image.Image, augmentation: Augmentation, size: int | None = None) -> np.ndarray:
        return np.asarray(records.replay(image, augmentation, size, resize, backend.operations))

    return replay


def sample_augmentation(
    policy: Augmentations, seed: int, key: str, index: int, width: int, height: int
) -> Augmentation:
    """Sample record ``index`` of the sample ``key``, whose RGB image has ``width`` x ``height`` pixels.

    A function of the arguments only: the same in every process and on every machine.
    """
    draws = 2 * _ATTEMPTS + 2 + 1 + 2 * policy.rand_augment.ops
    bits = philox_bits(seed_for(seed, key, "augmentation", index), draws)
    uniforms: list[float] = ((bits >> np.uint64(11)) * 2.0**-53).tolist()
    # The number between those of the crop and those of the operations decides nothing; it keeps the seeds' order.
    for_crop, for_ops = uniforms[: 2 * _ATTEMPTS + 2], uniforms[2 * _ATTEMPTS + 3 :]
    crop = _sample_crop(for_crop, policy.scale, policy.ratio, width, height)
    table = BACKENDS[policy.backend].table
    magnitudes = table.magnitudes(policy.rand_augment.magnitude, policy.size)
    ops = []  # RandAugment's
    for operation, sign in zip(for_ops[::2], for_ops[1::2], strict=True):
        name = table.names[int(operation * len(table.names))]
        magnitude = magnitudes[name]
        ops.append(Op(name, -magnitude if name in table.signed and sign < 0.5 else magnitude))
    return Augmentation(crop, policy.size, tuple(ops))


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
