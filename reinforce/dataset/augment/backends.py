"""Augmentation backends: the named, versioned functions that replay augmentation records.

dataset.json records the backend of a dataset, and whoever replays its records loads it by that name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
from PIL import Image

from reinforce.dataset.augment import fixed_point
from reinforce.dataset.augment import records as augment
from reinforce.dataset.augment.fixed_point import FIXED_POINT_BACKEND
from reinforce.dataset.augment.operations import TORCHVISION, Operation
from reinforce.dataset.augment.records import AUGMENTATION_BACKEND, Augmentation
from reinforce.errors import UserError


class Replay(Protocol):
    """Applies a record to the RGB image it was sampled for. Thread-safe."""

    def __call__(self, image: Image.Image, augmentation: Augmentation, size: int | None = None) -> np.ndarray:
        """Return uint8 [size, size, 3]; ``size`` is by default the recorded one.

        At another size, translations are scaled with it, so that they shift the image by the same fraction.
        Raises ValueError if the image is not RGB, the crop does not fit into it or an operation is unknown.
        """


#: How each backend resizes, which is loaded when it is used, and its operations.
_PARTS: dict[str, tuple[Callable[[], augment.Resize], Mapping[str, Operation]]] = {
    AUGMENTATION_BACKEND: (lambda: augment.resize, TORCHVISION),
    FIXED_POINT_BACKEND: (fixed_point.load_resizer, fixed_point.OPERATIONS),
}

#: Names of all backends.
BACKENDS = tuple(_PARTS)


@functools.cache
def load_backend(name: str) -> Replay:
    """Load the backend of a name, once per process. Raises UserError if there is none or a package is missing."""
    if name not in _PARTS:
        raise UserError(
            f"unknown augmentation backend {name!r}; this version has {', '.join(BACKENDS)}. Use the version of the "
            "program that wrote the dataset."
        )
    load, operations = _PARTS[name]
    resize = load()

    def replay(image: Image.Image, augmentation: Augmentation, size: int | None = None) -> np.ndarray:
        return np.asarray(augment.replay(image, augmentation, size, resize, operations))

    return replay
