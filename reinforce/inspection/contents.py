"""Similar images among those that were looked at, and how many samples each class has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from reinforce.dataset.vectors import normalized
from reinforce.inspection.plots import Chart, distribution
from reinforce.inspection.rows import Rows
from reinforce.seeds import permutation

_PAIRS = 24  # that are shown
_SHOWN, _NEAREST = 24, 6  # images, and the nearest ones of each
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


def find_neighbours(rows: Rows, order: Sequence[int]) -> list[tuple[int, Mapping[str, Sequence[tuple[int, float]]]]]:
    """The first rows of ``order``, each with the nearest rows and their cosines, the nearest first: by each teacher
    that encodes images alone, by the mean vectors of crops."""
    vectors = {teacher: normalized(rows.image_vectors(teacher)) for teacher in rows.image_teachers}
    return [(row, {teacher: _nearest(of, row) for teacher, of in vectors.items()}) for row in order[:_SHOWN]]


def _nearest(vectors: np.ndarray, row: int) -> list[tuple[int, float]]:
    """The rows of the nearest of unit vectors [R, D] with their cosines, of those that are finite."""
    cosines = vectors @ vectors[row]
    cosines[row] = np.nan
    finite = np.flatnonzero(np.isfinite(cosines))
    nearest = finite[np.argsort(-cosines[finite], kind="stable")][:_NEAREST]
    return [(int(one), float(cosines[one])) for one in nearest]


def similarity_charts(rows: Rows, seed: int) -> Iterator[Chart]:
    """For each teacher, cosines of two crops of one image and of two images, each the mean over their crops."""
    order = permutation(len(rows), seed, "pairs of images")
    for teacher, count in rows.image_teachers.items():
        vectors = rows.image_vectors(teacher)
        named = {"two images": np.einsum("rd,rd->r", vectors[order[1:]], vectors[order[:-1]])}
        if count > 1:
            named["two crops of one image"] = (count * np.square(vectors).sum(axis=1) - 1) / (count - 1)
        finite = {name: values[np.isfinite(values)] for name, values in named.items()}
        if found := {name: values for name, values in finite.items() if len(values)}:
            text = "Mean cosines of crops. Where they do not differ, the teacher cannot tell these images apart."
            yield distribution(teacher, text, "cosine", "pairs", found)
