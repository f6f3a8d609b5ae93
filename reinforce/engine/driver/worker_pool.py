"""The pool of worker actors, the turns in which they are asked for their pulse, and the shards that wait for them."""

from __future__ import annotations

import heapq
import itertools
import os
import time
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeAlias, TypeVar

import ray

from reinforce.config import Config, Workers
from reinforce.dataset.layers import Layer
from reinforce.engine.driver.faults import Decision, MemoryUse, Quarantine, Requeue, Retry, RunAlone
from reinforce.engine.messages import PendingShard, WorkerId, WorkerInfo
from reinforce.engine.pulse import Pulse
from reinforce.engine.worker.actor import SHARDS_IN_FLIGHT, as_actor
from reinforce.processes.cluster import live_resources
from reinforce.processes.cores import Node, capacity, cores_per_process
from reinforce.terminal import plural

POLL_SECONDS = 5.0  # between two requests to one worker, at least
POLLS_PER_SECOND = 100.0  # of all workers, unless the limit needs more

_PAUSE_SECONDS = 30.0  # a driver that did not look for so long was itself stopped
_CAPACITY_SECONDS = 5.0  # between two counts of the cluster's resources

_NODE_LABEL = "ray.io/node-id"
_MAX_RETRIES = 64  # handed out in one call

_Worker = TypeVar("_Worker", bound=Hashable)
#: Workers at which a shard has failed.
Tried: TypeAlias = "frozenset[WorkerId]"


@dataclass(eq=False)
class Slot:
    """One worker actor.

    ``alone``: its one lease is a suspect, and it gets no other. ``draining``: it gets no further lease until a suspect
    can run in it. ``exhausted``: it has had as many leases as ``workers.recycle`` allows. ``leaving``: Ray drains its
    node.
    """

    actor: Any
    info: WorkerInfo | None = None  # None while the models are loading
    process: WorkerId | None = None  # None until the process runs, for which a node must have room
    load_began: float = 0.0
    leases: dict[Any, PendingShard] = field(default_factory=dict)
    alone: bool = False
    draining: bool = False
    exhausted: bool = False
    leaving: bool = False
    leased: int = 0  # leases so far
    finished: int = 0  # those that returned
    memory: int = 0  # bytes of its process after the last of them
    avoids: frozenset[str] = frozenset()  # nodes on which it must not be placed
    pulse: Pulse = field(default_factory=Pulse)
    started_at: float = field(default_factory=time.monotonic)
    index: int = 0  # unique in the pool, for metrics and status
    pulse_at: float = 0.0  # when the pulse was received
    leased_at: dict[str, float] = field(default_factory=dict)  # by shard

    @property
    def id(self) -> WorkerId:
        """The process of a worker that has started."""
        assert self.info is not None
        return self.info.id

    @property
    def free(self) -> int:
        """Number of further leases it can take."""
        closed = self.info is None or self.alone or self.exhausted or self.leaving
        return 0 if closed else SHARDS_IN_FLIGHT - len(self.leases)

    @property
    def use(self) -> MemoryUse:
        """The memory of its process, as far as it was measured."""
        first = self.info.memory if self.info else 0
        return MemoryUse(first, max(self.memory, self.pulse.memory, first), self.finished)


def describe_workers(workers: Workers, shards: int, limit: int, nodes: Sequence[Node]) -> str:
    """A line about the workers of a run (at most ``limit``, and one for each shard) and about cores that stay idle."""
    count = min(shards, limit)
    device = "cuda" if workers.gpus else "cpu"
    what = f"{plural(count, 'worker')} x {workers.describe()}"
    batches = (
        "the largest batches that fit"
        if workers.batch == "auto" and workers.gpus
        else f"batches of {plural(workers.images, 'image')}"
    )
    line = f"{what}, {batches}, device {device}"
    places = capacity(nodes, workers.cores, workers.gpus or 0)
    cores = cores_per_process(nodes, count, 0)
    if workers.gpus or workers.max is not None or shards >= places or cores <= workers.cores:
        return line
    left = f"{plural(shards, 'shard')}"
    return f"{line}; there are {places} places for workers and {left}: workers.cpus={cores} uses more cores"


