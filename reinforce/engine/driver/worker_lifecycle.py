"""The part of the driver that ends workers: at fault, hung, on drained nodes, or after as many shards as the config
allows."""

from __future__ import annotations

import time
from collections.abc import Mapping

from reinforce.engine.driver.policy.drains import Drain, Drains
from reinforce.engine.driver.policy.failures import (
    EndedWorker,
    FailurePolicy,
    count_failure,
    error_text,
    needs_replacement,
    pause_seconds,
)
from reinforce.engine.driver.policy.hangs import Hang, StallLimits, find_silence, is_silent
from reinforce.engine.driver.pool import Pool, Slot
from reinforce.engine.driver.shard_queue import ShardQueue
from reinforce.engine.messages.results import ShardResult
from reinforce.engine.messages.task import PendingShard
from reinforce.engine.messages.tracebacks import shorten
from reinforce.engine.record.events import Events
from reinforce.engine.record.summary import WORKER_LOST, RunTotals
from teachers.redact import Redactor


class WorkerHandling:
    """Ends workers of the ``pool``, which grows again by others."""

    pool: Pool
    policy: FailurePolicy
    drains: Drains
    queue: ShardQueue
    limits: StallLimits
    events: Events
    redact: Redactor
    totals: RunTotals

    def _log(self, text: str) -> None:
        raise NotImplementedError

    def _count_success(self, slot: Slot, result: ShardResult) -> None:
        assert slot.info is not None
        slot.failures, slot.failed, slot.finished, slot.memory = 0, 0, slot.finished + 1, result.memory
        if result.quarantine_reason:  # that a shard is refused here proves nothing about workers at which it failed
            self.policy.memory.passed()
            return
        faulty = self.policy.lease_passed(result.shard, slot.info.id, time.monotonic(), len(self.pool.slots))
        for one in faulty:
            for other in [slot for slot in self.pool.started if slot.info and slot.info.id == one.worker]:
                self._replace(other, one.reason)

    def _count_failure(self, slot: Slot, shard: PendingShard, error: Exception) -> None:
        """Replace a worker that is the cause of what fails at it."""
        assert slot.info is not None
        slot.failures, slot.failed = count_failure(slot.failures, error), slot.failed + 1
        now, text, workers = time.monotonic(), shorten(self.redact(error_text(error)), 500), len(self.pool.slots)
        if faulty := self.policy.faults.failed(shard.name, slot.info.id, text, now, workers):
            self._replace(slot, faulty.reason)
        elif needs_replacement(slot.failures):
            self._replace(slot, f"{slot.failures} leases in a row have failed at it; the last error: {text}")
        elif workers > 1 and (count := self.policy.faults.pause_failures(slot.info.id)):
            slot.paused_until = now + pause_seconds(count)

    def _replace(self, slot: Slot, reason: str) -> None:
        """Kill a worker that is the cause of failures; the pool grows again by another one."""
        worker, now = self._end_worker(slot), time.monotonic()
        self.events.add("worker_replaced", node=worker.node, pid=worker.pid, failures=slot.failed, reason=reason)
        self._log(f"a worker is replaced, {worker.id}: {reason}")
        for shard in worker.shards:
            self.queue.add(shard, first=True)
            self.totals.retries[WORKER_LOST] += 1
        self.policy.worker_replaced(worker.id, now)

    def _recycle(self, slot: Slot) -> None:
        """End a worker after ``workers.recycle`` shards; the pool grows again by another one."""
        worker = self._end_worker(slot)
        self.events.add("worker_recycled", node=worker.node, pid=worker.pid, shards=slot.leased, memory=worker.use.last)

    def _follow_drains(self, deadlines: Mapping[str, int]) -> None:
        """Give no leases to workers on nodes that Ray drains, and end those that have finished theirs."""
        for drain in self.drains.update(deadlines, time.time()):
            self._report_drain(drain)
        self.pool.drain(self.drains.nodes)
        for slot in [slot for slot in self.pool.leaving if not slot.leases]:
            worker = self._end_worker(slot)
            self.events.add("worker_drained", node=worker.node, pid=worker.pid, shards=slot.finished)
            if not self.pool.started_count:
                self._log("no worker is left, because the nodes are drained; the run waits for other nodes")

    def _report_drain(self, drain: Drain) -> None:
        slots = {slot: slot.info for slot in self.pool.started if slot.info and slot.info.node == drain.node}
        shards = [shard.name for slot in slots for shard in slot.leases.values()]
        self.events.add("node_drained", node=drain.node, seconds=drain.seconds, workers=len(slots), shards=shards)
        place = next((info.id.place for info in slots.values()), drain.node[:12])
        self._log(drain.line(place, len(slots), len(shards)))

    def _end_worker(self, slot: Slot) -> EndedWorker:
        """Remove a worker from the pool."""
        assert slot.info is not None
        shards, info = tuple(slot.leases.values()), slot.info
        self.pool.remove(slot)
        return EndedWorker(info.node, info.pid, shards, slot.alone, info.host, slot.use)

    def _kill_hung(self, slot: Slot, hang: Hang) -> None:
        """Kill a worker in which a shard makes no progress: a hanging thread cannot be stopped otherwise."""
        self.limits.record_hang(hang)
        self.policy.worker_hung(self._end_worker(slot), hang, time.monotonic())

    def _kill_silent_workers(self) -> None:
        unanswered = self.pool.polls.unanswered(time.monotonic())
        silent = {slot: t for slot, t in unanswered if slot.leases and is_silent(t, slot.pulse, self.limits)}
        for slot, board in self.pool.read_boards(silent).items():
            self._kill_hung(slot, find_silence(silent[slot], slot.pulse, board, self.limits))
