"""Codecs that need no codebook: the numbers of a type, of whole vectors or of their first numbers."""

from __future__ import annotations

import re
from typing import Literal, cast

import numpy as np

from reinforce.dataset.codecs.base import Codec, Floats, rounded

Numbers = Literal["float16", "float32", "int8"]


class Plain(Codec):
    """All numbers of a vector in one type; in int8 with a scale for each vector."""

    pattern = r"float16|float32|int8"
    example = "float16, float32, int8"

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.numbers = cast(Numbers, name)


class First(Codec):
    """The first numbers of a vector at unit norm, for models that were trained so that these suffice (Matryoshka).

    Vectors are rounded to float16 before.
    """

    pattern = r"first([1-9]\d{0,4})(?:-(int8))?"
    example = "first256, first256-int8"

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
        first = rounded(values[..., : self._first])
        norms = np.linalg.norm(first, axis=-1, keepdims=True)
        return first / np.where(norms > 0, norms, np.float32(1))
