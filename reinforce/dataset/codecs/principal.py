"""Principal components in bytes: the directions in which the vectors of a sample differ most."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from reinforce.dataset.codecs.base import Arrays, Codes, FittedCodec, Floats

_LEVELS = 127  # on each side of 0
_ZERO = 128  # the byte of 0
_LEAST_FOR_EACH = 4  # vectors of a sample for each component


class PrincipalComponents(FittedCodec):
    """The first components of a vector, each in a byte whose step is that of its largest value in the sample."""

    pattern = r"pca[1-9]\d{0,3}"
    example = "pca128"

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._components = int(name[3:])

    @staticmethod
    def choices(dim: int) -> list[str]:
        return [f"pca{max(1, dim // 4)}"]

    def dim(self, dim: int) -> int:
        if dim < self._components:
            raise ValueError(f"{self.name}: the vectors have {dim} numbers; choose at most pca{dim}")
        return dim

    def width(self, dim: int) -> int:
        return self._components

    def least(self, dim: int) -> int:
        return _LEAST_FOR_EACH * self._components

    def shapes(self, dim: int) -> Mapping[str, tuple[int, ...]]:
        return {"mean": (dim,), "basis": (self._components, dim), "steps": (self._components,)}

    def fit(self, sample: Floats, seed: int) -> Arrays:
        wide = sample.astype(np.float64)
        mean = wide.mean(axis=0)
        _, vectors = np.linalg.eigh(np.cov(wide, rowvar=False).reshape(len(mean), len(mean)))
        basis = vectors[:, ::-1][:, : self._components].T
        basis *= np.sign(basis[np.arange(len(basis)), np.abs(basis).argmax(axis=1)])[:, None]
        steps = np.abs((wide - mean) @ basis.T).max(axis=0) / _LEVELS
        steps[steps == 0] = 1
        arrays = {"mean": mean, "basis": basis, "steps": steps}
        return {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}

    def encode(self, values: Floats, arrays: Arrays) -> Codes:
        steps = ((values - arrays["mean"]) @ arrays["basis"].T) / arrays["steps"]
        codes: Codes = (np.rint(steps).clip(-_LEVELS, _LEVELS) + _ZERO).astype(np.uint8)
        return codes

    def decode(self, codes: Codes, arrays: Arrays) -> Floats:
        steps = codes.astype(np.float32) - _ZERO
        values: Floats = (steps * arrays["steps"]) @ arrays["basis"] + arrays["mean"]
        return values
