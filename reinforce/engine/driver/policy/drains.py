"""Nodes that Ray drains before they end: pure policy.

Ray drains a node after a preemption notice, a SIGTERM to its `ray start --block`, `ray drain-node`, or when an
autoscaler removes it. Its workers get no further leases, finish those in flight, and are ended, so that Ray can end
the node before its deadline. A shard that is still in flight when the node ends is leased again; it is no suspect.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from reinforce.terminal import plural


@dataclass(frozen=True)
class Drain:
    """A node that Ray drains, ``seconds`` before Ray expects it to end; None if there is no deadline."""

    node: str
    seconds: float | None

    def line(self, place: str, workers: int, shards: int) -> str:
        """A message for the log: ``workers`` run on the node, with ``shards`` in flight."""
        when = "" if self.seconds is None else f" and ends in {self.seconds:.0f} s"
        busy = f"{plural(workers, 'worker')}, {plural(shards, 'shard')} in flight"
        return f"node {place} is drained{when} ({busy}): its workers finish these and get no others"


class Drains:
    """The nodes that are or were drained. A drain is never cancelled."""

    def __init__(self) -> None:
        self.nodes: frozenset[str] = frozenset()

    def update(self, deadlines: Mapping[str, int], now: float) -> list[Drain]:
        """Record the nodes that Ray drains, with deadlines in ms since 1970, or 0. Return those that are new."""
        new = [
            Drain(node, max(0.0, deadline / 1000 - now) if deadline else None)
            for node, deadline in sorted(deadlines.items())
            if node not in self.nodes
        ]
        self.nodes |= {drain.node for drain in new}
        return new

    def remaining(self, alive: Collection[str]) -> frozenset[str]:
        """The nodes of ``alive`` that are not drained. What dies on a drained node dies with the node."""
        return frozenset(alive) - self.nodes
