"""The facts of a dataset that need no rows: layers, bytes, quarantine and runs."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from reinforce.dataset.files.damage import describe_damaged, find_damaged, without_files
from reinforce.dataset.files.index import read_index
from reinforce.dataset.files.listing import Listing
from reinforce.dataset.files.store import Store
from reinforce.dataset.kinds.registry import stored_layer
from reinforce.dataset.layers import SAMPLES
from reinforce.dataset.manifest.schema import RunRecord, check_run
from reinforce.dataset.reading.completeness import check_completeness
from reinforce.dataset.reading.dataset import Dataset
from reinforce.dataset.runs.progress import list_runs, read_summary
from reinforce.errors import UserError
from reinforce.seeds import permutation

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
class Quarantine:
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
    quarantine: Quarantine
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
        LayerFacts(layer.name, layer.kind.report_content(layer), len(files), files.total_bytes, layer.fingerprint)
        for layer in (stored_layer(name, entry) for name, entry in entries.items())
        for files in [readable[layer.name]]
    )
    quarantine = _quarantine(store, {name: every[f"quarantine/{name}"] for name in entries}, seed, problems)
    runs = tuple(_runs(store, problems))
    return Overview(len(readable[SAMPLES]), facts, quarantine, runs, tuple(problems))


def _quarantine(store: Store, files: Mapping[str, Listing], seed: int, problems: list[str]) -> Quarantine:
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
    return Quarantine(sum(map(len, files.values())), read, ordered, tuple(itertools.islice(in_turn, _ITEMS)))


def _runs(store: Store, problems: list[str]) -> Iterator[tuple[str, RunRecord]]:
    for name in list_runs(store)[:_RUNS]:
        try:
            if (summary := read_summary(store, name)) is not None:
                time = _RUN_TIME.match(name)
                started = "{}-{}-{} {}:{} UTC".format(*time.groups()) if time else name
                yield started, check_run(summary, store.path("runs", name))
        except UserError as error:
            problems.append(str(error))
