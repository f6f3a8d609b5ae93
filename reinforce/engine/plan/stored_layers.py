"""Shards whose samples are missing although other layers of them exist."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa

from reinforce.dataset.files.listing import Listing
from reinforce.dataset.files.store import Store
from reinforce.dataset.layers import SAMPLES
from reinforce.dataset.manifest.manifest import find_manifest
from reinforce.dataset.runs.shard_records import read_records
from reinforce.source.identity import SourceState


def stored_layers(
    store: Store, names: pa.StringArray, committed: Mapping[str, Listing]
) -> dict[str, tuple[tuple[str, ...], SourceState | None]]:
    """The shards among ``names`` whose samples are missing although other layers exist, also of other configs.

    Each with these layers, and with the state of its source file when samples were written, if a run has recorded it.
    """
    absent = ~committed[SAMPLES].has(names)
    if not absent.any():
        return {}
    others = [name for name in (find_manifest(store) or {}).get("layers", {}) if name not in committed]
    listings = {**committed, **store.listings(others)}
    has = {layer: listing.has(names) & absent for layer, listing in listings.items() if listing}
    stored: dict[str, list[str]] = {}
    for layer, rows in has.items():
        for shard in names.filter(pa.array(rows)).to_pylist():
            stored.setdefault(shard, []).append(layer)
    sources = read_records(store).sources if stored else {}
    states = {shard: sources[shard].state if shard in sources else None for shard in stored}
    return {shard: (tuple(layers), states[shard]) for shard, layers in stored.items()}
