"""Augmentation backends: the tables that augmentation records are sampled from, and the functions that replay them.

Both are named and versioned: dataset.json records the backend of a dataset, and whoever replays its records loads it by
that name. Sampling is a pure function of seeds, which needs only numpy.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

from reinforce.config import Augmentations
from reinforce.dataset.augment import fixed_point
from reinforce.dataset.augment import records as augment
from reinforce.dataset.augment.fixed_point import FIXED_POINT_BACKEND
from reinforce.dataset.augment.operations import RAND_AUGMENT, TORCHVISION, Operation, OperationTable
from reinforce.dataset.augment.records import AUGMENTATION_BACKEND, Augmentation, Crop, Op
from reinforce.errors import UserError
from reinforce.seeds import philox_bits, seed_for

_ATTEMPTS = 10  # crops that are tried before falling back to a central one


class Replay(Protocol):
    """Applies a record to the RGB image it was sampled for. Thread-safe."""

    def __call__(self, image: Image.Image, augmentation: Augmentation, size: int | None = None) -> np.ndarray:
        """Return uint8 [size, size, 3]; ``size`` is by default the recorded one.

        At another size, translations are scaled with it, so that they shift the image by the same fraction.
        Raises ValueError if the image is not RGB, the crop does not fit into it or an operation is unknown.
        """


@dataclass(frozen=True)
class Backend:
    """How crops are resized, loaded when it is used; the operations by name; and the table that records draw from."""

    load_resize: Callable[[], augment.Resize]
    operations: Mapping[str, Operation]
    table: OperationTable


#: Every backend by its name.
BACKENDS: dict[str, Backend] = {
    AUGMENTATION_BACKEND: Backend(lambda: augment.resize, TORCHVISION, RAND_AUGMENT),
    FIXED_POINT_BACKEND: Backend(fixed_point.load_resizer, fixed_point.OPERATIONS, RAND_AUGMENT),
}


def known_operations() -> tuple[str, ...]:
    """The names of the operations of all backends, in the order of their tables."""
    return tuple(dict.fromkeys(name for backend in BACKENDS.values() for name in backend.table.names))


@functools.cache
def load_backend(name: str) -> Replay:
    """Load the backend of a name, once per process. Raises UserError if there is none or a package is missing."""
    if name not in BACKENDS:
        raise UserError(
            f"unknown augmentation backend {name!r}; this version has {', '.join(BACKENDS)}. Use the version of the "
            "program that wrote the dataset."
        )
    backend = BACKENDS[name]
    resize = backend.load_resize()

    def replay(image: Image.Image, augmentation: Augmentation, size: int | None = None) -> np.ndarray:
        return np.asarray(augment.replay(image, augmentation, size, resize, backend.operations))

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
    for_crop, (apply, *for_ops) = uniforms[: 2 * _ATTEMPTS + 2], uniforms[2 * _ATTEMPTS + 2 :]
    crop = _sample_crop(for_crop, policy.scale, policy.ratio, width, height)
    if apply >= policy.rand_augment.probability:
        return Augmentation(crop, policy.size, None)
    table = BACKENDS[policy.backend].table
    magnitudes = table.magnitudes(policy.rand_augment.magnitude, policy.size)
    return Augmentation(crop, policy.size, _sample_ops(for_ops, table, magnitudes))


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


def _sample_ops(uniforms: Sequence[float], table: OperationTable, magnitudes: Mapping[str, float]) -> tuple[Op, ...]:
    """RandAugment's operations; ``uniforms`` are (operation, sign) of each."""
    ops = []
    for operation, sign in zip(uniforms[::2], uniforms[1::2], strict=True):
        name = table.names[int(operation * len(table.names))]
        magnitude = magnitudes[name]
        ops.append(Op(name, -magnitude if name in table.signed and sign < 0.5 else magnitude))
    return tuple(ops)
