"""Planning: which layers each source shard still lacks. Starts and writes nothing.

The same subtraction serves a fresh run, a resumed run and an added teacher.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from reinforce.config import Config
from reinforce.dataset.files.damage import find_damaged, without_files
from reinforce.dataset.files.layer_file import RefusedFile
from reinforce.dataset.files.listing import Listing
from reinforce.dataset.files.store import MANIFEST, DamagedFile, Store, check_footer, parse_footer
from reinforce.dataset.layers import SAMPLES, Layer, mapping_at
from reinforce.dataset.manifest.class_code import ClassCode, class_codes
from reinforce.dataset.manifest.differences import check_recipes
from reinforce.dataset.manifest.manifest import find_manifest
from reinforce.dataset.reading.aligned import layer_errors
from reinforce.dataset.runs.shard_records import read_records
from reinforce.engine.messages.task import PendingShard
from reinforce.engine.plan.recipe import resolve_layers
from reinforce.engine.plan.source_shards import SourceShards, list_url, source_shards, with_view
from reinforce.engine.plan.unread_labels import find_unread
from reinforce.errors import UserError
from reinforce.labels.taken import with_labels
from reinforce.parallel.machines import nodes_of_run
from reinforce.processes.cores import Node
from reinforce.source.formats.base import Shard
from reinforce.source.identity import SourceState
from reinforce.source.urls import Info, canonical, expand


@dataclass(frozen=True)
class LayerState:
    """Numbers of shards of one layer that are committed (with their bytes), quarantined and missing."""

    done: int
    done_bytes: int
    quarantined: int
    missing: int


@dataclass(frozen=True)
class NotInSource:
    """Shards of the dataset that ``source`` does not name: their numbers, and the first of each.

    They are of another source, or their files were renamed or removed.
    """

    finished: int = 0
    quarantined: int = 0
    first_finished: str | None = None  # shard
    first_quarantined: str | None = None  # LAYER/SHARD


@dataclass(frozen=True)
class Plan:
    """The layers and shards that a run would compute.

    ``shards`` counts all source shards, ``pending`` lists those that lack a layer, ``committed`` names those that the
    samples layer has, also of other sources, and ``not_in_source`` counts these. ``listed`` is what the file system
    lists, by URL, of the source files of pending shards that have samples already, and ``finished`` the bytes that it
    lists of those of shards that lack nothing. ``damaged`` are files that count as missing. ``codes`` are those of the
    custom classes. ``notes`` are lines about precisions that the config leaves open; those of ``config`` are resolved.
    ``source_notes`` are lines about the source, ``lists`` those of new shards of folders, by name, and
    ``unread_labels`` counts other shards than pending ones whose labels could not all be read.
    """

    config: Config
    layers: Mapping[str, Layer]
    shards: int
    states: Mapping[str, LayerState]
    pending: list[PendingShard]
    committed: Listing = field(default_factory=lambda: Listing.of(()))
    not_in_source: NotInSource = NotInSource()
    listed: Mapping[str, Info] = field(default_factory=dict)
    finished: Listing = field(default_factory=lambda: Listing.of(()))
    damaged: Sequence[DamagedFile] = ()
    codes: Sequence[ClassCode] = ()
    notes: Sequence[str] = ()
    source_notes: Sequence[str] = ()
    lists: Mapping[str, bytes] = field(default_factory=dict)
    unread_labels: int = 0

    @property
    def quarantined(self) -> int:
        """Number of shards that are quarantined in some layer, or in their labels."""
        return max(self.unread_labels, *(state.quarantined for state in self.states.values()))

    @property
    def unfitted(self) -> list[Layer]:
        """Layers whose codebook is not fitted yet, if some shard lacks them."""
        wanted = {name for shard in self.pending for name in shard.layers}
        return [layer for name, layer in self.layers.items() if name in wanted and not layer.is_fitted]

    def first(self, shards: int) -> Plan:
        """The plan of the first shards by name, those that lack nothing included."""
        names = sorted({*self.committed, *(shard.name for shard in self.pending)})[:shards]
        return replace(self, pending=[shard for shard in self.pending if shard.name in names])

    def shard(self, shard: PendingShard) -> Shard:
        """A shard as it is read before the run has written the list of its files."""
        return replace(shard.source, listing=self.lists.get(shard.name, shard.listing))

    @property
    def recomputed(self) -> list[DamagedFile]:
        """Damaged files that a run sets aside, because it computes them again."""
        pending = {shard.name for shard in self.pending} if self.damaged else set()
        return [file for file in self.damaged if file.shard in pending]


def make_plan(
    config: Config, retry_quarantined: bool = False, nodes: Callable[[], Sequence[Node]] = nodes_of_run
) -> Plan:
    """List the source and every layer once, and subtract; ``nodes`` as in ``resolve_layers``. Raises UserError."""
    store = Store(config.output)
    manifest = find_manifest(store)
    config, layers, notes = resolve_layers(with_labels(with_view(config)), store, manifest, nodes)
    listed: dict[str, Info] = {}
    source = source_shards(config, listed)
    tars = _pair_reinforcements(config, source)
    committed = store.listings(layers)
    damaged = find_damaged(store, committed, {name: layer.fingerprint for name, layer in layers.items()})
    committed = without_files(committed, damaged)
    check_fingerprints(store, manifest, layers, committed)
    known = mapping_at(manifest or {}, "layers")
    unread = find_unread(store, config, layers, known, source.names, committed, retry_quarantined)
    committed = unread.without_replaced(committed)
    unreadable: list[DamagedFile] = []
    lone = store.lone_quarantine(committed, unreadable)
    quarantine = {layer: {shard for shard, whole in shards.items() if whole} for layer, shards in lone.items()}
    damaged += sorted(unreadable)
    refused = {} if retry_quarantined else quarantine
    missing = _subtract(source.names, layers, committed, refused)
    stored = _stored_layers(store, source.names, committed, known, unread.replaced)
    pending = [
        PendingShard(
            name,
            source.urls[row],
            todo,
            tars[row] if tars and any(layers[layer].labels is not None for layer in todo) else None,
            *stored.get(name, ((), None)),
            source.format.name,
            list_url(config, name) if source.format.is_listed else "",
            source.part(row),
            (
                *(layer for layer in todo if name in lone[layer]),
                *unread.quarantined(name, map(layers.__getitem__, todo)),
            ),
            unread.replaced.get(name, ()),
        )
        for name, row, todo in missing.shards(source.names)
    ]
    states = {}
    for name in layers:
        done = committed[name].only(committed[name].within(source.names))
        states[name] = LayerState(len(done), done.total_bytes, missing.quarantined[name], missing.missing[name])
    not_in_source = _not_in_source(source.names, committed[SAMPLES], quarantine)
    extended = (shard.url for shard in pending if SAMPLES not in shard.layers)
    finished = _listed_sizes(source, committed[SAMPLES], {shard.name for shard in pending}, listed) if listed else None
    listed = {url: listed[url] for url in extended if url in listed}
    return Plan(
        config=config,
        layers=layers,
        shards=len(source.urls),
        states=states,
        pending=pending,
        committed=committed[SAMPLES],
        not_in_source=not_in_source,
        listed=listed,
        finished=finished or Listing.of(()),
        damaged=damaged,
        codes=class_codes(manifest, layers, filter(committed.get, layers), filter(missing.missing.get, layers)),
        notes=notes,
        source_notes=source.notes,
        lists=source.lists,
        unread_labels=unread.count(shard.name for shard in pending),
    )


@dataclass(frozen=True)
class _Missing:
    """The layers that each source shard lacks: ``patterns`` are the tuples of layers that occur, and ``pattern``
    [shards] is the place of each shard's. ``missing`` and ``quarantined`` count shards by layer."""

    patterns: Sequence[tuple[str, ...]]
    pattern: npt.NDArray[np.int64]
    missing: Mapping[str, int]
    quarantined: Mapping[str, int]

    def shards(self, names: pa.StringArray) -> Iterator[tuple[str, int, tuple[str, ...]]]:
        """Each shard that lacks layers: its name, its place among ``names``, and these layers."""
        rows = np.flatnonzero(np.array([bool(layers) for layers in self.patterns])[self.pattern])
        patterns = map(self.patterns.__getitem__, self.pattern[rows].tolist())
        return zip(names.take(pa.array(rows)).to_pylist(), rows.tolist(), patterns, strict=True)


