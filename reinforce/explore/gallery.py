"""The facts of a dataset that need no rows: layers, bytes, quarantine and runs; and the samples that the gallery shows:
which ones, in which of its tabs, and their pictures."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from reinforce.dataset.aligned import check_completeness
from reinforce.dataset.index import describe_damaged, find_damaged, read_index, without_files
from reinforce.dataset.kinds.registry import kind_of, stored_layer
from reinforce.dataset.layers import SAMPLES
from reinforce.dataset.manifest import RunRecord, check_run
from reinforce.dataset.reading import Dataset
from reinforce.dataset.runs import list_runs, read_summary
from reinforce.dataset.sample import SHOWN_REPLAYS, Pictures, Sample, ShownSample, draw, webp
from reinforce.dataset.store import Listing, Store
from reinforce.errors import UserError
from reinforce.explore.rows import Place, SampledRows
from schemas.seeds import permutation

_RUNS = 20  # the latest, which are shown
_QUARANTINE_FILES = 200  # of a layer, which are read
_ITEMS = 60  # quarantined items that are shown
_RUN_TIME = re.compile(r"(\d{4})(\d\d)(\d\d)T(\d\d)(\d\d)\d\dZ")


@dataclass(frozen=True)
class LayerFacts:
    """One layer: what it holds, how many shards have it, and the bytes of its files."""

    name: str
    content: str
    shards: int
    bytes: int
    fingerprint: str


@dataclass(frozen=True)
class Quarantined:
    """A quarantined item; ``key`` is None for a shard as a whole."""

    layer: str
    shard: str
    key: str | None
    reason: str
    detail: str


@dataclass(frozen=True)
class QuarantineSummary:
    """What is quarantined: counts by layer and reason in the ``read`` of ``files``, and some items of each reason."""

    files: int
    read: int
    counts: tuple[tuple[str, str, int], ...]
    items: tuple[Quarantined, ...]


@dataclass(frozen=True)
class Overview:
    """The facts of a dataset. ``shards`` is the number of shards of the samples layer, ``runs`` have their start."""

    shards: int
    layers: tuple[LayerFacts, ...]
    quarantine: QuarantineSummary
    runs: tuple[tuple[str, RunRecord], ...]
    problems: tuple[str, ...]


def read_overview(data: Dataset, seed: int) -> Overview:
    """Read the facts of a dataset: listings, some quarantine files, and the summaries of the latest runs."""
    store, entries = data.store, data.manifest["layers"]
    every = store.listings([*entries, *(f"quarantine/{name}" for name in entries)])
    listings = {name: every[name] for name in entries}
    damaged = find_damaged(store, listings, {name: entry["fingerprint"] for name, entry in entries.items()})
    readable = without_files(listings, damaged)
    committed = read_index(store, SAMPLES, entries[SAMPLES]["fingerprint"]).listing()
    found = check_completeness(store, readable, [committed, *listings.values()])
    problems = [text for text in (describe_damaged(store.url, damaged), found.describe_missing()) if text]
    facts = tuple(
        LayerFacts(layer.name, content.report or content.plan, len(files), files.total_bytes, layer.fingerprint)
        for layer in (stored_layer(name, entry) for name, entry in entries.items())
        for files, content in [(readable[layer.name], layer.kind.content(layer))]
    )
    quarantine = _quarantine(store, {name: every[f"quarantine/{name}"] for name in entries}, seed, problems)
    runs = []
    for name in list_runs(store)[:_RUNS]:
        try:
            if (summary := read_summary(store, name)) is not None:
                time = _RUN_TIME.match(name)
                started = "{}-{}-{} {}:{} UTC".format(*time.groups()) if time else name
                runs.append((started, check_run(summary, store.path("runs", name))))
        except UserError as error:
            problems.append(str(error))
    return Overview(len(readable[SAMPLES]), facts, quarantine, tuple(runs), tuple(problems))


def _quarantine(store: Store, files: Mapping[str, Listing], seed: int, problems: list[str]) -> QuarantineSummary:
    counts: Counter[tuple[str, str]] = Counter()
    by_reason: dict[tuple[str, str], list[Quarantined]] = {}
    read = 0
    for layer, listing in files.items():
        names = [*listing]
        chosen = sorted(permutation(len(names), seed, "inspected quarantine").tolist()[:_QUARANTINE_FILES])
        part = Listing.of((names[place], int(listing.sizes[place])) for place in chosen)
        try:
            for shard, rows in store.quarantined_rows(layer, part):
                read += 1
                for row in rows:
                    item = Quarantined(layer, shard, row["key"], str(row["reason"]), str(row["detail"] or ""))
                    counts[layer, item.reason] += 1
                    by_reason.setdefault((layer, item.reason), []).append(item)
        except UserError as error:
            problems.append(str(error))
    ordered = tuple((layer, reason, count) for (layer, reason), count in sorted(counts.items()))
    in_turn = (item for nth in itertools.zip_longest(*by_reason.values()) for item in nth if item is not None)
    return QuarantineSummary(sum(map(len, files.values())), read, ordered, tuple(itertools.islice(in_turn, _ITEMS)))


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


def choose(
    rows: SampledRows, seed: int, refused: set[tuple[str, str]], others: Collection[int] = ()
) -> dict[str, list[int]]:
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


def mean_rank(rows: SampledRows) -> np.ndarray:
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


def measures(rows: SampledRows) -> dict[str, np.ndarray]:
    """Numbers of all rows [R] by which cards can be sorted and filtered, by what they are; NaN where there is none."""
    found: dict[str, np.ndarray] = {}
    if len(agreement := rows.targets.agreements()) == len(rows):
        found["agreement of the teachers"] = agreement
    for teacher in rows.teachers:
        found[f"fit of the true caption by {teacher}"] = rows.true_similarity(teacher)
    lengths = [len(texts[0].split()) if texts else np.nan for texts in rows.captions]
    found["words of the true caption"] = np.array(lengths, np.float64)
    return {name: values for name, values in found.items() if np.isfinite(values).any()}


def synthetic_gap(rows: SampledRows) -> np.ndarray:
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
    rows: SampledRows,
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
                times = max(1, _REPLAY_SIDE // colours.shape[1])  # each is enlarged to the height of crops
                strip = np.concatenate(colours.repeat(times, axis=1).repeat(times, axis=2), axis=1)
                write(grids[layer], webp(Image.fromarray(strip)))
        cards.append(Card(row, shard, ShownSample.of(sample), ranks[row], agreed, stem, problem, refused, grids))
    return sorted(cards, key=lambda card: card.ranks["key"])


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
    data: Dataset,
    rows: SampledRows,
    cards: Sequence[Card],
    places: Collection[Place],
    write: Callable[[str, bytes], None],
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
