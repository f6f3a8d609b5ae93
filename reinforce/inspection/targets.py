"""Targets of a batch as a student would get them: how certain each teacher is, and how far teachers agree.

For a batch of B pairs, teacher t at scale s gives P = softmax(s I_t X_t^T) for images, and the transpose for texts. The
entropy of P is divided by log B: 0 is one-hot, 1 uniform. The agreement of a sample is 1 - the Jensen-Shannon
divergence of the teachers' P at their scales / log T; both are means over the two directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from reinforce.dataset.vectors import Floats, agreements, entropies, normalized, softmax

BATCH = 256
#: Logit scales at which the entropy is measured.
SCALES = (1, 2, 3, 5, 7, 10, 15, 20, 25, 30, 40, 50, 60, 70, 85, 100, 125, 150, 200)
_ENTROPY_BATCHES = 8


@dataclass
class Targets:
    """Collects rows in batches. ``scales`` has the logit scale in force of each teacher with vectors of both sides."""

    scales: Mapping[str, float | None]
    agreement: list[np.ndarray] = field(default_factory=list)
    _rows: list[dict[str, tuple[Floats, Floats]]] = field(default_factory=list)
    _waiting: int = 0
    _entropies: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def add(self, rows: Mapping[str, tuple[Floats, Floats]]) -> None:
        """Add rows: by teacher, the vectors [R, D] of the first augmentation and of the true caption; NaN if null."""
        self._rows.append(dict(rows))
        self._waiting += _length(rows)
        while self._waiting >= 2 * BATCH:  # what remains in the end is a batch of at least this size
            self._take(BATCH)

    def finish(self) -> None:
        """Use the rows that are left."""
        if self._waiting:
            self._take(self._waiting)

    def entropy(self, teacher: str) -> list[float]:
        """Mean entropy at each of ``SCALES``; empty without rows."""
        found = self._entropies.get(teacher)
        return np.mean(found, axis=0).tolist() if found else []

    def agreements(self) -> np.ndarray:
        """Agreement of each row that was added, NaN where there is none."""
        return np.concatenate([np.empty(0), *self.agreement])

    def _take(self, count: int) -> None:
        joined = {
            teacher: tuple(np.concatenate([rows[teacher][side] for rows in self._rows]) for side in (0, 1))
            for teacher in self.scales
        }
        self._rows = [{teacher: (images[count:], texts[count:]) for teacher, (images, texts) in joined.items()}]
        self._waiting -= count
        batch = {teacher: (images[:count], texts[:count]) for teacher, (images, texts) in joined.items()}
        self._measure(batch, count)

    def _measure(self, batch: Mapping[str, tuple[Floats, Floats]], count: int) -> None:
        agreement = np.full(count, np.nan)
        valid = np.ones(count, bool)
        for images, texts in batch.values():
            valid &= np.isfinite(images).all(axis=1) & np.isfinite(texts).all(axis=1)
        if valid.sum() >= 2:
            cosines = {t: normalized(i[valid]) @ normalized(x[valid]).T for t, (i, x) in batch.items()}
            for teacher, values in cosines.items():
                measured = self._entropies.setdefault(teacher, [])
                if len(measured) < _ENTROPY_BATCHES:
                    measured.append(np.array([_mean_entropy(values, scale) for scale in SCALES]))
            scaled = [scale * cosines[t] for t, scale in self.scales.items() if scale is not None]
            if len(scaled) > 1:
                both = [agreements([softmax(one) for one in side]) for side in (scaled, [one.T for one in scaled])]
                agreement[valid] = np.mean(both, axis=0)
        self.agreement.append(agreement)


def _length(rows: Mapping[str, tuple[Floats, Floats]]) -> int:
    return len(next(iter(rows.values()))[0]) if rows else 0


def _mean_entropy(cosines: Floats, scale: float) -> float:
    """Mean entropy of a teacher's targets in both directions / log B."""
    found = [entropies(softmax(one)).mean() for one in (scale * cosines, scale * cosines.T)]
    return float(np.mean(found) / np.log(len(cosines)))