def _subtract(
    names: pa.StringArray,
    layers: Mapping[str, Layer],
    committed: Mapping[str, Listing],
    refused: Mapping[str, Collection[str]],
) -> _Missing:
    """Find the layers that each shard lacks, without those that it is quarantined in, and those that need them."""
    lost: dict[str, npt.NDArray[np.bool_]] = {}
    missing, quarantined = {}, {}
    patterns: list[tuple[str, ...]] = [()]
    pattern = np.zeros(len(names), np.int64)
    for name, layer in layers.items():
        absent = ~committed[name].has(names)
        unusable = Listing.of((shard, 0) for shard in refused.get(name, ())).has(names)
        for need in layer.needs:
            unusable |= lost[need]
        lost[name] = absent & unusable
        todo = absent & ~unusable
        missing[name], quarantined[name] = int(todo.sum()), int(lost[name].sum())
        codes, pattern = np.unique(2 * pattern + todo, return_inverse=True)
        patterns = [(*patterns[code // 2], name) if code % 2 else patterns[code // 2] for code in codes.tolist()]
    return _Missing(patterns, pattern, missing, quarantined)


def _stored_layers(
    store: Store,
    names: pa.StringArray,
    committed: Mapping[str, Listing],
    known: Iterable[str],
    replaced: Mapping[str, Collection[str]],
) -> dict[str, tuple[tuple[str, ...], SourceState | None]]:
    """The shards among ``names`` whose samples are missing although other layers exist, also those only ``known``.

    Each with these layers, without those that are ``replaced``, and with the state of its source file when samples
    were written, if a run has recorded it.
    """
    absent = ~committed[SAMPLES].has(names)
    if not absent.any():
        return {}
    listings = {**committed, **store.listings([name for name in known if name not in committed])}
    has = {layer: listing.has(names) & absent for layer, listing in listings.items() if listing}
    stored: dict[str, list[str]] = {}
    for layer, rows in has.items():
        for shard in names.filter(pa.array(rows)).to_pylist():
            kept = stored.setdefault(shard, [])
            if layer not in replaced.get(shard, ()):
                kept.append(layer)
    sources = read_records(store).sources if stored else {}
    states = {shard: sources[shard].state if shard in sources else None for shard in stored}
    return {shard: (tuple(layers), states[shard]) for shard, layers in stored.items()}


def _listed_sizes(
    source: SourceShards, committed: Listing, pending: Collection[str], listed: Mapping[str, Info]
) -> Listing:
    """The bytes of the source files of finished shards, where a listing names them."""
    rows = np.flatnonzero(committed.has(source.names)).tolist()
    names = source.names.take(pa.array(rows, pa.int64())).to_pylist()
    sizes = ((name, listed.get(source.urls[row], {}).get("size")) for name, row in zip(names, rows, strict=True))
    return Listing.of((name, size) for name, size in sizes if size is not None and name not in pending)


def _not_in_source(names: pa.StringArray, committed: Listing, quarantine: Mapping[str, Collection[str]]) -> NotInSource:
    finished = committed.without(names)
    refused = {name: layer for layer, found in reversed([*quarantine.items()]) for name in found}
    others = Listing.of((name, 0) for name in refused).without(names)
    first = next(iter(others), None)
    return NotInSource(
        len(finished), len(others), next(iter(finished), None), None if first is None else f"{refused[first]}/{first}"
    )


def _pair_reinforcements(config: Config, source: SourceShards) -> Sequence[str]:
    """The URL of published reinforcements for each shard of the source: paired by file name, else by position.

    A file may also have the name of the shard, as ``reinforce export datacompdr`` gives it.

    Raises UserError if some shards have no counterpart.
    """
    if config.reinforcements is None:
        return ()
    found = expand(config.reinforcements)
    for parts in (1, 2):  # by file name, or by folder and file name where file names are not unique
        by_name = {_tail(url, parts): url for url in found}
        names = [_tail(url, parts) for url in source.urls]
        if len(by_name) == len(found) and len({*names} & by_name.keys()) == len(names):
            return [by_name[name] for name in names]
    by_file = {canonical(url).rpartition("/")[2]: url for url in found}
    files = [f"{name}.tar" for name in source.names.to_pylist()]
    if len(by_file) == len(found) and by_file.keys() >= {*files}:
        return [by_file[file] for file in files]
    if len(found) == len(source.urls):
        return found
    raise UserError(
        f"reinforcements: {len(found):,} shards for the {len(source.urls):,} of `source`, and not all of these have a "
        "counterpart of the same file name. Name as many shards as `source` in the same order, or with the same names."
    )


def _tail(url: str, parts: int) -> str:
    """The last ``parts`` parts of a URL's path, without the extensions of the file name."""
    *folders, name = canonical(url).split("/")[-parts:]
    return "/".join([*folders, name.partition(".")[0]])


def _check_files(store: Store, layers: Mapping[str, Layer], committed: Mapping[str, Listing]) -> None:
    """Raise UserError if the first file of a layer was made by another recipe than the layer's."""

    def check(name: str) -> None:
        for shard in committed[name].first(1):
            opened = store.open_layer(name, shard, whole=False)
            # Damage is reported where a file is read, and files may have been removed since they were listed.
            with contextlib.suppress(RefusedFile, FileNotFoundError), opened as file:
                if parse_footer(file.metadata).get("fingerprint") is not None:
                    check_footer(store.layer_path(name, shard), file.metadata, layers[name].fingerprint)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(check, layers))


def check_fingerprints(
    store: Store, manifest: Mapping[str, Any] | None, layers: Mapping[str, Layer], committed: Mapping[str, Listing]
) -> None:
    """Raise UserError if layers exist already and were made by other recipes. Names all of them and what differs."""
    recorded = (manifest or {}).get("layers", {})
    found: dict[str, str | None] = {}
    for name in layers:
        if name in recorded:
            found[name] = recorded[name]["fingerprint"]
        elif shard := next(iter(committed[name]), None):
            # A layer that dataset.json does not list.
            with layer_errors(store, name, shard), store.open_layer(name, shard, whole=False) as file:
                found[name] = parse_footer(file.metadata).get("fingerprint")
    check_recipes(store, manifest, layers, found)
    _check_files(store, layers, committed)
    if recorded and SAMPLES not in recorded:
        raise UserError(f"{store.path(MANIFEST)} lists layers but no samples. Restore the file or start a new output.")
