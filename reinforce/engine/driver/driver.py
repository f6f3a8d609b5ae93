"""The driver: leases the shards of a plan to workers until every one is finished or quarantined.

Each turn of its loop

1. asks for as many workers as there are shards left, at most `workers.max` (`worker_pool.py`),
2. decides about the shards of workers that have died (`failures.py`),
3. leases shards to workers that can take one (`worker_pool.py`),
4. handles what is ready: started workers, ended leases, pulses of workers. It ends workers that are at fault, dead or
   hung, on nodes that Ray drains, or after `workers.recycle` shards; the pool starts others in their place,
5. reports metrics and `runs/<run>/progress.json`, and writes new events and records.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayError, RayTaskError

from reinforce.dataset.claims import Claims
from reinforce.dataset.index import IndexWriter, set_aside, set_aside_notes
from reinforce.dataset.layers import SAMPLES
from reinforce.dataset.manifest import describe_difference
from reinforce.dataset.runs import (
    PROGRESS_FILE,
    FailingShard,
    LeaseProgress,
    RecordWriter,
    RunProgress,
    SlowShard,
    WorkerProgress,
    read_records,
)
from reinforce.dataset.store import MANIFEST, DamagedFile, Listing, Store
from reinforce.engine.driver.failures import (
    FailurePolicy,
    Hang,
    LoadLimit,
    StallLimits,
    error_text,
    find_hang,
    find_silence,
    ray_ended,
)
from reinforce.engine.driver.faults import (
    DeathVerdict,
    Decision,
    EndedWorker,
    LeaveShard,
    PauseWorker,
    Quarantine,
    ReplaceWorker,
    Requeue,
    Retry,
    RunAlone,
)
from reinforce.engine.driver.worker_pool import ShardQueue, Slot, WorkerPool, describe_workers
from reinforce.engine.messages import PendingShard, ShardResult, StorageFailure, WorkerId, WorkerInfo, shorten
from reinforce.engine.plan.plan import Plan
from reinforce.engine.preflight.check_machines import heic_note
from reinforce.engine.record import (
    WORKER_LOST,
    Ending,
    Events,
    ProgressScreen,
    Rates,
    Recorder,
    RunSummary,
    RunTotals,
    Snapshot,
    ending_of,
    summarize,
    totals_values,
)
from reinforce.errors import StorageError, UserError
from reinforce.processes.cluster import (
    ControlWatch,
    RayletWatch,
    cause_of,
    draining_nodes,
    is_node_lost,
    live_nodes,
    live_resources,
)
from reinforce.processes.imports import HEIC_HINT, reads_heic
from reinforce.processes.signals import Terminated, stop_requests
from reinforce.storage import JOB_VARIABLE
from reinforce.terminal import plural
from schemas import Reason
from teachers.fast_paths.usage import problem_lines
from teachers.redact import Redactor

#: Reasons of retries, in metrics.
_RETRY_REASONS: dict[type, str] = {Retry: "error", Requeue: WORKER_LOST, RunAlone: "suspect"}
_TICK_SECONDS = 0.5
_PAUSE_SECONDS_PER_REF, _MAX_PAUSE_SECONDS = 5e-5, 1.0
_RAY_SECONDS = 2.0  # between two checks of Ray on this machine
_CONTROL_SECONDS = 20.0  # without Ray's control service; Ray itself ends this process after 60
_MANIFEST_SECONDS = 5.0  # between two attempts to write dataset.json
_QUIET_START_SECONDS = 15.0  # after which a slow start is logged
_SILENT_SECONDS = 15.0  # without an answer, after which the progress line names the host
_METRICS_SECONDS = 2.0
_PROGRESS_SECONDS, _PROGRESS_SECONDS_LOCAL = 10.0, 2.0
_SECONDS_PER_WORKER = 0.006  # a driver of 10,000 workers writes 3 MB once a minute
_FAILING = 20  # shards that are named in the progress


class Driver:
    """Runs one plan to its end. Ray must be initialised.

    ``config`` is that of the plan with the workers fitted to the cluster, and ``needed`` are the layers that some shard
    lacks.
    """

    def __init__(self, plan: Plan, store: Store, progress: ProgressScreen, claims: Claims | None = None) -> None:
        self.plan, self.store, self.progress = plan, store, progress
        self.needed = frozenset(name for shard in plan.pending for name in shard.layers)
        models = any(plan.layers[name].loads_model for name in self.needed)
        workers = plan.config.workers.fitted_to(live_resources(), models)
        self.config = plan.config.model_copy(update={"workers": workers})
        self.redact = Redactor(self.config.model_dump(mode="json"))
        self.queue, self.totals = ShardQueue(plan.pending), RunTotals()
        self.policy = FailurePolicy(self.config.failures, plan.layers, plan.shards, plan.quarantined, workers.recycle)
        self.events = Events(store, self.config, self.redact)
        self.pool = WorkerPool(self.config, plan.layers, self.needed)
        self.silent: Sequence[Slot] = ()  # workers with leases that have not answered for some seconds
        self.claims = claims or Claims(store, plan.config, plan.layers)
        self.records, self.index = RecordWriter(store, self.events.run), IndexWriter(store, plan.layers)
        self.stall_limits = StallLimits(self.config.failures)
        self.load_limit = LoadLimit(workers.start_timeout)
        self.polled: dict[Any, Slot] = {}  # requests for pulses that are under way
        self.processes: set[WorkerId] = set()  # of all workers of the run
        self.logged: set[str] = set()  # fallbacks of models
        self.recorder, self.began = Recorder(), time.time()
        self.metrics_due = self.progress_due = 0.0
        self.raylet, self.ray_checked = RayletWatch(), time.monotonic()
        self.control, self.control_lost = ControlWatch(), 0.0
        self.manifest_written = self.wait_logged = False
        self.notes_logged = 0
        self.committed: dict[str, set[str]] = {}  # shards of which this run has written a file, by layer
        self.loaded: Mapping[tuple[str, str], Mapping[str, Any]] | None = None  # what the models of a worker report
        self.manifest_due = self.manifest_failed = 0.0
        self.least = min(self.config.workers.min, len(plan.pending))  # workers; there are no more than shards

    def run(self) -> RunSummary:
        """Run the plan. Raises UserError, also after it has recorded how the run ended."""
        start = time.monotonic()
        self.events.add("start", shards=len(self.plan.pending), layers=sorted(self.needed), ray=ray.__version__)
        pending = len(self.plan.pending)
        workers = describe_workers(self.config.workers, pending, self.pool.limit(), live_resources())
        for line in (workers, *self.plan.notes):
            self.log(line)
        ending = Ending()
        try:
            for file in self.plan.recomputed:
                path = set_aside(self.store, file.layer, file.shard)
                self.events.add("set_aside", shard=file.shard, layer=file.layer, reason=file.reason, path=path)
                self.log(f"{file.line()}; it is set aside as {path} and computed again")
                self.totals.set_aside.append(file.line())
            with stop_requests() as received:
                self._loop(start, received)
            self._check_written()
        except BaseException as error:
            ending = ending_of(error, self.redact.cut)
            raise
        finally:
            seconds, alive = time.monotonic() - start, self.pool.alive(time.monotonic())
            quarantined = self.policy.quarantined_shards
            summary = summarize(self.events.run, self.plan, self.totals, quarantined, seconds, alive, ending)
            summary = replace(summary, notes=[*self.policy.notes, *problem_lines(self.totals.fast_paths)])
            self._report(last=True)
            self.pool.close()
            for worker in self.processes:
                self.store.remove_temporary(worker.host, worker.pid)
            self.raylet.close()
            self.control.close()
            with contextlib.suppress(StorageError):  # a cache
                self.index.flush()
            with contextlib.suppress(StorageError, FileNotFoundError):  # the run itself does not need the records
                # Compare the keys of this run's shards with those of earlier runs.
                self.records.flush()
                shards = {*self.plan.committed, *self.records.shards}
                found = read_records(self.store).keys.repeated(shards)
                lines = [*set_aside_notes(self.totals.set_aside), *found.lines(len(shards), self.store.url)]
                summary = replace(summary, repeated_keys=found.keys, notes=[*summary.notes, *lines])
            with contextlib.nullcontext() if ending == Ending() else contextlib.suppress(UserError):
                self.events.finish(asdict(summary))
        return summary

    def log(self, text: str) -> None:
        """Print a line for the user, without secrets."""
        self.progress.log(self.redact(text))

    def snapshot(self, now: float) -> Snapshot:
        silent = Counter[str]()  # shards that wait for a host which does not answer, and may be lost, by its name
        for slot in self.silent:
            if slot in self.pool.started:
                silent[slot.id.place] += len(slot.leases)
        for death in self.policy.deaths:  # not known to be lost yet
            silent[death.worker.id.place] += len(death.worker.shards)
        return Snapshot(
            shards_done=len(self.totals.finished),
            shards=len(self.plan.pending),
            samples=max(self.totals.samples, self.pool.samples),
            samples_done=self.totals.samples,
            busy=self.pool.busy,
            alive=self.pool.alive(now),
            workers=len(self.pool.started),
            quarantined_shards=len(self.policy.quarantined),
            refused_rows=sum(self.totals.refused.values()),
            silent=silent,
            starting=len(self.pool.loading),
        )

    # the loop

    def _loop(self, start: float, received: list[int]) -> None:
        while remaining := len(self.queue) + len(self.pool.leases) + self.policy.undecided_shards:
            if received:
                raise Terminated if received[0] == signal.SIGTERM else KeyboardInterrupt
            if not self._check_ray(remaining):
                time.sleep(_TICK_SECONDS)
                continue
            self.pool.grow(remaining)
            self.pool.shrink(remaining, self.policy.consecutive_failures)
            for verdict in self.policy.judge_deaths(time.monotonic(), live_nodes):
                self._handle_death(verdict)
            # Log the policy's notes and avoid the nodes that it names. Raise UserError if no shard can be finished.
            for note in self.policy.notes[self.notes_logged :]:
                self.events.add("note", text=note)
                self.log(note)
            self.notes_logged = len(self.policy.notes)
            self.pool.avoid(self.policy.faults.avoided(time.monotonic()))
            self.policy.memory.check(len(self.pool.slots))
            if self.manifest_written and time.monotonic() >= self.policy.outages.held_until:
                slots = self.pool.started if self.queue.needs_all_slots else self.pool.free
                failing = self.policy.consecutive_failures.keys()
                self.queue.hand_out(slots, self.pool.lease, time.monotonic(), failing)
            for ref in _ready([*self.pool.loading, *self.pool.leases, *self.polled]):
                if ref in self.polled:
                    self.record_pulse(ref)
                elif ref in self.pool.loading:
                    if (info := self.finish_start(ref)) is not None:
                        self._check_models(info)
                        self.loaded = info.models
                elif ref in self.pool.leases:  # not if the other lease of its worker has failed just now
                    self._handle_lease_end(ref)
            self.poll()
            if not self.manifest_written:
                self._write_manifest()
                self._check_start(time.monotonic() - start)
            self.progress.show(self.snapshot(time.monotonic()))
            self._report()
            self.events.flush_when_due()
            self.records.flush_when_due()
            self.index.flush_when_due()
        self.policy.outages.check()

    def _check_ray(self, remaining: int) -> bool:
        """Raise RayEnded if Ray has ended. Look for nodes that Ray drains.

        Returns whether Ray's control service answers. It may come back on another head node, or after a restart.
        """
        now, done = time.monotonic(), len(self.totals.finished)
        if not self.control.is_alive():
            self.control_lost = self.control_lost or now
            if now - self.control_lost > _CONTROL_SECONDS:
                raise ray_ended(
                    "Ray's control service ended before the run did: its process (gcs_server)", done, remaining
                )
            return False
        self.control_lost = 0.0
        if now - self.ray_checked >= _RAY_SECONDS:
            self.ray_checked = now
            if not self.raylet.is_alive():
                raise ray_ended("Ray ended on this machine before the run did: its process (raylet)", done, remaining)
            self.follow_drains(draining_nodes())
        return True

    def _check_start(self, waited: float) -> None:
        """Log a slow start once. Raise UserError after ``workers.start_timeout``."""
        if len(self.pool.started) >= self.least:  # dataset.json cannot be written
            return
        if waited > _QUIET_START_SECONDS and not self.wait_logged:
            self.wait_logged = True
            self.log(self.pool.resource_error() or "waiting for workers to load their models ...")
        if waited > self.config.workers.start_timeout:
            cause = "see the workers' logs"
            if slot := next(iter(self.pool.loads), None):  # the one that has loaded its models for the longest time
                cause = f"{slot.process} has loaded its models for {time.monotonic() - slot.load_began:.0f} s"
            cause = self.pool.resource_error() or cause
            raise UserError(
                f"{len(self.pool.started)} of {plural(self.least, 'worker')} (workers.min) started in {waited:.0f} s "
                f"(workers.start_timeout): {cause}"
            )

    def _write_manifest(self) -> None:
        """Write dataset.json once the ``least`` workers have started; while the storage fails, every few seconds."""
        now = time.monotonic()
        if self.loaded is None or len(self.pool.started) < self.least or now < self.manifest_due:
            return
        try:
            self.claims.publish(self.loaded, self.needed)
        except StorageError as error:
            self.manifest_failed = self.manifest_failed or now
            if now - self.manifest_failed >= self.config.failures.outage_seconds:
                raise
            self.log(f"{error} It is tried again.")
            self.store.refresh()
            self.manifest_due = time.monotonic() + _MANIFEST_SECONDS
        else:
            self.manifest_written = True

    def _check_written(self) -> None:
        """List the layers once more, and read dataset.json: a storage may answer a put and not write the object, and
        files may be removed while the run continues.

        The shards of such files are postponed, dataset.json is written again. A listing may lag, so files that it lacks
        are asked for by name.
        """
        with contextlib.suppress(StorageError):  # the next run lists them
            if self.loaded is not None and not self.claims.is_published:
                self.log(f"{self.store.path(MANIFEST)} is not there any more, and is written again")
                self.claims.publish(self.loaded, self.needed)
            listings = self.store.listings({**self.committed, SAMPLES: ()}, self.plan.committed)
            set_aside = {*self.totals.postponed}
            for layer, listing in listings.items():
                written = Listing.of((name, 0) for name in self.committed.get(layer, ()))
                before = [written, self.plan.committed] if layer == SAMPLES else [written]
                unlisted = (name for one in before for name in one.without(listing.names))
                lost = {name for name in unlisted if self.store.is_missing(layer, name)} - set_aside
                if lost:
                    files = "1 file is" if len(lost) == 1 else f"{len(lost):,} files are"
                    self.log(f"{layer}: {files} not there any more, such as {min(lost)}.parquet; computed again")
                    self.totals.finished -= lost
                    self.totals.postponed |= lost

    # leases that have ended

    def _handle_lease_end(self, ref: Any) -> None:
        slot = self.pool.leases[ref]
        try:
            result: ShardResult = ray.get(ref)
        except RayTaskError as raised:
            shard, error = self.pool.end_lease(ref), cause_of(raised)
            if isinstance(error, StorageFailure):
                self.store.refresh()
            if not isinstance(error, UserError):
                self.record_failure(slot, shard, error)
            decision = self.policy.lease_raised(shard, error, time.monotonic())
            text = self.redact.cut(error_text(error))
            self.events.add("shard_raised", shard=shard.name, attempt=decision.attempt, error=shorten(text, 2000))
            of = "" if isinstance(error, StorageFailure) else f" of {self.config.failures.attempts}"
            self.log(f"{shard.name}: attempt {decision.attempt}{of} raised {shorten(text, 1000)}")
            self._carry_out(decision)
        except RayError as lost:
            self.record_death(slot, lost)
        else:
            shard, reason, retry = self.pool.end_lease(ref), result.quarantine_reason, None
            if reason is not None:  # a shard that could not be read is tried on another node
                nodes = len({slot.id.node for slot in self.pool.started})
                retry = self.policy.read_failed(shard, reason, slot.id, nodes, time.monotonic())
            if retry is None:
                self.record_success(slot, result)
                self._handle_result(result)
            else:
                self.store.forget_quarantine(SAMPLES, shard.name)
                self.log(f"{shard.name} is tried on another node: {reason} on {slot.id.place}")
                self._carry_out(retry)
        if slot.exhausted and not slot.leases and slot in self.pool.started:
            # End a worker after ``workers.recycle`` shards.
            worker = self._end(slot)
            node, pid, _ = worker.id
            self.events.add("worker_recycled", node=node, pid=pid, shards=slot.leased, memory=worker.use.last)

    def _handle_result(self, result: ShardResult) -> None:
        self.totals.add(result)
        self.events.add("shard", **result.event())
        self.index.add(result.shard, result.files)
        for layer in result.files:
            self.committed.setdefault(layer, set()).add(result.shard)
        for layer, reason in result.set_aside.items():
            text = DamagedFile(layer, result.shard, reason).line()
            self.log(f"{text}; it is set aside, and the shard is finished after the others")
            self.totals.set_aside.append(text)
        self.policy.add_notes(result.notes)
        if result.record:
            self.records.add(result.record)
        if result.source_note:
            self.log(f"{result.shard}: {result.source_note}")
        if count := result.refused.get(Reason.LABELS_UNREAD.value):
            more = f" (and {plural(count - 1, 'more file')})" if count > 1 else ""
            self.log(f"{result.shard}: {result.examples[Reason.LABELS_UNREAD.value]}{more}; its rows are null")
            self.policy.quarantined.add(result.shard)
        if result.quarantine_reason:
            detail = result.examples.get(result.quarantine_reason, "")
            self.log(f"{result.shard} is quarantined: {result.quarantine_reason}: {detail}")
            self.policy.shard_quarantined(result.shard, f"{result.quarantine_reason}: {detail}")

    def record_success(self, slot: Slot, result: ShardResult) -> None:
        """Record that a lease returned, and replace the workers that this proves to be at fault."""
        slot.finished, slot.memory = slot.finished + 1, result.memory
        quarantined, workers = result.quarantine_reason is not None, len(self.pool.slots)
        returned = (result.shard, slot.id, quarantined, time.monotonic(), workers, result.layers)
        for decision in self.policy.lease_returned(*returned):
            for other in [other for other in self.pool.started if other.id == decision.worker]:
                self._replace(other, decision.reason)

    def record_failure(self, slot: Slot, shard: PendingShard, error: Exception) -> None:
        """Record that a lease raised, and replace or pause its worker if that is the cause."""
        text = shorten(self.redact.cut(error_text(error)), 500)
        now, workers = time.monotonic(), len(self.pool.slots)
        match self.policy.worker_failed(slot.id, shard.name, error, text, now, workers):
            case ReplaceWorker(_, reason):
                self._replace(slot, reason)
            case PauseWorker(worker, until):
                self.queue.paused[worker] = until

    def record_death(self, slot: Slot, error: RayError) -> None:
        """Record that the process of a worker has died, or that its node cannot be reached."""
        # A process that died is reported as dead at once. An unreachable one may be on a node that is being lost.
        dead, memory = not isinstance(error, ActorUnavailableError), isinstance(error, OutOfMemoryError)
        worker, reason = self._end(slot), self.redact.cut(str(error)).strip().splitlines()[0][:300]
        if memory:
            neighbours = sum(other.id.node == worker.id.node for other in self.pool.started)
            worker = replace(worker, neighbours=neighbours)
        self.policy.worker_died(worker, reason, time.monotonic(), dead, memory)

    def _carry_out(self, decision: Decision) -> None:
        if (reason := _RETRY_REASONS.get(type(decision))) is not None:
            self.totals.retries[reason] += 1
        name = decision.shard.name
        if isinstance(decision, Quarantine):
            layer, kind, detail = decision.layer, decision.reason, shorten(self.redact.cut(decision.detail), 2000)
            self.store.quarantine(layer, name, [(None, kind, detail)])
            self.events.add("shard_quarantined", shard=name, layer=layer, reason=kind.value, detail=detail)
            cause = f"{kind.value}: {shorten(detail, 300)}"
            self.log(f"{name} is quarantined in {layer}: {cause}")
            self.totals.add_quarantined(name, layer, kind.value, detail)
            self.policy.shard_quarantined(name, cause)
            if decision.rest is None:
                self.totals.finished.add(name)
        elif isinstance(decision, LeaveShard):
            self.log(f"{name} is left for the next run, because the storage has failed for too long")
        self.queue.put_back(decision, self.policy.faults.tried(name))

    # starts of workers

    def _check_models(self, info: WorkerInfo) -> None:
        """Raise UserError if the numbers of a worker's models mean something else than those of the worker before."""
        for name in self.needed:
            layer = self.plan.layers[name]
            before = (self.loaded or {}).get((str(layer.kind.section), str(layer.model)), {})
            if reason := describe_difference(layer, before, info.models):
                raise UserError(
                    f"{reason}, at an earlier worker. The models of {info.id.place} read other files: give every host "
                    "the same ones, and run again."
                )

    def finish_start(self, ref: Any) -> WorkerInfo | None:
        """Record that the process of a worker runs, that it has loaded its models, or that it failed.

        Returns what a worker reports that has loaded its models. Raises UserError if no other could start.
        """
        slot = self.pool.loading.pop(ref)
        try:
            info: WorkerId | WorkerInfo = ray.get(ref)
        except RayTaskError as error:
            self.policy.load_raised(cause_of(error), time.monotonic())
            self.pool.remove(slot)
            return None
        except RayError as error:
            self.events.add("worker_failed_to_start", error=shorten(self.redact.cut(str(error)), 500))
            running, possible = len(self.pool.started), min(len(self.pool.slots), self.pool.cluster_capacity())
            self.policy.load_died(str(error), is_node_lost(error), running, possible)
            self.pool.discard(slot)
            return None
        if isinstance(info, WorkerId):
            self.processes.add(info)
            self.pool.begin_load(slot, info)
            return None
        self.policy.load_passed()
        self.load_limit.slowest = max(self.load_limit.slowest, time.monotonic() - slot.load_began)
        self.pool.record_start(slot, info)
        if len(self.pool.started) == 1 and self.config.workers.batch == "auto":
            self.log(f"workers.batch: auto gives {info.batch:,} images at the first worker")
        self.policy.add_notes(info.notes)
        if info.reads_heic not in (None, reads_heic()) and not any(HEIC_HINT in note for note in self.policy.notes):
            self.policy.add_notes([heic_note(f"workers, the first on {info.id.place}")])
        self.totals.add_usage(info.fast_paths)
        for line in {*problem_lines(info.fast_paths)} - self.logged:  # also in the summary, with the counts
            self.logged.add(line)
            self.log(line)
        started = {"accelerator": info.accelerator, "batch": info.batch, "device": info.device}
        started["fast_paths"] = [asdict(one) for one in info.fast_paths]
        self.events.add("worker_started", node=info.id.node, pid=info.id.pid, **started)
        return info

    # ends of workers

    def _replace(self, slot: Slot, reason: str) -> None:
        """Kill a worker that is at fault."""
        failures = self.policy.consecutive_failures[slot.id]
        worker = self._end(slot)
        node, pid, _ = worker.id
        self.events.add("worker_replaced", node=node, pid=pid, failures=failures, reason=reason)
        self.log(f"a worker is replaced, {worker.id}: {reason}")
        for shard in worker.shards:
            self.queue.put_back(Requeue(shard))
            self.totals.retries[WORKER_LOST] += 1
        self.policy.faults.record_replacement(worker.id, time.monotonic())

    def _end(self, slot: Slot) -> EndedWorker:
        worker = EndedWorker(slot.id, tuple(slot.leases.values()), slot.alone, slot.use)
        self.pool.remove(slot)
        self.policy.forget_worker(worker.id)
        return worker

    def _handle_death(self, verdict: DeathVerdict) -> None:
        death = verdict.death
        names = [shard.name for shard in death.worker.shards]
        event = "worker_hung" if death.hung else "worker_died"
        self.events.add(event, pid=death.worker.id.pid, shards=names, node_lost=verdict.node_lost, error=death.error)
        reason = "its node was lost" if verdict.node_lost else death.error
        what = "hung and was killed" if death.hung else "died"
        self.log(f"a worker {what} ({reason}); in flight: {', '.join(names)}")
        for decision in verdict.decisions:
            self._carry_out(decision)

    # drained nodes

    def follow_drains(self, deadlines: Mapping[str, int]) -> None:
        """Give no leases to workers on nodes that Ray drains, and end those that have finished theirs."""
        for node, seconds in self.policy.record_drains(deadlines, time.time()).items():
            slots = [slot for slot in self.pool.started if slot.id.node == node]
            shards = [shard.name for slot in slots for shard in slot.leases.values()]
            self.events.add("node_drained", node=node, seconds=seconds, workers=len(slots), shards=shards)
            when = "" if seconds is None else f" and ends in {seconds:.0f} s"
            busy = f"{plural(len(slots), 'worker')}, {plural(len(shards), 'shard')} in flight"
            place = slots[0].id.place if slots else node[:12]
            self.log(f"node {place} is drained{when} ({busy}): its workers finish these and get no others")
        self.pool.drain(self.policy.drained)
        for slot in [slot for slot in self.pool.leaving if not slot.leases]:
            node, pid, _ = self._end(slot).id
            self.events.add("worker_drained", node=node, pid=pid, shards=slot.finished)
            if not self.pool.started:
                self.log("no worker is left, because the nodes are drained; the run waits for other nodes")

    # pulses and hangs

    def poll(self) -> None:
        """Ask workers for their pulse, in turns. Kill those that have not answered, or load their models, for too long.

        Raises UserError if no worker could start.
        """
        limit = self.load_limit
        since = time.monotonic() - limit.seconds
        for slot in [*itertools.takewhile(lambda slot: slot.load_began < since, self.pool.loads)]:
            worker = slot.process
            assert worker is not None
            self.pool.remove(slot)
            self.events.add("worker_failed_to_start", node=worker.node, pid=worker.pid, error=f"hung: {limit.origin}")
            self.log(f"a worker hung while it loaded its models and was killed, {worker} (limit: {limit.origin})")
            self.policy.load_hung(worker, limit.origin, time.monotonic(), len(self.pool.started))
        now = time.monotonic()
        unanswered = self.pool.polls.unanswered(now)
        self.silent = [slot for slot, t in unanswered if slot.leases and t > _SILENT_SECONDS]
        for slot, seconds in unanswered:
            if slot.leases and (hang := find_silence(seconds, slot.pulse, self.stall_limits)):
                self._end_hung(slot, hang)
        for slot in self.pool.polls.due(now, self.stall_limits.least):
            self.polled[slot.actor.pulse.options(concurrency_group="control").remote()] = slot

    def record_pulse(self, ref: Any) -> None:
        """Record the answer of a worker, and kill the worker if a shard in it makes no progress."""
        slot = self.polled.pop(ref)
        self.pool.polls.answered(slot)
        if slot not in self.pool.started:  # it has ended since
            return
        with contextlib.suppress(RayError):  # a dead worker is detected when its leases fail
            self.pool.record_pulse(slot, ray.get(ref))
            self.stall_limits.record(slot.pulse.slowest)
            shards = {shard.name for shard in slot.leases.values()}
            if hang := find_hang(slot.pulse, shards, self.stall_limits):
                self._end_hung(slot, hang)

    def _end_hung(self, slot: Slot, hang: Hang) -> None:
        """Kill a worker in which a shard makes no progress: a thread that hangs cannot be stopped otherwise."""
        self.stall_limits.hung |= hang.stages
        self.policy.worker_hung(self._end(slot), hang, time.monotonic())

    # reports

    def _report(self, last: bool = False) -> None:
        """Record metrics and write the progress if they are due, or at the end of the run."""
        now = time.monotonic()
        if not (last or now >= self.metrics_due):
            return
        self.metrics_due = now + _METRICS_SECONDS
        snapshot = self.snapshot(now)
        rates = self.progress.rates(snapshot)
        eta = 0.0 if last else rates.eta
        self.recorder.record(
            {
                **totals_values(self.totals, self.events.digest.counts),
                "reinforce_accelerator_busy_seconds_total": max(snapshot.busy, self.totals.busy),
                "reinforce_worker_seconds_total": snapshot.alive,
                "reinforce_workers": 0 if last else snapshot.workers,
                "reinforce_waiting_shards": len(self.queue),
                "reinforce_leased_shards": len(self.pool.leases),
                "reinforce_eta_seconds": math.nan if eta is None else eta,  # Ray exports no NaN
            }
        )
        if last or now >= self.progress_due:
            least = _PROGRESS_SECONDS_LOCAL if self.store.local else _PROGRESS_SECONDS
            interval = least + len(self.pool.slots) * _SECONDS_PER_WORKER
            self.progress_due = now + interval
            progress = self._run_progress(snapshot, rates, interval)
            text = self.redact(json.dumps(progress.model_dump(mode="json"), ensure_ascii=False))
            with contextlib.suppress(UserError):  # the run itself does not need it
                self.store.write_bytes(text.encode("utf-8", "replace"), "runs", progress.run, PROGRESS_FILE)

    def _run_progress(self, snapshot: Snapshot, rates: Rates, interval: float) -> RunProgress:
        digest = self.events.digest
        failing = list(digest.failing.items())[-_FAILING:]
        return RunProgress(
            run=self.events.run,
            time=time.time(),
            interval=interval,
            started=self.began,
            host=socket.gethostname(),
            pid=os.getpid(),
            shards=snapshot.shards,
            shards_done=snapshot.shards_done,
            samples=snapshot.samples,
            samples_per_second=rates.samples_per_second,
            busy_share=rates.busy_share,
            eta_seconds=rates.eta,
            waiting_shards=len(self.queue),
            starting_workers=len(self.pool.loading),
            quarantined_shards=snapshot.quarantined_shards,
            quarantined=self.totals.refused + self.totals.quarantined,
            workers=[worker_progress(slot) for slot in self.pool.started],
            slowest=[SlowShard(shard=name, seconds=s, stage=stage) for s, name, stage in sorted(digest.slowest)[::-1]],
            failing=[FailingShard(shard=name, failures=count, error=error) for name, (count, error) in failing],
            failing_shards=len(digest.failing),
            fast_paths=self.totals.fast_paths,
            job=job_id(),
        )


