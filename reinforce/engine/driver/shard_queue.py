"""Shards that wait for a worker, and the choice of the worker."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TypeAlias

from reinforce.engine.driver.policy.decisions import Decision, Quarantine, Requeue, Retry, RunAlone
from reinforce.engine.driver.worker_pool import Slot
from reinforce.engine.messages.results import WorkerId
from reinforce.engine.messages.task import PendingShard
from reinforce.engine.worker.actor import SHARDS_IN_FLIGHT

#: Workers at which a shard has failed.
Tried: TypeAlias = "frozenset[WorkerId]"
_MAX_RETRIES = 64  # handed out in one call


def _distance(slot: Slot, tried: Tried) -> int:
    """Distance of a worker from those that have tried a shard: 2 on another node, 1 in another process, else 0."""
    if slot.id in tried:
        return 0
    return 1 if any(worker.node == slot.id.node for worker in tried) else 2


class ShardQueue:
    """Shards that are ready, that wait for a time, or that must run alone (suspects)."""

    def __init__(self, shards: Iterable[PendingShard]) -> None:
        self._ready = deque(shards)
        self._suspects: deque[tuple[PendingShard, Tried]] = deque()
        self._retries: deque[tuple[PendingShard, Tried]] = deque()
        self._delayed: list[tuple[float, int, PendingShard, Tried]] = []
        self._order = itertools.count()  # heapq must never compare shards
        self._draining = False  # whether a worker may be draining
        self._paused: dict[WorkerId, float] = {}  # until when

    def __len__(self) -> int:
        return len(self._ready) + len(self._suspects) + len(self._delayed) + len(self._retries)

    @property
    def needs_all_slots(self) -> bool:
        """Whether ``hand_out`` needs busy workers as well as those that can take a lease."""
        return bool(self._suspects or self._retries or self._delayed) or self._draining

    def put_back(self, decision: Decision, tried: Tried = frozenset()) -> None:
        """Queue what is left to do of a shard after a decision; the workers of ``tried`` have failed at it.

        A retry goes to another node than theirs, or at least to another worker, if there is one; a suspect to another
        node if a worker is idle there.
        """
        match decision:
            case Retry(shard, at):
                heapq.heappush(self._delayed, (at, next(self._order), shard, tried))
            case Requeue(shard):
                self._ready.appendleft(shard)
            case RunAlone(shard):
                self._suspects.append((shard, tried))
            case Quarantine(rest=PendingShard() as rest):
                self._ready.append(rest)

    def pause(self, worker: WorkerId, until: float) -> None:
        """Lease nothing to a worker before time ``until``."""
        self._paused[worker] = until

    def hand_out(
        self,
        slots: Iterable[Slot],
        lease: Callable[..., None],
        now: float,
        failing: Collection[WorkerId] = frozenset(),
    ) -> None:
        """Lease two shards to every started worker, and a suspect to a worker that has nothing else.

        ``slots`` are all started workers, or those that can take a lease unless ``needs_all_slots``; ``failing`` are
        those at which the last lease failed. ``lease(slot, shard)`` or ``lease(slot, shard, alone=True)`` starts a
        lease. Where no worker is idle, as many workers as there are suspects get no further leases until they are.
        """
        while self._delayed and self._delayed[0][0] <= now:
            _, _, shard, tried = heapq.heappop(self._delayed)
            if tried:
                self._retries.append((shard, tried))
            else:
                self._ready.append(shard)
        self._paused = {worker: until for worker, until in self._paused.items() if until > now}
        staying = [slot for slot in slots if not slot.leaving]
        slots = [slot for slot in staying if not (self._paused and slot.id in self._paused)]
        idle = [slot for slot in slots if slot.free == SHARDS_IN_FLIGHT] if self._suspects else []
        while self._suspects and idle:
            shard, tried = self._suspects.popleft()
            slot = max(idle, key=lambda slot: _distance(slot, tried))
            idle.remove(slot)
            lease(slot, shard, alone=True)
        self._drain(staying)
        if self._retries:
            self._hand_out_retries(slots, lease, failing)
        for _ in range(SHARDS_IN_FLIGHT if self._ready else 0):
            for slot in slots:
                if self._ready and slot.free and not slot.draining:
                    lease(slot, self._ready.popleft())

    def _hand_out_retries(
        self, slots: Sequence[Slot], lease: Callable[..., None], failing: Collection[WorkerId]
    ) -> None:
        """Lease shards that have failed to workers that are as far as possible from those that tried them.

        The ``failing`` workers get none while there are others, because they are free most of the time.
        """
        if failing:
            slots = [slot for slot in slots if slot.id not in failing] or slots
        nodes = {slot.id.node for slot in slots}
        for _ in range(min(len(self._retries), _MAX_RETRIES)):
            free = [slot for slot in slots if slot.free and not slot.draining]
            if not free:
                return
            shard, tried = self._retries.popleft()
            best = max(free, key=lambda slot: _distance(slot, tried))
            elsewhere = nodes - {worker.node for worker in tried}
            others = elsewhere or any(slot.id not in tried for slot in slots)
            if _distance(best, tried) == (2 if elsewhere else 1 if others else 0):
                lease(best, shard)
            else:  # wait for a worker that has not tried it
                self._retries.append((shard, tried))

    def _drain(self, slots: Sequence[Slot]) -> None:
        if not self._suspects and not self._draining:
            return
        draining = sum(slot.draining for slot in slots)
        for slot in slots:
            busy = slot.free < SHARDS_IN_FLIGHT and not slot.alone and slot.id not in self._paused
            if draining < len(self._suspects) and not slot.draining and busy:
                slot.draining, draining = True, draining + 1
            elif slot.draining and not self._suspects:
                slot.draining = False
        self._draining = any(slot.draining for slot in slots)
