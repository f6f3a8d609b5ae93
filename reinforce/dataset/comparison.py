"""How far stored values of a layer differ from those that are computed again."""

from __future__ import annotations

from dataclasses import dataclass

#: The smallest cosine of a stored vector and the one that is computed again that counts as rounding.
MIN_COSINE = 0.99


@dataclass(frozen=True)
class Comparison:
    """Stored values of a layer against those computed again, in ``rows`` rows.

    ``equal`` counts rows without any difference, ``nulls`` those that are null on one side only. ``difference`` is the
    largest of a component and ``cosine`` the smallest of two vectors, None for what is no vector.
    """

    layer: str
    rows: int
    equal: int
    nulls: int
    difference: float | None = None
    cosine: float | None = None

    @property
    def fits(self) -> bool:
        return not self.nulls and (self.cosine is None or self.cosine >= MIN_COSINE)

    def line(self) -> str:
        parts = [f"{self.layer}: {self.equal:,} of {self.rows:,} rows are equal when computed again"]
        if self.nulls:
            parts.append(f"{self.nulls:,} rows are null on one side only")
        if self.cosine is not None:
            parts.append(f"largest difference {self.difference:.2g}, smallest cosine {self.cosine:.6f}")
        return ", ".join(parts) + ("" if self.fits else ": not what the model computes")
