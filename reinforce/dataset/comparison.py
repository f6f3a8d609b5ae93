"""How far the values of a layer differ on two sides: stored and computed again, or in two datasets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

#: The smallest cosine of a stored vector and the one that is computed again that counts as rounding.
MIN_COSINE = 0.99


@dataclass
class Comparison:
    """Values of ``rows`` rows on two sides. ``equal`` rows have no difference, ``nulls`` are null on one side alone.

    ``difference`` is the largest one of a number, ``cosine`` the smallest of two vectors, and ``cosines`` the sum of
    those of ``vectors`` vectors. They are None or 0 for what is no number or vector.
    """

    rows: int = 0
    equal: int = 0
    nulls: int = 0
    difference: float | None = None
    cosine: float | None = None
    vectors: int = 0
    cosines: float = 0.0

    @classmethod
    def of_values(cls, first: Sequence[Sequence[Any]], second: Sequence[Sequence[Any]]) -> Comparison:
        rows = [*zip(zip(*first, strict=True), zip(*second, strict=True), strict=True)]
        nulls = sum(any((a is None) != (b is None) for a, b in zip(one, other, strict=True)) for one, other in rows)
        return cls(len(rows), sum(one == other for one, other in rows), nulls)

    @classmethod
    def of_numbers(cls, first: npt.NDArray[np.float32], second: npt.NDArray[np.float32]) -> Comparison:
        """Compare numbers [rows, ...], NaN where one is null. Those of another shape are not equal."""
        if first.shape != second.shape:
            return cls(len(first))
        first, second = first.reshape(len(first), -1), second.reshape(len(second), -1)
        null = np.isnan(first), np.isnan(second)
        both = ~(null[0] | null[1])
        equal = int(((first == second) | (null[0] & null[1])).all(axis=1).sum())
        difference = float(np.abs(first[both] - second[both]).max()) if both.any() else None
        return cls(len(first), equal, int((null[0] != null[1]).any(axis=1).sum()), difference)

    def add_cosines(self, cosines: npt.NDArray[np.float32], same: npt.NDArray[np.bool_], least: float) -> None:
        """Add the cosines [rows, N] of rows that are not null, of which the ``same`` ones [rows] are equal already.

        Others count as equal from a cosine of ``least`` on, if that is below 1.
        """
        cosines[same] = 1.0
        if least < 1:
            self.equal += int((~same & (cosines >= least).all(axis=1)).sum())
        self.vectors, self.cosines = cosines.size, float(cosines.sum(dtype=np.float64))
        self.cosine = float(cosines.min()) if cosines.size else None

    def add(self, other: Comparison) -> None:
        for name in ("rows", "equal", "nulls", "vectors", "cosines"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.cosine = min((one for one in (self.cosine, other.cosine) if one is not None), default=None)
        self.difference = max((one for one in (self.difference, other.difference) if one is not None), default=None)

    @property
    def mean_cosine(self) -> float | None:
        return self.cosines / self.vectors if self.vectors else None

    @property
    def fits(self) -> bool:
        """Whether values that were computed again differ by rounding at most."""
        return not self.nulls and (self.cosine is None or self.cosine >= MIN_COSINE)

    def line(self, layer: str) -> str:
        """How values of a layer that were computed again differ from the stored ones."""
        parts = [f"{layer}: {self.equal:,} of {self.rows:,} rows are equal when computed again"]
        if self.nulls:
            parts.append(f"{self.nulls:,} rows are null on one side only")
        if self.cosine is not None:
            parts.append(f"largest difference {self.difference:.2g}, smallest cosine {self.cosine:.6f}")
        return ", ".join(parts) + ("" if self.fits else ": not what the model computes")
