"""Shards whose labels could not all be read: named in the quarantine, and computed again where a run is asked to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from reinforce.config import Config
from reinforce.dataset.files.listing import Listing
from reinforce.dataset.files.store import Store
from reinforce.dataset.kinds.registry import kind_of, with_dependants
from reinforce.dataset.layers import SAMPLES, Layer
from reinforce.labels.unread import quarantine_of


@dataclass(frozen=True)
class UnreadLabels:
    """Shards of the source by the name of the labels that could not all be read for them, and by shard the files that a
    run replaces when it reads these labels again: each before those that it was computed from."""

    shards: Mapping[str, Listing] = field(default_factory=dict)
    replaced: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def quarantined(self, shard: str, layers: Iterable[Layer]) -> tuple[str, ...]:
        """The folders of the quarantine with a file of a shard that computing ``layers`` may resolve."""
        names = dict.fromkeys(layer.labels for layer in layers if layer.labels)
        return tuple(quarantine_of(name) for name in names if shard in self.shards[name])

    def count(self, computed: Iterable[str]) -> int:
        """Number of shards, without those that are computed."""
        return len({shard for listing in self.shards.values() for shard in listing}.difference(computed))

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
            for layer in _depending(name, layers, known):
                for shard in listing.only(listing.within(listings[layer].names)):
                    replaced.setdefault(shard, {})[layer] = None
    return UnreadLabels(shards, {shard: tuple(of_shard) for shard, of_shard in replaced.items()})


def _depending(labels: str, layers: Mapping[str, Layer], known: Mapping[str, Mapping[str, object]]) -> list[str]:
    """The layers with values of some labels, and all that depend on these or on their crops, in order of deletion."""
    taken = {layer.name for layer in layers.values() if layer.labels == labels}
    if SAMPLES not in taken:
        return with_dependants(taken, known)
    crops = {layer for layer in known if kind_of(layer).crops}
    return [*with_dependants((taken | crops) - {SAMPLES}, known), SAMPLES]
