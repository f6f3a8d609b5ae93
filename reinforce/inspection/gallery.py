"""The samples that the gallery shows: which ones, in which of its views, and their pictures."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from reinforce.dataset.reading.dataset import Dataset
from reinforce.dataset.reading.sample import Sample
from reinforce.dataset.reading.sample_view import Pictures, SampleView, draw
from reinforce.errors import UserError
from reinforce.inspection.overview import Quarantined
from reinforce.inspection.rows import Rows
from reinforce.seeds import permutation

_RANDOM, _RANKED, _NULL = 96, 24, 24  # samples in the random view, in each ranked view, and among null rows
_SIDE, _REPLAY_SIDE = 420, 144  # pixels


@dataclass(frozen=True)
class View:
    """One way to look at the samples: its name, what it is called, and what it shows."""

    name: str
    title: str
    text: str


VIEWS = (
    View("random", "Random", "Samples in random order."),
    View("key", "By key", "Every sample that has a picture here, in the order of shards and keys."),
    View("agree", "Teachers agree", "Samples for which the teachers give the most similar targets."),
    View("disagree", "Teachers disagree", "Samples for which the teachers give the most different targets."),
    View("synthetic", "Synthetic fits better", "Synthetic captions are more similar to the image than the true one."),
    View("true", "True fits better", "The true caption is more similar to the image than the synthetic ones."),
    View("quarantine", "Quarantined", "What was refused, and rows that a layer could not compute, with the reason."),
)


@dataclass(frozen=True)
class Card:
    """A sample in the gallery.

    ``row`` is its number among the rows that were looked at, ``ranks`` its place in each view that shows it,
    ``agreement`` that of the teachers, ``picture`` the stem of its files or None with a ``problem``, and
    ``quarantined`` why layers are null for it.
    """

    row: int
    shard: str
    view: SampleView
    ranks: Mapping[str, int]
    agreement: float | None
    picture: str | None
    problem: str
    quarantined: tuple[Quarantined, ...]


def choose(rows: Rows, seed: int, quarantined: set[tuple[str, str]]) -> dict[str, list[int]]:
    """The rows of each view, in its order; ``quarantined`` are the shard and key of items."""
    views = {"random": permutation(len(rows), seed, "inspected samples").tolist()[:_RANDOM]}
    agreement = rows.targets.agreements()
    if len(agreement) == len(rows):
        views["agree"] = _extreme(-agreement)
        views["disagree"] = _extreme(agreement)
    gap = synthetic_gap(rows)
    views["synthetic"] = [row for row in _extreme(-gap) if gap[row] > 0]
    views["true"] = [row for row in _extreme(gap) if gap[row] < 0]
    null = [row for row, (group, _) in enumerate(rows.places) if (group.shard, rows.keys[row]) in quarantined]
    views["quarantine"] = null[:_NULL]
    shown = sorted({row for found in views.values() for row in found})
    views["key"] = sorted(shown, key=lambda row: (rows.places[row][0].shard, rows.keys[row], row))
    return views


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
    views: Mapping[str, list[int]],
    items: Mapping[tuple[str, str], list[Quarantined]],
    write: Callable[[str, bytes], None],
) -> list[Card]:
    """Read the samples of the views, draw them, and ``write`` their pictures by file name -> cards in order of keys."""
    cards = []
    agreement = rows.targets.agreements()
    ranks: dict[int, dict[str, int]] = {}
    for name, found in views.items():
        for rank, row in enumerate(found):
            ranks.setdefault(row, {})[name] = rank
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for wanted, samples, unread in _read(data, rows, views["key"]):
            drawn = pool.map(_draw, samples) if not unread else itertools.repeat((None, unread), len(samples))
            for row, sample, (pictures, problem) in zip(wanted, samples, drawn, strict=True):
                stem = f"images/{row:06d}" if pictures else None
                if pictures:
                    write(f"{stem}.webp", pictures.original)
                    if pictures.replays:
                        write(f"{stem}-crops.webp", pictures.replays)
                shard = rows.places[row][0].shard
                value = float(agreement[row]) if len(agreement) == len(rows) else float("nan")
                view = SampleView.of(sample)
                refused = tuple(items.get((shard, sample.key), ()))
                agreed = value if np.isfinite(value) else None
                cards.append(Card(row, shard, view, ranks[row], agreed, stem, problem, refused))
    order = {row: place for place, row in enumerate(views["key"])}
    return sorted(cards, key=lambda card: order[card.row])


def _read(data: Dataset, rows: Rows, wanted: list[int]) -> Iterator[tuple[list[int], list[Sample], str]]:
    """Read rows with their images, a row group at a time, or without them and with the reason."""
    by_group: dict[tuple[str, int], list[int]] = {}
    for row in sorted(wanted):
        group, _ = rows.places[row]
        by_group.setdefault((group.shard, group.number), []).append(row)
    for (shard, number), found in by_group.items():
        places = [rows.places[row][1] for row in found]
        try:
            yield found, data.rows(shard, number, places), ""
        except UserError as error:
            rows.problems.append(str(error))
            with contextlib.suppress(UserError):
                yield found, data.rows(shard, number, places, images=False), "The image cannot be read."


def _draw(sample: Sample) -> tuple[Pictures | None, str]:
    try:
        return draw(sample, _SIDE, _REPLAY_SIDE), ""
    except UserError as error:
        return None, str(error)
