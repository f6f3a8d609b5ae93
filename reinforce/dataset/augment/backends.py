"""Augmentation backends: the named, versioned functions that replay augmentation records, and what they draw from.

dataset.json records the backend of a dataset, and whoever replays its records loads it by that name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

from reinforce.dataset.augment import fixed_point
from reinforce.dataset.augment import records as augment
from reinforce.dataset.augment.fixed_point import FIXED_POINT_BACKEND
from reinforce.dataset.augment.operations import TORCHVISION, Operation
from reinforce.dataset.augment.records import AUGMENTATION_BACKEND, Augmentation
from reinforce.dataset.augment.tables import RAND_AUGMENT, OperationTable
from reinforce.errors import UserError


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
