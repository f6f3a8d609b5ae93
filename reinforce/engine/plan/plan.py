"""Planning: the layers of a config, and which of them each source shard still lacks. Starts and writes nothing.

The same subtraction serves a fresh run, a resumed run and an added teacher.

``precision: auto`` is resolved before fingerprints. What dataset.json records for a model comes first, so that a
dataset that was made in fp32 stays complete on any machine. A model that it does not list is computed in bf16 where
workers use GPUs, and in fp32 on CPUs.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from reinforce.config import Config
from reinforce.dataset.aligned import layer_errors
from reinforce.dataset.codecs import codebooks
from reinforce.dataset.index import find_damaged, without_files
from reinforce.dataset.kinds.registry import KINDS, kind_of, with_dependants
from reinforce.dataset.layer_file import RefusedFile
from reinforce.dataset.layers import MODEL_SECTIONS, SAMPLES, Layer, mapping_at
from reinforce.dataset.manifest import ClassCode, check_recipes, class_codes, entry_keys, find_manifest
from reinforce.dataset.store import MANIFEST, DamagedFile, Listing, Store, check_footer, parse_footer
from reinforce.engine.messages import PendingShard, user_frames
from reinforce.engine.plan.source_shards import SourceShards, list_url, source_shards, with_view
from reinforce.errors import UserError
from reinforce.labels.index import quarantine_of
from reinforce.labels.taken import labelled, with_labels
from reinforce.processes.cores import Node, default_gpus
from reinforce.processes.parallel import nodes_of_run
from reinforce.source.formats.base import Shard
from reinforce.source.urls import Info, canonical, expand
from teachers.registry import describe_model
from teachers.spec import ModelInfo, ModelSpec, Precision

_RECORDED, _GPUS, _CPUS = "as dataset.json records", "workers use GPUs", "workers use CPUs"


def resolve_precisions(
    config: Config, manifest: Callable[[], Mapping[str, Any] | None], nodes: Callable[[], Sequence[Node]]
) -> tuple[Config, list[str]]:
    """The config with the precision of each model that is loaded, and lines about those that were ``auto``.

    ``manifest`` returns dataset.json of the output; it is called if a model was ``auto``.
    ``nodes`` are those on which workers will run; it is called if `workers.gpus` is not set and they matter.
    """
    specs = config.models
    all_ = [(section, name, spec) for section, of in specs.items() for name, spec in of.items()]
    open_ = [(section, name) for section, name, spec in all_ if spec.uses_precision and spec.precision == "auto"]
    if not open_:
        return config, []
    found_manifest = manifest() or {}
    recorded: dict[tuple[str, str], Precision | None] = {}
    for section, name in open_:
        precision = mapping_at(found_manifest, *entry_keys(section, name), "model").get("precision")
        recorded[section, name] = precision if precision in get_args(Precision) else None
    default: tuple[Precision, str] = ("fp32", _CPUS)
    if None in recorded.values():
        gpus = default_gpus(nodes()) if config.workers.gpus is None else config.workers.gpus
        default = ("bf16", _GPUS) if gpus else default
    found = {model: (precision, _RECORDED) if precision else default for model, precision in recorded.items()}
    changed: dict[str, dict[str, ModelSpec]] = {section: {**specs[section]} for section, _ in found}
    for (section, name), (precision, _) in found.items():
        changed[section][name] = changed[section][name].model_copy(update={"precision": precision})
    rows = sorted((precision, reason, name) for (_, name), (precision, reason) in found.items())
    lines = [
        f"precision: {precision} for {', '.join(name for _, _, name in group)} (auto: {reason})"
        for (precision, reason), group in itertools.groupby(rows, key=lambda row: row[:2])
    ]
    return config.model_copy(update=changed), lines


def describe_models(config: Config) -> dict[tuple[str, str], ModelInfo]:
    """Name, identity and dimensions of every model of the config, by section and name, without loading it.

    Raises UserError.
    """
    models = config.models
    try:
        infos = {
            (section, name): describe_model(name, spec) for section in models for name, spec in models[section].items()
        }
    except (ValueError, OSError, ImportError) as error:
        raise UserError(f"{error}{user_frames(error)}") from error
    for labels in config.labels.values():
        for place, info in infos.items():
            if place[0] in MODEL_SECTIONS:
                identity = {**info.identity, **labels.taken.identity(place[1], labels.join)}
                infos[place] = replace(info, identity=identity)
    return infos


def resolve_layers(
    config: Config, store: Store, manifest: Mapping[str, Any] | None, nodes: Callable[[], Sequence[Node]]
) -> tuple[Config, dict[str, Layer], list[str]]:
    """The config with its precisions, its layers, and notes on the precisions.

    ``nodes`` as in ``resolve_precisions``. Raises UserError.
    """
    config, notes = resolve_precisions(config, lambda: manifest, nodes)
    infos = describe_models(config)
    found = dict(infos)  # with codebooks, also of a run that has not written dataset.json yet, and of labels
    for name, layer in build_layers(config, infos).items():
        if layer.codebook is None:
            continue
        labels = config.labels.get(layer.labels or "")
        known = [mapping_at(manifest or {}, "layers", name, "codebook")]
        known += [] if labels is None else [mapping_at(labels.taken.layers, name, "codebook")]
        digest = next((one["digest"] for one in known if one), None)
        digest = digest or codebooks.stored(store, name, layer.fingerprint)
        if digest is not None:
            owner = str(layer.kind.section), str(layer.model)
            found[owner] = replace(found[owner], codebooks={**found[owner].codebooks, name: digest})
    return config, build_layers(config, found), notes


def check_class_files(config: Config, layers: Iterable[Layer], host: str) -> None:
    """Raise UserError if the file of a class on this ``host`` is not the one that ``layers`` were planned with."""
    models = config.models
    for layer in {layer.owner: layer for layer in layers if layer.code is not None}.values():
        found = models[str(layer.kind.section)][str(layer.model)].describe().code
        if found is not None and found != layer.code:
            raise UserError(
                f"{layer.model}: the file of class {layer.identity['class']} on {host} is not that of the plan "
                f"(hash {layer.code} there, {found} here). Finished shards are kept. Give all nodes the same file, and "
                "run again."
            )


def build_layers(config: Config, infos: Mapping[tuple[str, str], ModelInfo]) -> dict[str, Layer]:
    """Every layer of the config by name, each after the layers it needs, and those of a model in turn."""
    layers: dict[str, Layer] = {}
    for level in sorted({kind.level for kind in KINDS.values()}):
        kinds = [kind for kind in KINDS.values() if kind.level == level]
        found = labelled(config, (layer for kind in kinds for layer in kind.layers(config, infos, layers)))
        layers |= {layer.name: layer for layer in sorted(found, key=lambda layer: _position(config, layer))}
    return layers


def _position(config: Config, layer: Layer) -> int:
    """The place of a layer's model in its section of the config."""
    section, model = layer.owner
    return 0 if model is None else [*getattr(config, str(section))].index(model)


