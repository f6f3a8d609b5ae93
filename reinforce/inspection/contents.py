"""The most similar images among those that were looked at, and how many samples each class has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from reinforce.dataset.vectors import normalized
from reinforce.inspection.rows import Rows

_PAIRS = 24  # that are shown
_CHUNK = 512  # rows that are compared with all others at once
_COSINES = (0.9, 0.95, 0.98)
_CLASSES = 20  # of the largest ones, and of the smallest ones


@dataclass(frozen=True)
class Similar:
    """Pairs of rows with the highest cosine between the mean vectors of a teacher, the highest first, and the number of
    images that have another one at some cosines or above."""

    teacher: str
    pairs: Sequence[tuple[int, int, float]]
    counts: Sequence[tuple[float, int]]


def find_similar(rows: Rows) -> Similar | None:
    """The most similar images of all rows; None without a teacher of images or with fewer than two vectors."""
    if rows.compared is None:
        return None
    vectors = normalized(rows.image_vectors(rows.compared))
    finite = np.flatnonzero(np.isfinite(vectors).all(axis=1))
    if len(finite) < 2:
        return None
    vectors = np.ascontiguousarray(vectors[finite])
    pairs: list[tuple[float, int, int]] = []
    nearest = np.full(len(finite), -1.0, np.float32)
    for start in range(0, len(finite), _CHUNK):
        cosines = vectors[start : start + _CHUNK] @ vectors.T
        np.fill_diagonal(cosines[:, start:], -1)
        nearest[start : start + _CHUNK] = cosines.max(axis=1)
        cosines[np.arange(len(finite)) <= start + np.arange(len(cosines))[:, None]] = -1  # each pair once
        best = np.argpartition(-cosines, min(_PAIRS, cosines.size) - 1, axis=None)[:_PAIRS]
        first, second = np.unravel_index(best, cosines.shape)
        found = zip(cosines[first, second].tolist(), (first + start).tolist(), second.tolist(), strict=True)
        pairs = sorted([*pairs, *found], key=lambda pair: (-pair[0], pair[1:]))[:_PAIRS]
    shown = [(int(finite[one]), int(finite[other]), cosine) for cosine, one, other in pairs if other > one]
    return Similar(rows.compared, shown, [(cosine, int((nearest >= cosine).sum())) for cosine in _COSINES])


@dataclass(frozen=True)
class Classes:
    """Samples by class, the largest first: all classes or the largest and smallest ones, with how many are ``hidden``
    between them, and the samples ``without`` one."""

    count: int
    largest: Sequence[tuple[str, int]]
    smallest: Sequence[tuple[str, int]]
    hidden: int
    without: int

    @property
    def most(self) -> int:
        return self.largest[0][1]

    @property
    def least(self) -> int:
        return (self.smallest or self.largest)[-1][1]


def count_classes(rows: Rows) -> Classes | None:
    """The classes of the rows; None where fewer than two are stated, or where most samples have one of their own."""
    counts = Counter(name for name in rows.classes if name is not None)
    if len(counts) < 2 or 2 * len(counts) > counts.total():
        return None
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    cut = len(ordered) > 2 * _CLASSES
    largest, smallest = (ordered[:_CLASSES], ordered[-_CLASSES:]) if cut else (ordered, [])
    hidden = len(ordered) - len(largest) - len(smallest)
    return Classes(len(counts), largest, smallest, hidden, len(rows) - counts.total())
