"""Images that are nearest to some, and how similar images are, by teachers that encode images alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from reinforce.dataset.reading.dataset import Dataset
from reinforce.dataset.vectors import normalized
from reinforce.inspection.contents import Similar
from reinforce.inspection.gallery import Card, Thumbnail, draw_rows
from reinforce.inspection.plots import Chart, distribution
from reinforce.inspection.rows import Rows
from reinforce.seeds import permutation

_SHOWN, _NEAREST = 24, 6  # images, and other images of each

#: A row, and by teacher the rows of the nearest images with their cosines, the nearest first.
Found = tuple[int, Mapping[str, Sequence[tuple[int, float]]]]
#: The same as thumbnails.
Shown = tuple[Thumbnail, Sequence[tuple[str, Sequence[Thumbnail]]]]


def find_neighbours(rows: Rows, order: Sequence[int]) -> list[Found]:
    """The nearest images of the first rows of ``order``, by the mean vectors of their crops."""
    found: list[tuple[int, dict[str, Sequence[tuple[int, float]]]]] = [(row, {}) for row in order[:_SHOWN]]
    for teacher in rows.image_teachers:
        vectors = normalized(rows.image_vectors(teacher))
        for row, nearest in found:
            nearest[teacher] = _nearest(vectors, row)
    return [*found]


def _nearest(vectors: np.ndarray, row: int) -> list[tuple[int, float]]:
    """The rows of the nearest of unit vectors [R, D] with their cosines, of those that are finite."""
    cosines = vectors @ vectors[row]
    cosines[row] = np.nan
    finite = np.flatnonzero(np.isfinite(cosines))
    nearest = finite[np.argsort(-cosines[finite], kind="stable")][:_NEAREST]
    return [(int(one), float(cosines[one])) for one in nearest]


def draw_neighbours(
    data: Dataset, rows: Rows, found: Sequence[Found], cards: Sequence[Card], write: Callable[[str, bytes], None]
) -> list[Shown]:
    """Thumbnails of neighbours; those of samples that are not in the gallery are drawn, and ``write`` gets them."""
    wanted = {row for one, nearest in found for row in (one, *(row for of in nearest.values() for row, _ in of))}
    drawn = draw_wanted(data, rows, wanted, cards, "near", write)
    shown: list[Shown] = []
    for row, nearest in found:
        lines = [
            (teacher, [replace(drawn[other], value=f"{cosine:.3f}") for other, cosine in of if other in drawn])
            for teacher, of in nearest.items()
        ]
        if row in drawn:
            shown.append((drawn[row], lines))
    return shown


def draw_pairs(
    data: Dataset, rows: Rows, similar: Similar | None, cards: Sequence[Card], write: Callable[[str, bytes], None]
) -> list[tuple[float, Sequence[Thumbnail]]]:
    """The pairs of similar images as their cosines and thumbnails."""
    pairs = similar.pairs if similar else ()
    drawn = draw_wanted(data, rows, {row for pair in pairs for row in pair[:2]}, cards, "pair", write)
    return [(cosine, [drawn[one], drawn[other]]) for one, other, cosine in pairs if one in drawn and other in drawn]


def draw_wanted(
    data: Dataset,
    rows: Rows,
    wanted: Collection[int],
    cards: Sequence[Card],
    stem: str,
    write: Callable[[str, bytes], None],
) -> dict[int, Thumbnail]:
    """Thumbnails of rows: those of cards, and of the ``wanted`` rows that are not in the gallery, which are drawn."""
    drawn = {card.row: Thumbnail.of(card, "") for card in cards}
    places = {row: rows.places[row] for row in sorted({*wanted} - drawn.keys())}
    return drawn | draw_rows(data, places, stem, rows.problems, write)


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
