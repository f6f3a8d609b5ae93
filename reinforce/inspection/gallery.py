"""The samples that the gallery shows: which ones, in which of its tabs, and their pictures."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from reinforce.dataset.kinds.registry import kind_of
from reinforce.dataset.reading.dataset import Dataset
from reinforce.dataset.reading.sample import SHOWN_REPLAYS, Pictures, Sample, ShownSample, draw, webp
from reinforce.errors import UserError
from reinforce.inspection.overview import Quarantined
from reinforce.inspection.rows import Rows
from reinforce.inspection.selection import Place
from reinforce.seeds import permutation

_RANDOM, _RANKED, _NULL = 96, 24, 24  # samples in the random tab, in each ranked tab, and among null rows
_SIDE, _REPLAY_SIDE = 420, 144  # pixels


@dataclass(frozen=True)
class Card:
    """A sample in the gallery.

    ``row`` is its number among the rows that were looked at, ``ranks`` its place in each tab that shows it,
    ``agreement`` that of the teachers, ``picture`` the stem of its files or None with a ``problem``, and
    ``quarantined`` why layers are null for it. ``grids`` are files by layer: pictures of what it has of each crop, side
    by side.
    """

    row: int
    shard: str
    shown: ShownSample
    ranks: Mapping[str, int]
    agreement: float | None
    picture: str | None
    problem: str
    quarantined: tuple[Quarantined, ...]
    grids: Mapping[str, str] = field(default_factory=dict)


def choose(rows: Rows, seed: int, refused: set[tuple[str, str]], others: Collection[int] = ()) -> dict[str, list[int]]:
    """The rows of each tab, in its order; ``refused`` are the shard and key of items, and ``others`` are rows that
    other pages show."""
    tabs = {"random": permutation(len(rows), seed, "inspected samples").tolist()[:_RANDOM]}
    agreement = rows.targets.agreements()
    if len(agreement) == len(rows):
        tabs["agree"] = _extreme(-agreement)
        tabs["disagree"] = _extreme(agreement)
    tabs["worst"] = _extreme(mean_rank(rows))
    gap = synthetic_gap(rows)
    tabs["synthetic"] = [row for row in _extreme(-gap) if gap[row] > 0]
    tabs["true"] = [row for row in _extreme(gap) if gap[row] < 0]
    null = [row for row, (group, _) in enumerate(rows.places) if (group.shard, rows.keys[row]) in refused]
    tabs["quarantine"] = null[:_NULL]
    shown = sorted({*others, *(row for found in tabs.values() for row in found)})
    tabs["key"] = sorted(shown, key=lambda row: (rows.places[row][0].shard, rows.keys[row], row))
    return tabs


def mean_rank(rows: Rows) -> np.ndarray:
    """The rank of each row's true caption by its similarity to the image, from 0 for the lowest to 1, mean over the
    teachers [R]; NaN where a teacher has no vectors of both."""
    ranks = []
    for teacher in rows.teachers:
        values = rows.true_similarity(teacher)
        finite = np.isfinite(values)
        if finite.any():
            rank = np.full(len(rows), np.nan)
            rank[finite] = np.searchsorted(np.sort(values[finite]), values[finite]) / max(1, finite.sum() - 1)
            ranks.append(rank)
    return np.mean(ranks, axis=0) if ranks else np.full(len(rows), np.nan)


def measures(rows: Rows) -> dict[str, np.ndarray]:
    """Numbers of all rows [R] by which cards can be sorted and filtered, by what they are; NaN where there is none."""
    found: dict[str, np.ndarray] = {}
    if len(agreement := rows.targets.agreements()) == len(rows):
        found["agreement of the teachers"] = agreement
    for teacher in rows.teachers:
        found[f"fit of the true caption by {teacher}"] = rows.true_similarity(teacher)
    lengths = [len(texts[0].split()) if texts else np.nan for texts in rows.captions]
    found["words of the true caption"] = np.array(lengths, np.float64)
    return {name: values for name, values in found.items() if np.isfinite(values).any()}


def synthetic_gap(rows: Rows) -> np.ndarray:
    """By how much the synthetic captions of each row are more similar to its image than the true one [R].

    The mean over teachers, captioners and captions; NaN where there is nothing to compare.
    """
    gaps = []
    for teacher in rows.teachers:
        true = rows.true_similarity(teacher)
        for captioner in rows.captioners:
            synthetic = rows.similarities(teacher, captioner)
            if synthetic.shape[1]:
                gaps.append(synthetic.mean(axis=1) - true)
    return np.mean(gaps, axis=0) if gaps else np.full(len(rows), np.nan)


def _extreme(values: np.ndarray) -> list[int]:
    """The rows with the smallest values, of those that are finite."""
    finite = np.flatnonzero(np.isfinite(values))
    found: list[int] = finite[np.argsort(values[finite], kind="stable")][:_RANKED].tolist()
    return found


def make_cards(
    data: Dataset,
    rows: Rows,
    tabs: Mapping[str, list[int]],
    items: Mapping[tuple[str, str], list[Quarantined]],
    write: Callable[[str, bytes], None],
) -> list[Card]:
    """Read the samples of the tabs, draw them, and ``write`` their pictures by file name -> cards in order of keys."""
    cards = []
    agreement = rows.targets.agreements()
    ranks: dict[int, dict[str, int]] = {}
    for name, found in tabs.items():
        for rank, row in enumerate(found):
            ranks.setdefault(row, {})[name] = rank
    places = {row: rows.places[row] for row in tabs["key"]}
    for row, sample, pictures, problem in _read(data, places, rows.problems):
        stem = f"images/{row:06d}" if pictures else None
        if pictures:
            write(f"{stem}.webp", pictures.original)
            if pictures.replays:
                write(f"{stem}-crops.webp", pictures.replays)
        shard = rows.places[row][0].shard
        agreed = float(agreement[row]) if len(agreement) == len(rows) and np.isfinite(agreement[row]) else None
        refused = tuple(items.get((shard, sample.key), ()))
        grids = {}
        for number, (layer, value) in enumerate(sample.values.items()):
            if stem and len(colours := kind_of(layer).pictures(value, SHOWN_REPLAYS)):
                grids[layer] = f"{stem}-grids-{number}.webp"
                write(grids[layer], webp(_side_by_side(colours)))
        cards.append(Card(row, shard, ShownSample.of(sample), ranks[row], agreed, stem, problem, refused, grids))
    return sorted(cards, key=lambda card: card.ranks["key"])


def _side_by_side(pictures: np.ndarray) -> Image.Image:
    """Pictures [n, h, w, 3] in a row, each enlarged to the height of crops."""
    times = max(1, _REPLAY_SIDE // pictures.shape[1])
    return Image.fromarray(np.concatenate(pictures.repeat(times, axis=1).repeat(times, axis=2), axis=1))


@dataclass(frozen=True)
class Thumbnail:
    """A sample on a page beside the gallery: the file of its picture or None with a ``problem``, its key and true
    caption, and the number of its card in the gallery, if it has one."""

    picture: str | None
    problem: str
    key: str
    caption: str | None
    card: int | None = None

    @classmethod
    def of(cls, shown: ShownSample, picture: str | None, problem: str, card: int | None = None) -> Thumbnail:
        caption = next((line.text for line in shown.captions if line.captioner is None), None)
        return cls(picture, problem, shown.key, caption, card)


def draw_thumbnails(
    data: Dataset, rows: Rows, cards: Sequence[Card], places: Collection[Place], write: Callable[[str, bytes], None]
) -> dict[Place, Thumbnail]:
    """Thumbnails of cards, and of samples at other ``places``, which are read and drawn; ``write`` gets the pictures of
    these by file name."""
    found = {}
    for card in cards:
        picture = card.picture and f"{card.picture}.webp"
        found[rows.places[card.row]] = Thumbnail.of(card.shown, picture, card.problem, card.row)
    others = dict(enumerate(sorted({*places} - found.keys())))
    for index, sample, pictures, problem in _read(data, others, rows.problems):
        name = f"images/other-{index:05d}.webp" if pictures else None
        if pictures and name:
            write(name, pictures.original)
        found[others[index]] = Thumbnail.of(ShownSample.of(sample), name, problem)
    return found


def _read(
    data: Dataset, places: Mapping[int, Place], problems: list[str]
) -> Iterator[tuple[int, Sample, Pictures | None, str]]:
    """Read and draw samples at places, a row group at a time; one without a picture has a problem."""
    by_group: dict[tuple[str, int], list[int]] = {}
    for row in sorted(places):
        group, _ = places[row]
        by_group.setdefault((group.shard, group.number), []).append(row)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for (shard, number), found in by_group.items():
            of_group = [places[row][1] for row in found]
            samples, drawn = list[Sample](), list[tuple[Pictures | None, str]]()
            try:
                samples = data.rows(shard, number, of_group)
                drawn = [*pool.map(_draw, samples)]
            except UserError as error:
                problems.append(str(error))
                with contextlib.suppress(UserError):
                    samples = data.rows(shard, number, of_group, images=False)
                drawn = [(None, "The image cannot be read.")] * len(samples)
            for row, sample, (pictures, problem) in zip(found, samples, drawn, strict=False):
                yield row, sample, pictures, problem


def _draw(sample: Sample) -> tuple[Pictures | None, str]:
    try:
        return draw(sample, _SIDE, _REPLAY_SIDE), ""
    except UserError as error:
        return None, str(error)
