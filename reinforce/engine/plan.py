"""What is missing: the (shard, layers) that a run would compute. The same for a fresh run, a resume and an added
teacher; nothing is started or written here."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from reinforce.config import Config
from reinforce.dataset.layers import SAMPLES, Layer, reads_reinforcements
from reinforce.dataset.store import MANIFEST, Store, fingerprint_error
from reinforce.engine.recipe import describe_models, layers_of
from reinforce.errors import UserError
from reinforce.source.urls import canonical, compression, expand, is_public, shard_names


@dataclass(frozen=True)
class Work:
    """One shard and the layers it lacks, in the order they depend on each other."""

    shard: str
    url: str
    layers: tuple[str, ...]
    reinforcements: str | None = None  # the URL of what others have published for it, where that is to be read


@dataclass(frozen=True)
class LayerState:
    """Shards of one layer: committed (with their bytes), given up, and still to do."""

    done: int
    done_bytes: int
    quarantined: int
    missing: int


@dataclass(frozen=True)
class Plan:
    config: Config
    layers: Mapping[str, Layer]
    shards: int
    states: Mapping[str, LayerState]
    work: list[Work]

    @property
    def quarantined(self) -> int:
        """Shards given up in some layer."""
        return max(state.quarantined for state in self.states.values())


def make_plan(config: Config, retry_quarantined: bool = False) -> Plan:
    """List the source and every layer once, and subtract. Raises UserError."""
    layers = layers_of(config, describe_models(config))
    urls = shards_of(config)
    published = _published_for(config, urls)
    store = Store(config.output)
    committed = {name: store.shards(name) for name in layers}
    check_fingerprints(store, layers, committed)
    refused = {name: {} if retry_quarantined else store.quarantined_shards(name, committed[name]) for name in layers}
    work = []
    missing = dict.fromkeys(layers, 0)
    quarantined = dict.fromkeys(layers, 0)
    interned: dict[tuple[str, ...], tuple[str, ...]] = {}
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
            beside = published.get(shard) if reads_reinforcements(layers[name] for name in todo) else None
            work.append(Work(shard, url, interned.setdefault(key, key), beside))
    states = {}
    for name in layers:
        sizes = [committed[name][shard] for shard in urls if shard in committed[name]]
        states[name] = LayerState(len(sizes), sum(sizes), quarantined[name], missing[name])
    return Plan(config, layers, len(urls), states, work)


def shards_of(config: Config) -> dict[str, str]:
    """Source URLs by shard name. Raises UserError for an empty source or two shards of one name."""
    urls = expand(config.source)
    if not config.embeds_images and (packed := next(filter(compression, urls), None)):
        raise UserError(
            f"source: images: reference needs uncompressed .tar shards; {canonical(packed)} is none: use images: embed"
        )
    if not config.embeds_images and (private := next(itertools.filterfalse(is_public, urls), None)):
        raise UserError(
            f"source: images: reference stores where each image lies, without user, password and query, and "
            f"{canonical(private)} cannot be read without its own: give credentials by the environment (such as "
            "AWS_ACCESS_KEY_ID, or fsspec's configuration), or use images: embed"
        )
    return dict(zip(shard_names(urls), urls, strict=True))


def _published_for(config: Config, urls: Mapping[str, str]) -> dict[str, str]:
    """The URL of published reinforcements by shard of ``urls``: that of its file name, else that of its place.

    Raises UserError where shards have none of their own.
    """
    if config.reinforcements is None:
        return {}
    found = expand(config.reinforcements)
    for parts in (1, 2):  # file names, or with their folders, as far as these tell the files apart
        by_name = {_tail(url, parts): url for url in found}
        names = {shard: _tail(url, parts) for shard, url in urls.items()}
        if len(by_name) == len(found) and len({*names.values()} & by_name.keys()) == len(urls):
            return {shard: by_name[name] for shard, name in names.items()}
    if len(found) == len(urls):
        return dict(zip(urls, found, strict=True))
    raise UserError(
        f"reinforcements: {len(found):,} shards for the {len(urls):,} of `source`, and not all of these have one of "
        "their name. Name as many, in the same order or by the same names."
    )


def _tail(url: str, parts: int) -> str:
    """The last parts of a URL's path, without what follows the first dot of the file's name."""
    *folders, name = canonical(url).split("/")[-parts:]
    return "/".join([*folders, name.partition(".")[0]])


def check_fingerprints(store: Store, layers: Mapping[str, Layer], committed: Mapping[str, Mapping[str, int]]) -> None:
    """Raise UserError where a layer exists already and was made by another recipe."""
    manifest = store.read_json(MANIFEST)
    known = (manifest or {}).get("layers", {})
    for name, layer in layers.items():
        if name in known:
            if known[name]["fingerprint"] != layer.fingerprint:
                raise fingerprint_error(store.path(name), known[name]["fingerprint"], layer.fingerprint)
        elif found := next(iter(committed[name]), None):
            # No word of this layer in dataset.json, yet files: opening one compares its footer.
            with store.open_layer(name, found, layer.fingerprint):
                pass
    if known and SAMPLES not in known:
        raise UserError(f"{store.path(MANIFEST)} names layers but no samples. Restore the file or start a new output.")