def _ready(refs: list[Any]) -> list[Any]:
    """The refs that are ready; waits up to ``_TICK_SECONDS`` for the first.

    Ray needs 0.6 us of CPU for each ref. So with 20,000 refs it is asked once a second; a worker whose shard has ended
    continues with its other one.
    """
    if not refs:
        time.sleep(_TICK_SECONDS)
        return []
    time.sleep(min(_MAX_PAUSE_SECONDS, len(refs) * _PAUSE_SECONDS_PER_REF))
    ready: list[Any] = ray.wait(refs, num_returns=len(refs), timeout=0)[0]
    return ready or ray.wait(refs, num_returns=1, timeout=_TICK_SECONDS)[0]


def worker_progress(slot: Slot) -> WorkerProgress:
    """A started worker with its shards, and the stage of each at its last pulse."""
    assert slot.info is not None
    now, clock = time.time(), time.monotonic()
    seen = {lease.shard: lease for lease in slot.pulse.leases}
    shards = []
    for name, leased_at in slot.leased_at.items():
        found: dict[str, Any] = {"shard": name, "leased": round(now - (clock - leased_at), 3)}
        if lease := seen.get(name):
            since = now - (clock - slot.pulse_at) - lease.seconds
            found |= {"stage": lease.stage, "what": lease.what, "since": round(since, 3)}
        shards.append(LeaseProgress(**found))
    return WorkerProgress(
        worker=slot.index,
        host=slot.id.place,
        pid=slot.id.pid,
        log=slot.info.log,
        samples=slot.pulse.samples,
        shards=shards,
    )


def job_id() -> str:
    """The id by which `ray job logs` finds this process, or ''."""
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        found = json.loads(os.environ.get(JOB_VARIABLE, "{}")).get("metadata", {}).get("job_submission_id")
        return found if isinstance(found, str) else ""
    return ""