class WorkerPool:
    """The worker actors of a run. Those that cannot be placed are pending in Ray until a node joins."""

    def __init__(self, config: Config, layers: Mapping[str, Layer], needed: frozenset[str]) -> None:
        self._arguments = [ray.put(value) for value in (config, layers, needed, os.getcwd())]
        self._config = config
        self._class = as_actor(config)
        self.slots: list[Slot] = []
        self.polls: Polls[Slot] = Polls()
        self.loading: dict[Any, Slot] = {}  # workers that have not started
        self.loads: dict[Slot, None] = {}  # those of them whose process runs, in the order of `load_began`
        self.leases: dict[Any, Slot] = {}
        self._indexes: list[int] = []  # a heap of free indexes
        self._to_avoid: frozenset[str] = frozenset()
        self._avoided: frozenset[str] = frozenset()  # the same, or empty if no other node can hold a worker
        self._drained: frozenset[str] = frozenset()  # Ray places no workers on them
        self.samples = 0  # by the workers' last pulses
        self.busy = 0.0  # accelerator-seconds, also of workers that are no longer in the pool
        self._past_alive = self._started_sum = 0.0  # worker-seconds that ended; sum of `started_at`
        # Subsets of `slots`: with 10,000 workers, nothing may loop over all of them whenever a shard ends.
        self.started: dict[Slot, None] = {}  # workers whose models are loaded
        self.free: dict[Slot, None] = {}  # those of them that can take a lease
        self.leaving: dict[Slot, None] = {}  # workers on nodes that Ray drains
        self._capacity = 0
        self._capacity_checked = self._avoid_checked = -_CAPACITY_SECONDS

    def grow(self, size: int) -> None:
        """Ask for actors until ``size`` (at most ``workers.max``) exist or are pending."""
        actor = self._class
        if self._avoided:
            actor = actor.options(label_selector={_NODE_LABEL: f"!in({','.join(sorted(self._avoided))})"})
        for _ in range(min(size, self.limit()) - len(self.slots) + len(self.leaving)):
            index = heapq.heappop(self._indexes) if self._indexes else len(self.slots)
            slot = Slot(actor.remote(*self._arguments, index), avoids=self._avoided, index=index)
            self.slots.append(slot)
            self.loading[slot.actor.identify.remote()] = slot

    def begin_load(self, slot: Slot, process: WorkerId) -> None:
        """Let a worker whose process runs load its models."""
        slot.process, slot.load_began = process, time.monotonic()
        self.loads[slot] = None
        self.loading[slot.actor.load.remote()] = slot

    def avoid(self, nodes: frozenset[str]) -> None:
        """Place no new workers on ``nodes``, unless no other can hold one. Replaces workers that have not started.

        Other nodes may join or end, so they are counted every few seconds.
        """
        now = time.monotonic()
        if nodes == self._to_avoid and (not nodes or now - self._avoid_checked <= _CAPACITY_SECONDS):
            return
        self._to_avoid, self._avoid_checked = nodes, now
        nodes = nodes if nodes and self._count_places(nodes) else frozenset()
        if nodes == self._avoided:
            return
        self._avoided, self._capacity_checked = nodes, -_CAPACITY_SECONDS
        for slot in [slot for slot in self.slots if slot.info is None and slot.avoids != nodes]:
            self.remove(slot)

    def drain(self, nodes: frozenset[str]) -> None:
        """Give no further leases to the workers on ``nodes``, which Ray drains. Others are started in their place."""
        if nodes == self._drained:
            return
        self._drained, self._capacity_checked = nodes, -_CAPACITY_SECONDS
        for slot in self.started:
            self._mark_leaving(slot)

    def _mark_leaving(self, slot: Slot) -> None:
        if slot.id.node in self._drained and not slot.leaving:
            slot.leaving = True
            self.leaving[slot] = None
            self.free.pop(slot, None)

    def shrink(self, size: int, failures: Mapping[WorkerId, int]) -> None:
        """Remove workers without leases until ``size`` are left: first those that have not started, then those with
        the most ``failures``."""
        excess = len(self.slots) - len(self.leaving) - size
        if excess <= 0:
            return
        idle = [slot for slot in self.slots if not slot.leases and not slot.leaving]
        for slot in sorted(idle, key=lambda slot: (1, -failures.get(slot.id, 0)) if slot.info else (0, 0))[:excess]:
            self.remove(slot)

    def remove(self, slot: Slot) -> None:
        """Kill a worker and release its leases."""
        self.discard(slot)
        self.polls.remove(slot)
        if slot.info is not None:
            del self.started[slot]
            self.free.pop(slot, None)
            self.leaving.pop(slot, None)
            self.samples -= slot.pulse.samples
            self._started_sum -= slot.started_at
            self._past_alive += time.monotonic() - slot.started_at
        else:
            self.loading = {ref: other for ref, other in self.loading.items() if other is not slot}
        for ref in slot.leases:
            del self.leases[ref]
        ray.kill(slot.actor)

    def discard(self, slot: Slot) -> None:
        """Remove a worker whose process has ended before it started."""
        self.slots.remove(slot)
        self.loads.pop(slot, None)
        heapq.heappush(self._indexes, slot.index)

    def close(self) -> None:
        for slot in list(self.slots):
            self.remove(slot)

    def record_start(self, slot: Slot, info: WorkerInfo) -> None:
        slot.info, slot.started_at = info, time.monotonic()
        self.loads.pop(slot, None)
        self._started_sum += slot.started_at
        self.started[slot] = self.free[slot] = None
        self._mark_leaving(slot)
        self.polls.add(slot, slot.started_at)

    def record_pulse(self, slot: Slot, pulse: Pulse) -> None:
        self.samples += pulse.samples - slot.pulse.samples
        self.busy += pulse.busy - slot.pulse.busy
        slot.pulse, slot.pulse_at = pulse, time.monotonic()

    def alive(self, now: float) -> float:
        """Worker-seconds since the models were loaded, of all workers of the run."""
        return self._past_alive + len(self.started) * now - self._started_sum

    def lease(self, slot: Slot, shard: PendingShard, alone: bool = False) -> None:
        """Lease a shard to a worker; ``alone`` for a suspect."""
        slot.alone, slot.draining, slot.leased = alone, False, slot.leased + 1
        slot.exhausted = self._config.workers.recycle is not None and slot.leased >= self._config.workers.recycle
        slot.leased_at[shard.name] = time.monotonic()
        ref = slot.actor.process.remote(shard)
        slot.leases[ref] = replace(shard, quarantined=shard.layers)  # if it is leased again
        self.leases[ref] = slot
        if not slot.free:
            self.free.pop(slot, None)

    def end_lease(self, ref: Any) -> PendingShard:
        """Remove a lease that has returned or raised, and return its shard."""
        slot = self.leases.pop(ref)
        slot.alone = False
        if not slot.leaving:
            self.free[slot] = None
        shard = slot.leases.pop(ref)
        slot.leased_at.pop(shard.name, None)
        return shard

    def limit(self) -> int:
        """The most workers at a time."""
        workers = self._config.workers
        return max(workers.min, self.cluster_capacity()) if workers.max is None else workers.max

    def cluster_capacity(self) -> int:
        """Number of workers that the cluster's nodes can hold, updated every few seconds."""
        if time.monotonic() - self._capacity_checked > _CAPACITY_SECONDS:
            self._capacity_checked = time.monotonic()
            self._capacity = self._count_places(self._avoided)
        return self._capacity

    def _count_places(self, avoided: frozenset[str]) -> int:
        workers = self._config.workers
        return capacity(live_resources(avoided | self._drained), workers.cores, workers.gpus or 0)

    def resource_error(self) -> str | None:
        """A message if no node of the cluster can hold a worker, else None."""
        if self._count_places(self._avoided):
            return None
        workers = self._config.workers
        nodes = live_resources()
        best: dict[str, float] = max(nodes, key=lambda n: (n.get("GPU", 0), n.get("CPU", 0)), default={})
        return (
            f"a worker needs {workers.cores} CPUs and {workers.gpus or 0:g} GPUs, but the largest node has "
            f"{best.get('CPU', 0):g} CPUs and {best.get('GPU', 0):g} GPUs. Lower workers.cpus or workers.gpus."
        )


