"""The operations that RandAugment draws, with their magnitudes: a table for each augmentation backend.

A draw picks an operation by its position, so one more operation in a table would change all later draws under an equal
fingerprint. Tables are therefore never changed: one more operation is a new table of a new backend, whose name is in
the fingerprint of the samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

#: RandAugment's operations by torchvision's names; published records store an operation as its index here.
OPS = (
    "Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness",
    "Color", "Contrast", "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize",
)  # fmt: skip
_BINS = 31  # magnitude levels of RandAugment


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
