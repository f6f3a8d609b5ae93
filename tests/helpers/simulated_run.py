"""A simulated run: the real policy and queue, and workers with a clock."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from reinforce.config import Failures
from reinforce.dataset.layers import Layer
from reinforce.engine.driver.failures import FailurePolicy
from reinforce.engine.driver.faults import (
    Decision,
    EndedWorker,
    PauseWorker,
    Quarantine,
    ReplaceWorker,
    Requeue,
)
from reinforce.engine.driver.worker_pool import ShardQueue, Slot
from reinforce.engine.messages import PendingShard, WorkerId
from tests.helpers.driver import SAMPLES_ONLY, started

#: What a lease does: it returns (None), raises, or ends its process (the text of the error).
Outcome: TypeAlias = "Exception | str | None"


@dataclass
class SimulatedRun:
    """Workers that take ``seconds`` for a shard, or 0.1 s where ``outcome(shard, worker)`` is a failure."""

    nodes: int
    per_node: int
    shards: int
    outcome: Callable[[PendingShard, WorkerId], Outcome]
    seconds: float = 5.0
    layers: Mapping[str, Layer] = field(default_factory=lambda: SAMPLES_ONLY)
    allowed_seconds: float = 100_000.0
    failures: Counter[str] = field(default_factory=Counter)  # by shard
    leases: Counter[str] = field(default_factory=Counter)  # by shard
    replaced: list[WorkerId] = field(default_factory=list)
    quarantined: list[str] = field(default_factory=list)
    quarantined_layers: set[tuple[str, str]] = field(default_factory=set)
    passed: set[str] = field(default_factory=set)
    passed_layers: set[tuple[str, str]] = field(default_factory=set)

    def run(self) -> SimulatedRun:
        self.policy = FailurePolicy(Failures(allowed_share=1.0), self.layers, self.shards, 0)
        names = [f"{number:05d}" for number in range(self.shards)]
        self.queue = ShardQueue([PendingShard(name, f"{name}.tar", tuple(self.layers)) for name in names])
        self.pids, self.numbers, self.now = itertools.count(), itertools.count(), 0.0
        self.running: list[tuple[float, int, Slot, PendingShard, Outcome]] = []
        self.slots = [self._start(f"node {node}") for node in range(self.nodes) for _ in range(self.per_node)]
        while len(self.queue) or self.running:
            self.now += 0.5
            assert self.now < self.allowed_seconds, "the run does not end"
            while self.running and self.running[0][0] <= self.now:
                _, number, slot, ended, outcome = heapq.heappop(self.running)
                if slot.leases.pop(number, None) is not None:
                    self._end(slot, ended, outcome)
            for verdict in self.policy.judge_deaths(self.now, lambda: {f"node {node}" for node in range(self.nodes)}):
                for decision in verdict.decisions:
                    self._carry_out(decision)
            if self.now >= self.policy.outages.held_until:
                self.queue.hand_out(self.slots, self._lease, self.now, self.policy.consecutive_failures.keys())
        return self

    def _start(self, node: str) -> Slot:
        avoided = self.policy.faults.avoided(self.now)
        if node in avoided:
            others = (f"node {number}" for number in range(self.nodes) if f"node {number}" not in avoided)
            node = next(others, node)
        return started(node, next(self.pids))

    def _lease(self, slot: Slot, leased: PendingShard, alone: bool = False) -> None:
        number, outcome = next(self.numbers), self.outcome(leased, slot.id)
        slot.alone, slot.draining, slot.leases[number] = alone, False, leased
        self.leases[leased.name] += 1
        heapq.heappush(self.running, (self.now + (0.1 if outcome else self.seconds), number, slot, leased, outcome))

    def _end(self, slot: Slot, ended: PendingShard, outcome: Outcome) -> None:
        alone, slot.alone, name, worker = slot.alone, False, ended.name, slot.id
        if outcome is None:
            self.passed.add(name)
            self.passed_layers |= {(name, layer) for layer in ended.layers}
            for one in self.policy.lease_returned(name, worker, False, self.now, len(self.slots), ended.layers):
                self._replace(one.worker)
            return
        self.failures[name] += 1
        if isinstance(outcome, str):
            self._remove(slot)
            self.policy.forget_worker(worker)
            died = EndedWorker(worker, (ended, *slot.leases.values()), alone)
            self.policy.worker_died(died, outcome, self.now, process_dead=True)
            slot.leases = {}
            return
        match self.policy.worker_failed(worker, name, outcome, str(outcome), self.now, len(self.slots)):
            case ReplaceWorker():
                self._replace(worker)
            case PauseWorker(_, until):
                self.queue.paused[worker] = until
        self._carry_out(self.policy.lease_raised(ended, outcome, self.now))

    def _carry_out(self, decision: Decision) -> None:
        name = decision.shard.name
        if isinstance(decision, Quarantine):
            self.quarantined.append(name)
            self.quarantined_layers.add((name, decision.layer))
        self.queue.put_back(decision, self.policy.faults.tried(name))

    def _remove(self, slot: Slot) -> None:
        self.slots.remove(slot)
        self.slots.append(self._start(slot.id.node))

    def _replace(self, worker: WorkerId) -> None:
        for slot in [slot for slot in self.slots if slot.id == worker]:
            self.replaced.append(worker)
            for ended in slot.leases.values():
                self.queue.put_back(Requeue(ended))
            slot.leases = {}
            self.policy.forget_worker(worker)
            self.policy.faults.record_replacement(worker, self.now)
            self._remove(slot)