class ShardQueue:
    """Shards that are ready, that wait for a time, or that must run alone (suspects)."""

    def __init__(self, shards: Iterable[PendingShard]) -> None:
        self._ready = deque(shards)
        self._suspects: deque[tuple[PendingShard, Tried]] = deque()
        self._retries: deque[tuple[PendingShard, Tried]] = deque()
        self._delayed: list[tuple[float, int, PendingShard, Tried]] = []
        self._order = itertools.count()  # heapq must never compare shards
        self._draining = False  # whether a worker may be draining
        self.paused: dict[WorkerId, float] = {}  # workers to which nothing is leased, until when

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
        self.paused = {worker: until for worker, until in self.paused.items() if until > now}
        staying = [slot for slot in slots if not slot.leaving]
        slots = [slot for slot in staying if not (self.paused and slot.id in self.paused)]
        idle = [slot for slot in slots if slot.free == SHARDS_IN_FLIGHT] if self._suspects else []
        while self._suspects and idle:
            shard, tried = self._suspects.popleft()
            slot = max(idle, key=lambda slot: _distance(slot, tried))
            idle.remove(slot)
            lease(slot, shard, alone=True)
        if self._suspects or self._draining:
            draining = sum(slot.draining for slot in staying)
            for slot in staying:
                busy = slot.free < SHARDS_IN_FLIGHT and not slot.alone and slot.id not in self.paused
                if draining < len(self._suspects) and not slot.draining and busy:
                    slot.draining, draining = True, draining + 1
                elif slot.draining and not self._suspects:
                    slot.draining = False
            self._draining = any(slot.draining for slot in staying)
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


