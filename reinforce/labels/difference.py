"""``reinforce diff``: where two datasets or labels differ, in rows that are of one image.

Shards are compared one after the other, a row group at a time, on Ray or in this process; memory is bounded by the row
groups of all layers, and a bit for each row of the second dataset.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from rich.table import Table

from reinforce.dataset.aligned import (
    AlignedLayers,
    AlignedShard,
    layer_errors,
    row_errors,
    row_group_table,
    rows_of_shards,
)
from reinforce.dataset.kinds.registry import kind_of
from reinforce.dataset.layers import SAMPLES, Comparison
from reinforce.dataset.manifest import read_manifest
from reinforce.dataset.store import Store
from reinforce.errors import UserError
from reinforce.labels.building import build_index, has_current_index
from reinforce.labels.index import COLUMNS, DIGEST, KEY, open_index
from reinforce.labels.members import ABSENT, AMBIGUOUS, OTHER_IMAGE
from reinforce.labels.pairs import Partners, RowPlace
from reinforce.processes.parallel import MapWorkers, open_workers
from reinforce.source.references import image_digest
from reinforce.storage import as_seen_by_workers
from reinforce.terminal import escape, plural

#: What is compared of the samples, by columns.
_PARTS = {"captions": ("caption",), "sizes": ("width", "height"), "augmentations": ("augmentations",)}


@dataclass
class DatasetDiff:
    """Differences of two datasets: layers of one side alone, rows by identity that matched or reason, values by layer.

    ``unstated`` are rows without a partner that state no uid, SHA-256 or URL; of the second dataset, all that state
    none. ``kinds`` of identities are those that each side states, or that its images have.
    """

    first: str
    second: str
    only_first: list[str] = field(default_factory=list)
    only_second: list[str] = field(default_factory=list)
    fingerprints: dict[str, tuple[str, str]] = field(default_factory=dict)
    rows: tuple[int, int] = (0, 0)
    matched: Counter[str] = field(default_factory=Counter)
    unmatched: tuple[int, int] = (0, 0)
    unstated: tuple[int, int] = (0, 0)
    kinds: tuple[Collection[str], Collection[str]] = ((), ())
    missing: Counter[str] = field(default_factory=Counter)
    layers: dict[str, Comparison] = field(default_factory=dict)

    @property
    def equal(self) -> bool:
        """Whether both have the same layers and rows with equal values."""
        values = all(one.equal == one.rows for one in self.layers.values())
        return values and not (self.only_first or self.only_second or any(self.unmatched) or self.missing)

    @property
    def compared(self) -> bool:
        """Whether some image is in both, so that values were compared."""
        return self.unmatched != self.rows

    def lines(self) -> Iterator[str]:
        """Lines about what the table does not show."""
        yield f"A  {self.first}: {plural(self.rows[0], 'sample')}"
        yield f"B  {self.second}: {plural(self.rows[1], 'sample')}"
        words = {KEY: "by key in shards of one name", **{kind: f"by {kind}" for kind in COLUMNS}}
        found = [f"{self.matched[name]:,} {word}" for name, word in words.items() if self.matched[name]]
        yield f"of one image: {', '.join(found) or 'none'}"
        if self.matched[OTHER_IMAGE]:
            yield f"of another image, although something agrees: {self.matched[OTHER_IMAGE]:,}"
        if self.matched[AMBIGUOUS]:
            yield f"of one of several, which nothing distinguishes: {self.matched[AMBIGUOUS]:,}"
        sides = zip("AB", (self.only_first, self.only_second), self.unmatched, self.unstated, strict=True)
        for name, layers, rows, unstated in sides:
            if rows:
                yield f"only in {name}: {plural(rows, 'sample')}"
            if unstated and any(self.unmatched):
                samples = plural(unstated, "sample")
                yield f"in {name}, without uid, SHA-256 and URL: {samples}; only the digest joins these"
            if layers:
                yield f"only in {name}: {', '.join(layers)}"
        for layer, shards in self.missing.items():
            yield f"{layer}: in one of both alone: {plural(shards, 'shard')}"
        if not self.compared and not {*self.kinds[0]} & {*self.kinds[1]}:
            stated = [", ".join(kind for kind in COLUMNS if kind in side) or "nothing" for side in self.kinds]
            yield (
                f"no kind of identity is common to both: A states {stated[0]}, B states {stated[1]}. Digests join "
                "copies of equal bytes: compare datasets that embed images, or labels that state digests"
            )
        yield "equal" if self.equal else "different" if self.compared else "not compared: no image was found in both"

    def as_json(self) -> dict[str, Any]:
        return {
            "a": self.first,
            "b": self.second,
            "equal": self.equal,
            "rows": {"a": self.rows[0], "b": self.rows[1]},
            "matched": dict(self.matched),
            "without_identity": {"a": self.unstated[0], "b": self.unstated[1]},
            "identities": {one: [*filter(of.__contains__, COLUMNS)] for one, of in zip("ab", self.kinds, strict=True)},
            "only_in_a": {"samples": self.unmatched[0], "layers": self.only_first},
            "only_in_b": {"samples": self.unmatched[1], "layers": self.only_second},
            "missing_shards": dict(self.missing),
            "layers": {
                name: {
                    "rows": one.rows,
                    "equal": one.equal,
                    "null_on_one_side": one.nulls,
                    "mean_cosine": one.mean_cosine,
                    "least_cosine": one.cosine,
                    "largest_difference": one.difference,
                    "fingerprints": self.fingerprints.get(name.partition(": ")[0]),
                }
                for name, one in self.layers.items()
            },
        }


def diff_table(found: DatasetDiff) -> Table:
    """One line for each layer, and for each part of the samples."""
    table = Table(box=None, pad_edge=False)
    table.add_column("layer", overflow="fold", min_width=min(36, max(map(len, found.layers))))
    table.add_column("equal rows", justify="right", no_wrap=True)
    table.add_column("differences")
    for name, one in found.layers.items():
        first, second = found.fingerprints[name.partition(": ")[0]]
        words = [*_words(one), *(["other fingerprint"] if first != second else [])]
        table.add_row(escape(name), f"{one.equal:,} of {one.rows:,}", ", ".join(words))
    return table


def _words(one: Comparison) -> Iterator[str]:
    if one.nulls:
        yield f"{one.nulls:,} null in one"
    if one.equal < one.rows and one.cosine is not None:
        yield f"cosine {one.mean_cosine:.6f}, least {one.cosine:.6f}"
    elif one.difference and one.cosine is None:
        yield f"by at most {one.difference:.6g}"


@dataclass(frozen=True)
class _Pair:
    """Two datasets as tasks read them: URLs, fingerprints of the common layers, shards that lack one of these, and
    whether each embeds its images."""

    first: str
    second: str
    fingerprints: tuple[Mapping[str, str], Mapping[str, str]]
    lacking: Mapping[str, frozenset[str]]
    embedded: tuple[bool, bool]
    index: str | None
    least: float


@dataclass
class _ShardDiff:
    counts: Counter[str] = field(default_factory=Counter)
    layers: dict[str, Comparison] = field(default_factory=dict)
    rows: dict[str, set[int]] = field(default_factory=dict)  # of the second dataset, by shard
    kinds: set[str] = field(default_factory=set)
    unstated: int = 0
    undigested: int = 0


def diff(
    first: str,
    second: str,
    layers: Sequence[str] | None = None,
    min_cosine: float = 1.0,
    *,
    use_ray: bool = True,
    address: str | None = None,
) -> DatasetDiff:
    """Compare two datasets. ``layers`` are names or folders of these, with ``*``; default: all.

    Vectors count as equal from a cosine of ``min_cosine`` on; at 1, if their numbers are equal. Rows are matched by key
    in shards of one name, others by identity. Raises UserError.
    """
    stores = [Store(first), Store(second)]
    manifests = [read_manifest(store) for store in stores]
    names = [_named(manifest["layers"], layers) for manifest in manifests]
    if layers is not None and not {*names[0], *names[1]} - {SAMPLES}:
        known = sorted({name for manifest in manifests for name in manifest["layers"]})
        raise UserError(f"--layers: neither dataset has {', '.join(layers)}; they have: {', '.join(known)}.")
    common = [name for name in names[0] if name in names[1]]
    only_first, only_second = ([name for name in of_side if name not in common] for of_side in names)
    prints = [{name: manifest["layers"][name]["fingerprint"] for name in common} for manifest in manifests]
    both = {name: (prints[0][name], prints[1][name]) for name in common}
    found = DatasetDiff(stores[0].url, stores[1].url, only_first, only_second, both)
    listings = [store.listings(common) for store in stores]
    lacking = {}
    for name in common:
        sides = (side[SAMPLES].only(~side[SAMPLES].within(side[name].names)) for side in listings)
        lacking[name] = frozenset(shard for side in sides for shard in side)
    found.missing.update({name: len(shards) for name, shards in lacking.items() if shards})
    groups = [
        row_group_table(store, prints[side][SAMPLES], dict(listings[side][SAMPLES].items()))
        for side, store in enumerate(stores)
    ]
    found.rows = (int(groups[0][:, 2].sum()), int(groups[1][:, 2].sum()))
    one, other = as_seen_by_workers(first), as_seen_by_workers(second)
    embedded = (manifests[0]["images"] == "embed", manifests[1]["images"] == "embed")
    by_key = bool(listings[1][SAMPLES].has(listings[0][SAMPLES].names).all())
    for digests in (False, True):
        seen = _Seen([*listings[1][SAMPLES]], groups[1])
        with contextlib.ExitStack() as stack:
            index = None if by_key else _index_of(stores[1], other, stack, digests)
            pair = _Pair(one, other, (prints[0], prints[1]), lacking, embedded, index, min_cosine)
            temporary = index not in (None, other)  # on this machine
            workers = stack.enter_context(open_workers(address, use_ray and not temporary))
            undigested = _compare_shards(pair, [*listings[0][SAMPLES]], found, seen, workers)
            indexed = {} if index is None else open_index(Store(index)).kinds
            found.unstated = (found.unstated[0], indexed.get(KEY, 0))
            found.kinds = (found.kinds[0], {*indexed} | ({DIGEST} if embedded[1] and indexed else set()))
        if not undigested:
            break
    found.layers = {name: found.layers[name] for name in sorted(found.layers, key=_in_order)}
    unmatched = sum(found.matched[why] for why in (ABSENT, OTHER_IMAGE, AMBIGUOUS))
    found.unmatched = (unmatched, found.rows[1] - seen.count())
    return found


def _compare_shards(pair: _Pair, shards: Sequence[str], found: DatasetDiff, seen: _Seen, workers: MapWorkers) -> int:
    """Compare the shards of the first dataset -> the rows that may have a partner by digests that the index lacks."""
    found.matched, found.layers, undigested, unstated = Counter(), {}, 0, 0
    kinds = set[str]()
    for _, part in workers.map(functools.partial(_diff_shard, pair), shards, unit="shard"):
        found.matched += part.counts
        for name, values in part.layers.items():
            found.layers.setdefault(name, Comparison()).add(values)
        for shard, rows in part.rows.items():
            seen.add(shard, rows)
        undigested, unstated = undigested + part.undigested, unstated + part.unstated
        kinds |= part.kinds
    found.unstated, found.kinds = (unstated, 0), (kinds, ())
    return undigested


def _in_order(name: str) -> tuple[bool, str]:
    return not name.startswith(SAMPLES), name


def _named(layers: Mapping[str, Any], patterns: Sequence[str] | None) -> list[str]:
    """The samples, and the layers that some patterns name, or all."""
    return [
        name
        for name in sorted(layers, key=_in_order)
        if name == SAMPLES
        or patterns is None
        or any(fnmatchcase(name, one) or fnmatchcase(name, f"{one}/*") for one in patterns)
    ]


def _index_of(store: Store, url: str, stack: contextlib.ExitStack, digests: bool) -> str:
    """The ``url`` of a dataset with a current index, or a temporary folder with one, for which images are read if
    ``digests`` are wanted."""
    if not digests and has_current_index(store):
        return url
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    build_index(url, folder, images=digests, use_ray=False)
    return folder


class _Seen:
    """Matched rows of a dataset, one bit each."""

    def __init__(self, shards: Sequence[str], groups: npt.NDArray[np.int64]) -> None:
        self._rows = dict(zip(shards, rows_of_shards(groups, len(shards)), strict=True))
        self._bits: dict[str, npt.NDArray[np.uint8]] = {}

    def add(self, shard: str, rows: set[int]) -> None:
        mask = np.zeros(self._rows[shard], bool)
        mask[[*rows]] = True
        bits = np.packbits(mask)
        self._bits[shard] = bits | self._bits[shard] if shard in self._bits else bits

    def count(self) -> int:
        return sum(int(np.unpackbits(bits).sum()) for bits in self._bits.values())


def _diff_shard(pair: _Pair, shard: str) -> _ShardDiff:
    """Compare the rows of a shard of the first dataset with theirs of the second. Raises UserError."""
    found, second = _ShardDiff(), Store(pair.second)
    partners = Partners(second, pair.fingerprints[1][SAMPLES], pair.index, pair.embedded[1])
    with _opened(pair, 0, shard) as own, contextlib.ExitStack() as stack:
        theirs: AlignedShard | None = None  # the last one of the second dataset, which stays open
        by_key = partners.keys(shard)
        for number in range(own.row_groups):
            tables = own.read(number)
            digests = functools.partial(_digests, pair, shard, number) if pair.embedded[0] else None
            places = partners.find(tables[SAMPLES], by_key, digests)
            groups: dict[tuple[str, int], list[tuple[int, RowPlace]]] = {}
            for row, place in enumerate(places):
                if place is not None:
                    groups.setdefault((place.shard, place.group), []).append((row, place))
                    found.rows.setdefault(place.shard, set()).add(place.number)
            for (other, group), rows in sorted(groups.items()):
                if theirs is None or theirs.shard != other:
                    stack.close()
                    theirs = stack.enter_context(_opened(pair, 1, other))
                others = theirs.read(group)
                mine = pa.array([row for row, _ in rows])
                taken = pa.array([place.row for _, place in rows])
                for name in tables.keys() & others.keys():
                    with row_errors(f"{pair.first} or {pair.second}"):
                        parts = _compare(name, tables[name].take(mine), others[name].take(taken), pair.least)
                        for part, one in parts.items():
                            found.layers.setdefault(part, Comparison()).add(one)
    found.counts, found.unstated, found.undigested = partners.counts, partners.unstated, partners.undigested
    found.kinds = partners.kinds
    return found


def _digests(pair: _Pair, shard: str, number: int) -> list[int]:
    """The digests of the images in a row group of the first dataset."""
    store = Store(pair.first)
    with layer_errors(store, SAMPLES, shard), store.open_layer(SAMPLES, shard, whole=False) as file:
        return [image_digest(image.as_py()) for image in file.read_row_group(number, ["image"], False)["image"]]


def _opened(pair: _Pair, side: int, shard: str) -> contextlib.AbstractContextManager[AlignedShard]:
    """A shard with the columns that are compared."""
    url, prints = (pair.first, pair.second)[side], pair.fingerprints[side]
    store = Store(url)
    wanted: dict[str, str | None] = {name: one for name, one in prints.items() if shard not in pair.lacking[name]}
    with store.open_layer(SAMPLES, shard, whole=False) as file:
        names = file.metadata.schema.to_arrow_schema().names
    columns = [name for name in names if name not in ("image", "image_ref")]
    return AlignedLayers(store, wanted, {SAMPLES: columns}).open(shard, whole=False)


def _compare(layer: str, one: pa.Table, other: pa.Table, least: float) -> dict[str, Comparison]:
    """Compare the same rows of a layer on two sides, by part."""
    if layer != SAMPLES:
        return {layer: kind_of(layer).compare(one, other, least)}
    found = {}
    for part, columns in _PARTS.items():
        sides = ([of[name].to_pylist() for name in columns] for of in (one, other))
        found[f"{SAMPLES}: {part}"] = Comparison.of_values(*sides)
    return found
