"""Vectors at mean 0 and deviation 1 in each channel, by statistics of a sample, in another codec."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from reinforce.dataset.codecs.base import Arrays, Codec, Codes, FittedCodec, Floats

#: Names of the arrays of a codebook with the statistics of each channel.
MEAN, DEVIATION = "mean_of_channel", "deviation_of_channel"
_LEAST = 2  # vectors of a deviation


class Standardised(FittedCodec):
    """Stores (x - mean) / deviation by a codec in float16, or a fitted one, and decodes to these standardised values.

    A channel whose values are equal in the sample has deviation 1.
    """

    prefix = "standardised"

    def __init__(self, inner: Codec) -> None:
        super().__init__(f"{self.prefix}-{inner.name}")
        if not inner.fitted and inner.numbers != "float16":
            raise ValueError(f"{inner.name}: choose float16 or a codec with a codebook")
        self.numbers, self._inner = inner.numbers, inner

    @staticmethod
    def choices(dim: int) -> list[str]:
        return []

    def dim(self, dim: int) -> int:
        if self._inner.dim(dim) != dim:
            raise ValueError(f"{self._inner.name}: patch vectors are not shortened; choose pca{dim // 4}")
        return dim

    def width(self, dim: int) -> int:
        return self._inner.width(dim)

    def least(self, dim: int) -> int:
        return self._inner.least(dim) if isinstance(self._inner, FittedCodec) else _LEAST

    def require_encoder(self) -> None:
        if isinstance(self._inner, FittedCodec):
            self._inner.require_encoder()

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
            arrays |= self._inner.fit(self._standardise(sample, arrays), seed)
        return arrays

    def encode(self, values: Floats, arrays: Arrays) -> Codes:
        standardised = self._standardise(values, arrays)
        if isinstance(self._inner, FittedCodec):
            return self._inner.encode(standardised, arrays)
        with np.errstate(over="ignore"):
            return standardised.astype(np.float16)

    def decode(self, codes: Codes, arrays: Arrays) -> Floats:
        if isinstance(self._inner, FittedCodec):
            return self._inner.decode(codes, arrays)
        values: Floats = codes.astype(np.float32)
        return values

    @staticmethod
    def _standardise(values: Floats, arrays: Arrays) -> Floats:
        centred: Floats = values - arrays[MEAN]
        return np.divide(centred, arrays[DEVIATION], out=centred)