def _distance(slot: Slot, tried: Tried) -> int:
    """Distance of a worker from those that have tried a shard: 2 on another node, 1 in another process, else 0."""
    if slot.id in tried:
        return 0
    return 1 if any(worker.node == slot.id.node for worker in tried) else 2


def poll_interval(workers: int, least: float) -> float:
    """Seconds between two requests to one worker: more with many workers, a quarter of the ``least`` limit at most."""
    return max(POLL_SECONDS, min(least / 4, workers / POLLS_PER_SECOND))


class Polls(Generic[_Worker]):
    """Requests to workers for their pulse.

    The driver calls ``due`` once a tick and asks the workers that it returns.
    """

    def __init__(self) -> None:
        self._turns: dict[_Worker, float] = {}  # time from which a worker is due, in the order of their turns
        self._asked: dict[_Worker, float] = {}  # in the order in which they were asked
        self._looked: float | None = None

    def add(self, worker: _Worker, now: float) -> None:
        self._turns[worker] = now + POLL_SECONDS

    def remove(self, worker: _Worker) -> None:
        self._turns.pop(worker, None)
        self._asked.pop(worker, None)

    def due(self, now: float, least: float) -> list[_Worker]:
        """The workers to ask now; ``least`` is the smallest limit of a step."""
        interval = poll_interval(len(self._turns), least)
        turns = [*itertools.takewhile(lambda worker: self._turns[worker] <= now, self._turns)]
        for worker in turns:
            del self._turns[worker]  # its next turn is after those of the others
            self._turns[worker] = now + interval
        due = [worker for worker in turns if worker not in self._asked]
        self._asked |= dict.fromkeys(due, now)
        return due

    def answered(self, worker: _Worker) -> None:
        self._asked.pop(worker, None)

    def unanswered(self, now: float) -> list[tuple[_Worker, float]]:
        """Workers that were asked and have not answered, with the seconds since then, the longest first.

        Time in which the driver itself did not run does not count.
        """
        if self._looked is not None and now - self._looked > _PAUSE_SECONDS:
            self._asked = dict.fromkeys(self._asked, now)
        self._looked = now
        return [(worker, now - asked) for worker, asked in self._asked.items()]
