"""Starts of workers, and their ends: at fault, dead, hung, on drained nodes, or after ``workers.recycle`` shards."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayError, RayTaskError

from reinforce.cluster import cause_of, is_node_lost
from reinforce.engine.driver.policy.decisions import EndedWorker, PauseWorker, ReplaceWorker, Requeue
from reinforce.engine.driver.policy.failures import error_text
from reinforce.engine.driver.policy.hangs import Hang, LoadLimit, StallLimits, find_hang, find_silence, silence_limit
from reinforce.engine.driver.state import RunState
from reinforce.engine.driver.worker_pool import Slot
from reinforce.engine.messages.results import ShardResult, WorkerId, WorkerInfo
from reinforce.engine.messages.task import PendingShard
from reinforce.engine.messages.tracebacks import shorten
from reinforce.engine.preflight.check_machines import heic_note
from reinforce.engine.record.summary import WORKER_LOST
from reinforce.processes.imports import HEIC_HINT, reads_heic
from reinforce.terminal import plural
from teachers.fast_paths.usage import problem_lines

_SILENT_SECONDS = 15.0  # without an answer, after which the progress line names the host


class WorkerLifecycle:
    """Removes workers from the pool, which starts others in their place, and reports them to the policy."""

    def __init__(self, state: RunState) -> None:
        self._state = state
        self._pool, self._policy, self._events = state.pool, state.policy, state.events
        self._limits = StallLimits(state.config.failures)
        self._load_limit = LoadLimit(state.config.workers.start_timeout)
        self._logged: set[str] = set()  # fallbacks of models
        self.polled: dict[Any, Slot] = {}  # requests for pulses that are under way

    # -- starts

    def finish_start(self, ref: Any) -> WorkerInfo | None:
        """Record that the process of a worker runs, that it has loaded its models, or that it failed.

        Returns what a worker reports that has loaded its models. Raises UserError if no other could start.
        """
        slot = self._pool.loading.pop(ref)
        try:
            info: WorkerId | WorkerInfo = ray.get(ref)
        except RayTaskError as error:
            self._policy.load_raised(cause_of(error), time.monotonic())
            self._pool.remove(slot)
            return None
        except RayError as error:
            self._events.add("worker_failed_to_start", error=shorten(self._state.redact.cut(str(error)), 500))
            running, possible = len(self._pool.started), min(len(self._pool.slots), self._pool.cluster_capacity())
            self._policy.load_died(str(error), is_node_lost(error), running, possible)
            self._pool.discard(slot)
            return None
        if isinstance(info, WorkerId):
            self._pool.begin_load(slot, info)
            return None
        self._policy.load_passed()
        self._load_limit.record(time.monotonic() - slot.load_began)
        self._pool.record_start(slot, info)
        if len(self._pool.started) == 1 and self._state.config.workers.batch == "auto":
            self._state.log(f"workers.batch: auto gives {info.batch:,} images at the first worker")
        self._policy.add_notes(info.notes)
        if info.reads_heic not in (None, reads_heic()) and not any(HEIC_HINT in note for note in self._policy.notes):
            self._policy.add_notes([heic_note(f"workers, the first on {info.id.place}")])
        self._state.totals.add_usage(info.fast_paths)
        for line in {*problem_lines(info.fast_paths)} - self._logged:  # also in the summary, with the counts
            self._logged.add(line)
            self._state.log(line)
        started = {"accelerator": info.accelerator, "batch": info.batch, "device": info.device}
        started["fast_paths"] = [asdict(one) for one in info.fast_paths]
        self._events.add("worker_started", node=info.id.node, pid=info.id.pid, **started)
        return info

    def _end_hung_loads(self) -> None:
        """Kill workers that load their models for too long. Raises UserError if no other could start."""
        limit = self._load_limit
        for slot in self._pool.loads_over(limit.seconds):
            worker = slot.process
            assert worker is not None
            self._pool.remove(slot)
            self._events.add("worker_failed_to_start", node=worker.node, pid=worker.pid, error=f"hung: {limit.origin}")
            self._state.log(
                f"a worker hung while it loaded its models and was killed, {worker} (limit: {limit.origin})"
            )
            self._policy.load_hung(worker, limit.origin, time.monotonic(), len(self._pool.started))

    # -- leases that have ended

    def record_success(self, slot: Slot, result: ShardResult) -> None:
        """Record that a lease returned, and replace the workers that this proves to be at fault."""
        slot.finished, slot.memory = slot.finished + 1, result.memory
        quarantined, workers = result.quarantine_reason is not None, len(self._pool.slots)
        returned = (result.shard, slot.id, quarantined, time.monotonic(), workers, result.layers)
        for decision in self._policy.lease_returned(*returned):
            for other in [other for other in self._pool.started if other.id == decision.worker]:
                self._replace(other, decision.reason)

    def record_failure(self, slot: Slot, shard: PendingShard, error: Exception) -> None:
        """Record that a lease raised, and replace or pause its worker if that is the cause."""
        text = shorten(self._state.redact.cut(error_text(error)), 500)
        now, workers = time.monotonic(), len(self._pool.slots)
        match self._policy.worker_failed(slot.id, shard.name, error, text, now, workers):
            case ReplaceWorker(_, reason):
                self._replace(slot, reason)
            case PauseWorker(worker, until):
                self._state.queue.pause(worker, until)

    def record_death(self, slot: Slot, error: RayError) -> None:
        """Record that the process of a worker has died, or that its node cannot be reached."""
        # A process that died is reported as dead at once. An unreachable one may be on a node that is being lost.
        dead, memory = not isinstance(error, ActorUnavailableError), isinstance(error, OutOfMemoryError)
        worker, reason = self._end(slot), self._state.redact.cut(str(error)).strip().splitlines()[0][:300]
        if memory:
            neighbours = sum(other.id.node == worker.id.node for other in self._pool.started)
            worker = replace(worker, neighbours=neighbours)
        self._policy.worker_died(worker, reason, time.monotonic(), dead, memory)

    def recycle(self, slot: Slot) -> None:
        """End a worker after ``workers.recycle`` shards."""
        worker = self._end(slot)
        node, pid, _ = worker.id
        self._events.add("worker_recycled", node=node, pid=pid, shards=slot.leased, memory=worker.use.last)

    def _replace(self, slot: Slot, reason: str) -> None:
        """Kill a worker that is at fault."""
        failures = self._policy.consecutive_failures[slot.id]
        worker = self._end(slot)
        node, pid, _ = worker.id
        self._events.add("worker_replaced", node=node, pid=pid, failures=failures, reason=reason)
        self._state.log(f"a worker is replaced, {worker.id}: {reason}")
        for shard in worker.shards:
            self._state.queue.put_back(Requeue(shard))
            self._state.totals.retries[WORKER_LOST] += 1
        self._policy.worker_replaced(worker.id, time.monotonic())

    def _end(self, slot: Slot) -> EndedWorker:
        worker = EndedWorker(slot.id, tuple(slot.leases.values()), slot.alone, slot.use)
        self._pool.remove(slot)
        self._policy.forget_worker(worker.id)
        return worker

    # -- drained nodes

    def follow_drains(self, deadlines: Mapping[str, int]) -> None:
        """Give no leases to workers on nodes that Ray drains, and end those that have finished theirs."""
        drains = self._policy.drains
        for node, seconds in drains.update(deadlines, time.time()).items():
            self._report_drain(node, seconds)
        self._pool.drain(drains.nodes)
        for slot in [slot for slot in self._pool.leaving if not slot.leases]:
            node, pid, _ = self._end(slot).id
            self._events.add("worker_drained", node=node, pid=pid, shards=slot.finished)
            if not self._pool.started:
                self._state.log("no worker is left, because the nodes are drained; the run waits for other nodes")

    def _report_drain(self, node: str, seconds: float | None) -> None:
        slots = [slot for slot in self._pool.started if slot.id.node == node]
        shards = [shard.name for slot in slots for shard in slot.leases.values()]
        self._events.add("node_drained", node=node, seconds=seconds, workers=len(slots), shards=shards)
        when = "" if seconds is None else f" and ends in {seconds:.0f} s"
        busy = f"{plural(len(slots), 'worker')}, {plural(len(shards), 'shard')} in flight"
        place = slots[0].id.place if slots else node[:12]
        self._state.log(f"node {place} is drained{when} ({busy}): its workers finish these and get no others")

    # -- pulses and hangs

    def poll(self) -> None:
        """Ask workers for their pulse, in turns, and kill those that have not answered for too long."""
        self._end_hung_loads()
        now = time.monotonic()
        unanswered = self._pool.polls.unanswered(now)
        self._state.silent = [slot for slot, t in unanswered if slot.leases and t > _SILENT_SECONDS]
        silent = {slot: t for slot, t in unanswered if slot.leases and t > silence_limit(slot.pulse, self._limits)}
        for slot, board in self._pool.read_boards(silent).items():
            self._kill_hung(slot, find_silence(silent[slot], slot.pulse, board, self._limits))
        for slot in self._pool.polls.due(now, self._limits.least):
            self.polled[slot.actor.pulse.options(concurrency_group="control").remote()] = slot

    def record_pulse(self, ref: Any) -> None:
        """Record the answer of a worker, and kill the worker if a shard in it makes no progress."""
        slot = self.polled.pop(ref)
        self._pool.polls.answered(slot)
        if slot not in self._pool.started:  # it has ended since
            return
        with contextlib.suppress(RayError):  # a dead worker is detected when its leases fail
            self._pool.record_pulse(slot, ray.get(ref))
            self._limits.record(slot.pulse.slowest)
            shards = {shard.name for shard in slot.leases.values()}
            if hang := find_hang(slot.pulse, shards, self._limits):
                self._kill_hung(slot, hang)

    def _kill_hung(self, slot: Slot, hang: Hang) -> None:
        """Kill a worker in which a shard makes no progress: a thread that hangs cannot be stopped otherwise."""
        self._limits.record_hang(hang)
        self._policy.worker_hung(self._end(slot), hang, time.monotonic())
