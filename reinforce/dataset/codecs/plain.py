"""Codecs that need no codebook: the numbers of a type, of whole vectors or of their first numbers."""

from __future__ import annotations

import re

import numpy as np

from reinforce.dataset.codecs.base import Codec, Floats, rounded


class Plain(Codec):
    """All numbers of a vector in one type; in int8 with a scale for each vector. ``float16-int8`` rounds to float16
    before, so that vectors in float16 can be encoded later."""

    pattern = r"float16|float32|int8|float16-int8"
    example = "float16, float32, int8, float16-int8"

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.numbers, self.rounds = name.rpartition("-")[2], "-" in name

    @staticmethod
    def choices(dim: int) -> list[str]:
        return ["float32", "float16", "int8"]

    def prepare(self, values: Floats) -> Floats:
        return rounded(values) if self.rounds else values


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

    @staticmethod
    def choices(dim: int) -> list[str]:
        return [f"first{max(1, dim // 2)}"]

    def dim(self, dim: int) -> int:
        if dim < self._first:
            raise ValueError(f"{self.name}: the vectors have {dim} numbers; choose at most first{dim}")
        return self._first

    def prepare(self, values: Floats) -> Floats:
        first = rounded(values[..., : self._first])
        norms = np.linalg.norm(first, axis=-1, keepdims=True)
        return np.divide(first, norms, out=first, where=norms > 0)
