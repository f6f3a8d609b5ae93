"""Which shards are complete in all of some layers, and which layers lack the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from reinforce.dataset.files.listing import Listing
from reinforce.dataset.files.store import Store
from reinforce.terminal import first_names, plural


@dataclass(frozen=True)
class Completeness:
    """The shards of some layers.

    Attributes:
        complete: names of the shards that every layer has, sorted.
        total: number of shards that some layer has or had: those of ``samples``, unless files of it were lost.
        missing: for each layer that lacks shards, their names. Quarantined shards are not among them.
        quarantined: number of shards that are not complete because they are quarantined in a layer.
    """

    complete: list[str]
    total: int
    missing: Mapping[str, list[str]]
    quarantined: int

    def describe_missing(self) -> str:
        """For each layer, how many and which shards it lacks."""
        parts = []
        for layer, shards in self.missing.items():
            parts.append(f"{layer} lacks {len(shards):,} of {plural(self.total, 'shard')} ({first_names(shards)})")
        return "; ".join(parts)

    def describe_quarantined(self) -> str:
        """The number of quarantined shards, as a sentence without its full stop."""
        if self.quarantined == 1:
            return "1 shard is left out because it is quarantined in a layer"
        return f"{self.quarantined:,} shards are left out because they are quarantined in a layer"


def check_completeness(store: Store, listings: Mapping[str, Listing], known: Iterable[Listing] = ()) -> Completeness:
    """Compare the listings of layers (``Store.listings``), and other listings of shards that are ``known`` to exist.

    The quarantine is listed only if a layer lacks a shard.
    """
    every = Listing.union([*listings.values(), *known])
    present = {layer: listing.has(every) for layer, listing in listings.items()}
    complete = np.logical_and.reduce([*present.values()])
    quarantined: set[str] = set()
    if not complete.all():
        quarantined = set().union(*store.quarantined_shards(listings).values())
    missing = {}
    for layer, mask in present.items():
        if lacking := [shard for shard in _where(every, ~mask) if shard not in quarantined]:
            missing[layer] = lacking
    left_out = sum(shard in quarantined for shard in _where(every, ~complete))
    return Completeness(_where(every, complete), len(every), missing, left_out)


def _where(names: pa.StringArray, mask: npt.NDArray[np.bool_]) -> list[str]:
    chosen: list[str] = names.filter(pa.array(mask)).to_pylist()
    return chosen