def version_notes(models: Iterable[Mapping[str, Any]]) -> list[str]:
    """A warning for each custom class without ``version``, once each; ``models`` are identities."""
    classes = dict.fromkeys(model["class"] for model in models if "class" in model and "version" not in model)
    return [
        f"class {name} has no `version`, so layers that it has made are kept when its code or its weights change. Set "
        "`version = 1` in the class, before its first run because it is part of the fingerprint, and increase it "
        "whenever the outputs change."
        for name in classes
    ]


@dataclass(frozen=True)
class UnreadLabels:
    """Shards of the source by the name of the labels that could not all be read for them, and by shard the files that a
    run replaces when it reads these labels again: each before those that it was computed from. The quarantine names
    them."""

    shards: Mapping[str, Listing] = field(default_factory=dict)
    replaced: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def quarantined(self, shard: str, layers: Iterable[Layer]) -> tuple[str, ...]:
        """The folders of the quarantine with a file of a shard that computing ``layers`` may resolve."""
        names = dict.fromkeys(layer.labels for layer in layers if layer.labels)
        return tuple(quarantine_of(name) for name in names if shard in self.shards[name])

    def without_replaced(self, committed: Mapping[str, Listing]) -> dict[str, Listing]:
        """Listings by layer without the files that are replaced."""
        names: dict[str, list[str]] = {}
        for shard, layers in self.replaced.items():
            for layer in layers:
                names.setdefault(layer, []).append(shard)
        kept = {layer: committed[layer].without(shards) for layer, shards in names.items() if layer in committed}
        return {**committed, **kept}


def find_unread(
    store: Store, config: Config, layers: Mapping[str, Layer], recorded: Mapping[str, Any], names: pa.StringArray,
    committed: Mapping[str, Listing], retry: bool,
) -> UnreadLabels:  # fmt: skip
    """Find the shards among ``names`` whose labels could not all be read; to ``retry``, also what is replaced.

    ``recorded`` are the layers of dataset.json.
    """
    folders = {name: f"quarantine/{quarantine_of(name)}" for name in config.labels}
    found = store.listings(folders.values()) if folders else {}
    shards = {name: found[folder].only(found[folder].within(names)) for name, folder in folders.items()}
    replaced: dict[str, dict[str, None]] = {}
    if retry and any(shards.values()):
        known = {**{name: {} for name in layers}, **recorded}
        others = store.listings([layer for layer in known if layer not in committed])
        listings = {**others, **committed}
        for name, listing in shards.items():
            # The layers with values of these labels, and all that depend on these or on their crops, in order of
            # deletion.
            taken = {layer.name for layer in layers.values() if layer.labels == name}
            crops = {layer for layer in known if kind_of(layer).crops} if SAMPLES in taken else set()
            depending = with_dependants((taken | crops) - {SAMPLES}, known)
            for layer in [*depending, SAMPLES] if SAMPLES in taken else depending:
                for shard in listing.only(listing.within(listings[layer].names)):
                    replaced.setdefault(shard, {})[layer] = None
    return UnreadLabels(shards, {shard: tuple(of_shard) for shard, of_shard in replaced.items()})


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
        return [
            layer
            for name, layer in self.layers.items()
            if name in wanted and layer.codebook and layer.codebook["digest"] is None
        ]

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
            stored.get(name, ()),
            source.format.name,
            list_url(config, name) if source.format.is_listed else "",
            source.parts[row] if source.parts else None,
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
        unread_labels=len({*itertools.chain(*unread.shards.values())} - {shard.name for shard in pending}),
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
) -> dict[str, tuple[str, ...]]:
    """The shards among ``names`` whose samples are missing although other layers exist, also those only ``known``.

    Each with these layers, without those that are ``replaced``.
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
    return {shard: tuple(layers) for shard, layers in stored.items()}


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

    def check(name: str) -> None:
        """Raise UserError if the first file of a layer was made by another recipe than the layer's."""
        for shard in committed[name].names[:1].to_pylist():
            opened = store.open_layer(name, shard, whole=False)
            # Damage is reported where a file is read, and files may have been removed since they were listed.
            with contextlib.suppress(RefusedFile, FileNotFoundError), opened as file:
                if parse_footer(file.metadata).get("fingerprint") is not None:
                    check_footer(store.layer_path(name, shard), file.metadata, layers[name].fingerprint)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(check, layers))
    if recorded and SAMPLES not in recorded:
        raise UserError(f"{store.path(MANIFEST)} lists layers but no samples. Restore the file or start a new output.")
