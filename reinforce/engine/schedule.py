"""Shards that wait for a worker, and which worker gets which shard."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from reinforce.engine.plan import PendingShard
from reinforce.engine.pool import Slot
from reinforce.engine.worker import SHARDS_IN_FLIGHT


class ShardQueue:
    """Shards that are ready, that wait for a time, or that must run alone (suspects)."""

    def __init__(self, shards: Iterable[PendingShard]) -> None:
        self._ready = deque(shards)
        self._suspects: deque[PendingShard] = deque()
        self._delayed: list[tuple[float, int, PendingShard]] = []
        self._order = itertools.count()  # heapq must never compare shards

    def __len__(self) -> int:
        return len(self._ready) + len(self._suspects) + len(self._delayed)

    def add(self, shard: PendingShard, first: bool = False) -> None:
        if first:
            self._ready.appendleft(shard)
        else:
            self._ready.append(shard)

    def add_delayed(self, shard: PendingShard, at: float) -> None:
        """Add a shard that is not leased before time ``at``."""
        heapq.heappush(self._delayed, (at, next(self._order), shard))

    def add_suspect(self, shard: PendingShard) -> None:
        """Add a shard that is leased only to a worker without other leases."""
        self._suspects.append(shard)

    def hand_out(self, slots: Sequence[Slot], lease: Callable[..., None], now: float) -> None:
        """Lease two shards to every started worker, and a suspect to a worker that has nothing else.

        ``lease(slot, shard)`` or ``lease(slot, shard, alone=True)`` starts a lease. Where no worker is idle, as many
        workers as there are suspects get no further leases until they are.
        """
        while self._delayed and self._delayed[0][0] <= now:
            self._ready.append(heapq.heappop(self._delayed)[2])
        idle = [slot for slot in slots if slot.free == SHARDS_IN_FLIGHT]
        while self._suspects and idle:
            lease(idle.pop(), self._suspects.popleft(), alone=True)
        self._drain(slots)
        for _ in range(SHARDS_IN_FLIGHT):
            for slot in slots:
                if self._ready and slot.free and not slot.draining:
                    lease(slot, self._ready.popleft())

    def _drain(self, slots: Sequence[Slot]) -> None:
        draining = sum(slot.draining for slot in slots)
        for slot in slots:
            busy = slot.free < SHARDS_IN_FLIGHT and not slot.alone
            if draining < len(self._suspects) and not slot.draining and busy:
                slot.draining, draining = True, draining + 1
            elif slot.draining and not self._suspects:
                slot.draining = False
