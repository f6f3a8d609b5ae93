"""Which shards are complete in all of some layers, and which layers lack the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from reinforce.dataset.store import Store

_NAMED_SHARDS = 3  # per layer in a message


@dataclass(frozen=True)
class Completeness:
    """The shards of some layers.

    Attributes:
        complete: names of the shards that every layer has, sorted.
        total: number of shards that some layer has: those of ``samples``, unless files of it were lost.
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
            names = ", ".join([*shards[:_NAMED_SHARDS], *["..."] * (len(shards) > _NAMED_SHARDS)])
            parts.append(f"{layer} lacks {len(shards):,} of {self.total:,} shards ({names})")
        return "; ".join(parts)

    def describe_quarantined(self) -> str:
        """How many shards are quarantined, as a sentence without its full stop."""
        if self.quarantined == 1:
            return "1 shard is left out because it is quarantined in a layer"
        return f"{self.quarantined:,} shards are left out because they are quarantined in a layer"


def check_completeness(store: Store, listings: Mapping[str, Mapping[str, int]]) -> Completeness:
    """Compare the listings of layers (``Store.shards``). The quarantine is listed only if a layer lacks a shard."""
    every = set().union(*listings.values())
    lacking = {layer: every - listing.keys() for layer, listing in listings.items()}
    quarantined: set[str] = set()
    if any(lacking.values()):
        quarantined = set().union(*(store.quarantined_shards(layer, listing) for layer, listing in listings.items()))
    missing = {layer: sorted(shards - quarantined) for layer, shards in lacking.items() if shards - quarantined}
    incomplete = set().union(*lacking.values())
    return Completeness(sorted(every - incomplete), len(every), missing, len(incomplete & quarantined))
