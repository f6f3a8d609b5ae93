"""Codecs that need no codebook: the numbers of a type, of whole vectors or of their first numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from reinforce.dataset.codecs.base import Arrays, Codec, Codes, FittedCodec, Floats


class Plain(Codec):
    """All numbers of a vector in one type; in int8 with a scale for each vector. ``float16-int8`` rounds to float16
    before, so that vectors in float16 can be encoded later."""

    pattern = r"float16|float32|int8|float16-int8"
    example = "float16, float32, int8, float16-int8"

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.numbers, self.rounds = name.rpartition("-")[2], "-" in name


class First(Codec):
    """The first numbers of a vector at unit norm, for models that were trained so that these suffice (Matryoshka).

    Vectors are rounded to float16 before. One whose first numbers are zero stays zero, and is not stored.
    """

    pattern = r"first([1-9]\d{0,4})(?:-(int8))?"
    example = "first256, first256-int8"
    rounds = True

    def __init__(self, name: str) -> None:
        super().__init__(name)
        found = re.fullmatch(self.pattern, name)
        assert found is not None
        self._first, self.numbers = int(found[1]), found[2] or "float16"

    def dim(self, dim: int) -> int:
        if dim < self._first:
            raise ValueError(f"{self.name}: the vectors have {dim} numbers; choose at most first{dim}")
        return self._first

    def prepare(self, values: Floats) -> Floats:
        first = super().prepare(values[..., : self._first])
        norms = np.linalg.norm(first, axis=-1, keepdims=True)
        return np.divide(first, norms, out=first, where=norms > 0)


_LEVELS = 127  # on each side of 0
_ZERO = 128  # the byte of 0
_LEAST_FOR_EACH = 4  # vectors of a sample for each component


class PrincipalComponents(FittedCodec):
    """The first principal components of a vector, the directions in which the vectors of a sample differ most, each in
    a byte whose step is that of its largest value in the sample."""

    pattern = r"pca[1-9]\d{0,3}"
    example = "pca128"

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.codes = int(name[3:])
        self.least = _LEAST_FOR_EACH * self.codes

    def dim(self, dim: int) -> int:
        if dim < self.codes:
            raise ValueError(f"{self.name}: the vectors have {dim} numbers; choose at most pca{dim}")
        return dim

    def shapes(self, dim: int) -> Mapping[str, tuple[int, ...]]:
        return {"mean": (dim,), "basis": (self.codes, dim), "steps": (self.codes,)}

    def fit(self, sample: Floats, seed: int) -> Arrays:
        wide = sample.astype(np.float64)
        mean = wide.mean(axis=0)
        _, vectors = np.linalg.eigh(np.cov(wide, rowvar=False).reshape(len(mean), len(mean)))
        basis = vectors[:, ::-1][:, : self.codes].T
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


#: Names of the arrays of a codebook with the statistics of each channel.
MEAN, DEVIATION = "mean_of_channel", "deviation_of_channel"
_LEAST = 2  # vectors of a deviation


class Standardised(FittedCodec):
    """Stores (x - mean) / deviation by a codec in float16, or a fitted one, and decodes to these standardised values.

    The mean and the deviation of each channel are those of the sample; a channel whose values are equal there has
    deviation 1.
    """

    prefix = "standardised"

    def __init__(self, inner: Codec) -> None:
        super().__init__(f"{self.prefix}-{inner.name}")
        if not inner.fitted and inner.numbers != "float16":
            raise ValueError(f"{inner.name}: choose float16 or a codec with a codebook")
        self.numbers, self.codes, self._inner = inner.numbers, inner.codes, inner
        self.least, self.encoder = (inner.least, inner.encoder) if isinstance(inner, FittedCodec) else (_LEAST, None)

    def dim(self, dim: int) -> int:
        if self._inner.dim(dim) != dim:
            raise ValueError(f"{self._inner.name}: patch vectors are not shortened; choose pca{dim // 4}")
        return dim

    def shapes(self, dim: int) -> Mapping[str, tuple[int, ...]]:
        own = {MEAN: (dim,), DEVIATION: (dim,)}
        return {**own, **(self._inner.shapes(dim) if isinstance(self._inner, FittedCodec) else {})}

    def fit(self, sample: Floats, seed: int) -> Arrays:
        wide = sample.astype(np.float64)
        deviation = wide.std(axis=0)
        deviation[deviation == 0] = 1
        own = {MEAN: wide.mean(axis=0), DEVIATION: deviation}
        arrays: dict[str, npt.NDArray[np.float32]] = {name: one.astype(np.float32) for name, one in own.items()}
        if isinstance(self._inner, FittedCodec):
            arrays |= self._inner.fit((sample - arrays[MEAN]) / arrays[DEVIATION], seed)
        return arrays

    def encode(self, values: Floats, arrays: Arrays) -> Codes:
        standardised: Floats = values - arrays[MEAN]
        standardised /= arrays[DEVIATION]
        if isinstance(self._inner, FittedCodec):
            return self._inner.encode(standardised, arrays)
        with np.errstate(over="ignore"):
            return standardised.astype(np.float16)

    def decode(self, codes: Codes, arrays: Arrays) -> Floats:
        if isinstance(self._inner, FittedCodec):
            return self._inner.decode(codes, arrays)
        values: Floats = codes.astype(np.float32)
        return values
