"""Nodes that Ray drains before they end: pure policy.

Ray drains a node after a preemption notice, a SIGTERM to its `ray start --block`, `ray drain-node`, or when an
autoscaler removes it. Its workers get no further leases, finish those in flight, and are ended, so that Ray can end
the node before its deadline. A shard that is still in flight when the node ends is leased again; it is no suspect.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping


class Drains:
    """The nodes that are or were drained. A drain is never cancelled."""

    def __init__(self) -> None:
        self.nodes: frozenset[str] = frozenset()

    def update(self, deadlines: Mapping[str, int], now: float) -> dict[str, float | None]:
        """Record the nodes that Ray drains, with deadlines in ms since 1970, or 0.

        Returns those that are new, with the seconds until Ray expects them to end, None without a deadline.
        """
        new = {node: at for node, at in sorted(deadlines.items()) if node not in self.nodes}
        self.nodes |= new.keys()
        return {node: max(0.0, at / 1000 - now) if at else None for node, at in new.items()}

    def remaining(self, alive: Collection[str]) -> frozenset[str]:
        """The nodes of ``alive`` that are not drained. What dies on a drained node dies with the node."""
        return frozenset(alive) - self.nodes
