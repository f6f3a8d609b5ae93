"""Planning: which layers each source shard still lacks. Starts and writes nothing.

The same subtraction serves a fresh run, a resumed run and an added teacher.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from reinforce.config import Config
from reinforce.dataset.damage import DamagedFile, find_damaged
from reinforce.dataset.differences import recipe_error
from reinforce.dataset.layers import SAMPLES, Layer, reads_reinforcements
from reinforce.dataset.manifest import find_manifest
from reinforce.dataset.store import MANIFEST, Store, parse_footer
from reinforce.engine.recipe import build_layers, describe_models
from reinforce.errors import UserError
from reinforce.source.identity import former_urls
from reinforce.source.urls import Info, canonical, compression, expand, is_public, shard_names
from reinforce.storage import is_job_folder, is_ray_job


@dataclass(frozen=True)
class PendingShard:
    """A source shard and its missing layers, each after the layers it needs."""

    name: str
    url: str
    layers: tuple[str, ...]
    reinforcements: str | None = None  # URL of its published reinforcements, if a missing layer reads them


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
    """What a run would compute.

    ``shards`` counts all source shards, ``pending`` lists those that lack a layer, ``committed`` names those that the
    samples layer has, also of other sources, and ``not_in_source`` counts these. ``listed`` is what the file system
    lists, by URL, of the source files of pending shards that have samples already. ``damaged`` are files that count as
    missing.
    """

    config: Config
    layers: Mapping[str, Layer]
    shards: int
    states: Mapping[str, LayerState]
    pending: list[PendingShard]
    committed: Collection[str] = ()
    not_in_source: NotInSource = NotInSource()
    listed: Mapping[str, Info] = field(default_factory=dict)
    damaged: Sequence[DamagedFile] = ()

    @property
    def quarantined(self) -> int:
        """Number of shards that are quarantined in some layer."""
        return max(state.quarantined for state in self.states.values())

    @property
    def recomputed(self) -> list[DamagedFile]:
        """Damaged files that a run sets aside, because it computes them again."""
        pending = {shard.name for shard in self.pending} if self.damaged else set()
        return [file for file in self.damaged if file.shard in pending]


def make_plan(config: Config, retry_quarantined: bool = False) -> Plan:
    """List the source and every layer once, and subtract. Raises UserError."""
    layers = build_layers(config, describe_models(config))
    listed: dict[str, Info] = {}
    urls = source_shards(config, listed)
    published = _pair_reinforcements(config, urls)
    store = Store(config.output)
    committed = {name: store.shards(name) for name in layers}
    damaged = find_damaged(store, committed, {name: layer.fingerprint for name, layer in layers.items()})
    for file in damaged:
        del committed[file.layer][file.shard]
    check_fingerprints(store, layers, committed)
    quarantine = {name: store.quarantined_shards(name, committed[name]) for name in layers}
    refused = {name: set() if retry_quarantined else quarantine[name] for name in layers}
    pending = []
    missing = dict.fromkeys(layers, 0)
    quarantined = dict.fromkeys(layers, 0)
    interned: dict[tuple[str, ...], tuple[str, ...]] = {}  # a run has millions of shards and few different tuples
    for shard, url in urls.items():
        todo: list[str] = []
        lost: set[str] = set()
        for name, layer in layers.items():
            if shard in committed[name]:
                continue
            if shard in refused[name] or not lost.isdisjoint(layer.needs):
                lost.add(name)
                quarantined[name] += 1
            else:
                todo.append(name)
                missing[name] += 1
        if todo:
            key = tuple(todo)
            reinforcements = published.get(shard) if reads_reinforcements(layers[name] for name in todo) else None
            pending.append(PendingShard(shard, url, interned.setdefault(key, key), reinforcements))
    states = {}
    for name in layers:
        sizes = [committed[name][shard] for shard in urls if shard in committed[name]]
        states[name] = LayerState(len(sizes), sum(sizes), quarantined[name], missing[name])
    not_in_source = _not_in_source(urls, committed[SAMPLES], quarantine)
    extended = [shard.url for shard in pending if SAMPLES not in shard.layers]
    listed = {url: listed[url] for url in extended if url in listed}
    return Plan(config, layers, len(urls), states, pending, committed[SAMPLES], not_in_source, listed, damaged)


def _not_in_source(
    urls: Mapping[str, str], committed: Collection[str], quarantine: Mapping[str, Collection[str]]
) -> NotInSource:
    finished = [name for name in committed if name not in urls]
    refused = {name: layer for layer, names in reversed([*quarantine.items()]) for name in names if name not in urls}
    first = min(refused, default=None)
    return NotInSource(
        len(finished), len(refused), min(finished, default=None), None if first is None else f"{refused[first]}/{first}"
    )


def source_shards(config: Config, listed: dict[str, Info] | None = None) -> dict[str, str]:
    """Source URLs by shard name; ``listed`` as in ``expand``.

    Raises UserError if the source is empty, two shards have the same name, or Ray deletes a shard after the job.
    """
    urls = expand(config.source, listed)
    _check_outlives_job(urls)
    if not config.embeds_images and (packed := next(filter(compression, urls), None)):
        raise UserError(
            f"source: images: reference needs uncompressed .tar shards, and {canonical(packed)} is compressed; set "
            "images: embed"
        )
    if not config.embeds_images and (private := next(itertools.filterfalse(is_public, urls), None)):
        raise UserError(
            f"source: images: reference stores URLs without user, password and query, and {canonical(private)} cannot "
            "be read without them; give credentials by the environment (AWS_ACCESS_KEY_ID, or fsspec's "
            "configuration), or set images: embed"
        )
    return dict(zip(shard_names(former_urls(urls, config.moved)), urls, strict=True))


def _check_outlives_job(urls: Iterable[str]) -> None:
    """Raise UserError if Ray deletes a local shard after this job; in the next job it would have another name."""
    for url in urls if is_ray_job() else ():
        path = canonical(url)
        if path.startswith(os.sep) and (is_job_folder(url) or is_job_folder(path)):
            raise UserError(
                f"source {path} is in the temporary folder of a Ray job. Shards are named after their paths, "
                "so every job would compute them again. Set `source` to an absolute path that every node reaches, or "
                "to a URL such as s3://BUCKET/FOLDER."
            )


def _pair_reinforcements(config: Config, urls: Mapping[str, str]) -> dict[str, str]:
    """The URL of published reinforcements for each shard of ``urls``: paired by file name, else by position.

    Raises UserError if some shards have no counterpart.
    """
    if config.reinforcements is None:
        return {}
    found = expand(config.reinforcements)
    for parts in (1, 2):  # by file name, or by folder and file name where file names are not unique
        by_name = {_tail(url, parts): url for url in found}
        names = {shard: _tail(url, parts) for shard, url in urls.items()}
        if len(by_name) == len(found) and len({*names.values()} & by_name.keys()) == len(urls):
            return {shard: by_name[name] for shard, name in names.items()}
    if len(found) == len(urls):
        return dict(zip(urls, found, strict=True))
    raise UserError(
        f"reinforcements: {len(found):,} shards for the {len(urls):,} of `source`, and not all of these have a "
        "counterpart of the same file name. Name as many shards as `source` in the same order, or with the same names."
    )


def _tail(url: str, parts: int) -> str:
    """The last ``parts`` parts of a URL's path, without the extensions of the file name."""
    *folders, name = canonical(url).split("/")[-parts:]
    return "/".join([*folders, name.partition(".")[0]])


def check_fingerprints(store: Store, layers: Mapping[str, Layer], committed: Mapping[str, Mapping[str, int]]) -> None:
    """Raise UserError if layers exist already and were made by other recipes. Names all of them and what differs."""
    manifest = find_manifest(store)
    recorded = (manifest or {}).get("layers", {})
    found: dict[str, str | None] = {}
    for name in layers:
        if name in recorded:
            found[name] = recorded[name]["fingerprint"]
        elif shard := next(iter(committed[name]), None):
            with store.open_layer(name, shard) as file:  # a layer that dataset.json does not list
                found[name] = parse_footer(file.metadata).get("fingerprint")
    if others := {name: value for name, value in found.items() if value != layers[name].fingerprint}:
        raise recipe_error(store, manifest, layers, others)
    if recorded and SAMPLES not in recorded:
        raise UserError(f"{store.path(MANIFEST)} lists layers but no samples. Restore the file or start a new output.")
