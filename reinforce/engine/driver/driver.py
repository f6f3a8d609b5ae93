"""The driver: leases the shards of a plan to workers until every one is finished or quarantined.

Each turn of its loop

1. asks for as many workers as there are shards left, at most `workers.max` (`worker_pool.py`),
2. decides about the shards of workers that have died (`policy/failures.py`),
3. leases shards to workers that can take one (`shard_queue.py`),
4. handles what is ready: started workers, ended leases, pulses of workers (`worker_lifecycle.py`),
5. reports metrics and progress (`reporter.py`), and writes new events and records.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from reinforce.cluster import ControlWatch, RayletWatch, cause_of, draining_nodes, live_nodes
from reinforce.dataset.files.damage import set_aside, set_aside_notes
from reinforce.dataset.files.index import IndexWriter
from reinforce.dataset.files.listing import Listing
from reinforce.dataset.files.store import MANIFEST, DamagedFile, Store
from reinforce.dataset.layers import SAMPLES
from reinforce.dataset.manifest.claims import Claims
from reinforce.dataset.manifest.manifest import describe_difference
from reinforce.dataset.runs.shard_records import RecordWriter, read_records
from reinforce.engine.driver.policy.decisions import (
    DeathVerdict,
    Decision,
    LeaveShard,
    Quarantine,
    Requeue,
    Retry,
    RunAlone,
)
from reinforce.engine.driver.policy.failures import error_text, ray_ended
from reinforce.engine.driver.reporter import Reporter
from reinforce.engine.driver.state import RunState
from reinforce.engine.driver.worker_lifecycle import WorkerLifecycle
from reinforce.engine.driver.worker_pool import Slot
from reinforce.engine.messages.results import ShardResult, StorageFailure, WorkerInfo
from reinforce.engine.messages.task import PendingShard
from reinforce.engine.messages.tracebacks import shorten
from reinforce.engine.plan.plan import Plan
from reinforce.engine.record.progress import Progress
from reinforce.engine.record.summary import WORKER_LOST, Ending, RunSummary, ending_of, summarize
from reinforce.errors import StorageError, UserError
from reinforce.processes.signals import stop_requests
from reinforce.terminal import plural
from schemas import Reason
from teachers.fast_paths.usage import problem_lines

#: Reasons of retries, in metrics.
_RETRY_REASONS: dict[type, str] = {Retry: "error", Requeue: WORKER_LOST, RunAlone: "suspect"}
_TICK_SECONDS = 0.5
_PAUSE_SECONDS_PER_REF, _MAX_PAUSE_SECONDS = 5e-5, 1.0
_RAY_SECONDS = 2.0  # between two checks of Ray on this machine
_CONTROL_SECONDS = 20.0  # without Ray's control service; Ray itself ends this process after 60
_MANIFEST_SECONDS = 5.0  # between two attempts to write dataset.json
_QUIET_START_SECONDS = 15.0  # after which a slow start is logged


class Driver(RunState):
    """Runs one plan to its end. Ray must be initialised."""

    def __init__(self, plan: Plan, store: Store, progress: Progress, claims: Claims | None = None) -> None:
        super().__init__(plan, store, progress)
        self.claims = claims or Claims(store, plan.config, plan.layers)
        self.records, self.index = RecordWriter(store, self.events.run), IndexWriter(store, plan.layers)
        self.lifecycle, self.reporter = WorkerLifecycle(self), Reporter(self)
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
        for line in (self.pool.describe(len(self.plan.pending)), *self.plan.notes):
            self.log(line)
        ending = Ending()
        try:
            self._set_damaged_aside()
            with stop_requests() as stop:
                self._loop(start, stop)
            self._check_written()
        except BaseException as error:
            ending = ending_of(error, self.redact.cut)
            raise
        finally:
            seconds, alive = time.monotonic() - start, self.pool.alive(time.monotonic())
            quarantined = self.policy.quarantined_shards
            summary = summarize(self.events.run, self.plan, self.totals, quarantined, seconds, alive, ending)
            summary = replace(summary, notes=self._notes())
            self.reporter.report(last=True)
            self.pool.close()
            self.raylet.close()
            self.control.close()
            with contextlib.suppress(StorageError):  # a cache
                self.index.flush()
            with contextlib.suppress(StorageError, FileNotFoundError):  # the run itself does not need the records
                summary = replace(summary, **self._compare_keys())
            with contextlib.nullcontext() if ending == Ending() else contextlib.suppress(UserError):
                self.events.finish(asdict(summary))
        return summary

    def _set_damaged_aside(self) -> None:
        """Move damaged files away before their shards are computed again."""
        for file in self.plan.recomputed:
            path = set_aside(self.store, file.layer, file.shard)
            self.events.add("set_aside", shard=file.shard, layer=file.layer, reason=file.reason, path=path)
            self.log(f"{file.line()}; it is set aside as {path} and computed again")
            self.totals.set_aside.append(file.line())

    def _compare_keys(self) -> dict[str, Any]:
        """Write the records, and compare the keys of this run's shards with those of earlier runs."""
        self.records.flush()
        shards = {*self.plan.committed, *self.records.shards}
        found = read_records(self.store).keys.repeated(shards)
        notes = [*self._notes(), *set_aside_notes(self.totals.set_aside), *found.lines(len(shards), self.store.url)]
        return {"repeated_keys": found.keys, "notes": notes}

    def _notes(self) -> list[str]:
        """The policy's notes, and fast paths that did not run as expected."""
        return [*self.policy.notes, *problem_lines(self.totals.fast_paths)]

    # -- the loop

    def _loop(self, start: float, stop: threading.Event) -> None:
        while remaining := len(self.queue) + len(self.pool.leases) + self.policy.undecided_shards:
            if stop.is_set():
                raise KeyboardInterrupt
            if not self._check_ray(remaining):
                time.sleep(_TICK_SECONDS)
                continue
            self.pool.grow(remaining)
            self.pool.shrink(remaining, self.policy.consecutive_failures)
            for verdict in self.policy.judge_deaths(time.monotonic(), live_nodes):
                self._handle_death(verdict)
            self._report_workers()
            if self.manifest_written and time.monotonic() >= self.policy.outages.held_until:
                slots = self.pool.started if self.queue.needs_all_slots else self.pool.free
                failing = self.policy.consecutive_failures.keys()
                self.queue.hand_out(slots, self.pool.lease, time.monotonic(), failing)
            for ref in _ready([*self.pool.loading, *self.pool.leases, *self.lifecycle.polled]):
                if ref in self.lifecycle.polled:
                    self.lifecycle.record_pulse(ref)
                elif ref in self.pool.loading:
                    if (info := self.lifecycle.finish_start(ref)) is not None:
                        self._check_models(info)
                        self.loaded = info.models
                elif ref in self.pool.leases:  # not if the other lease of its worker has failed just now
                    self._handle_lease_end(ref)
            self.lifecycle.poll()
            if not self.manifest_written:
                self._write_manifest()
                self._check_start(time.monotonic() - start)
            self.progress.show(self.snapshot(time.monotonic()))
            self.reporter.report()
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
            self.lifecycle.follow_drains(draining_nodes())
        return True

    def _report_workers(self) -> None:
        """Log the policy's notes and avoid the nodes that it names. Raise UserError if no shard can be finished."""
        for note in self.policy.notes[self.notes_logged :]:
            self.events.add("note", text=note)
            self.log(note)
        self.notes_logged = len(self.policy.notes)
        self.pool.avoid(self.policy.faults.avoided(time.monotonic()))
        self.policy.memory.check(len(self.pool.slots))

    def _check_start(self, waited: float) -> None:
        """Log a slow start once. Raise UserError after ``workers.start_timeout``."""
        if len(self.pool.started) >= self.least:  # dataset.json cannot be written
            return
        if waited > _QUIET_START_SECONDS and not self.wait_logged:
            self.wait_logged = True
            self.log(self.pool.resource_error() or "waiting for workers to load their models ...")
        if waited > self.config.workers.start_timeout:
            cause = self.pool.resource_error() or self.pool.describe_loads() or "see the workers' logs"
            raise UserError(
                f"{len(self.pool.started)} of {plural(self.least, 'worker')} (workers.min) started in {waited:.0f} s "
                f"(workers.start_timeout): {cause}"
            )

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
                lost = self._lost(layer, listing) - set_aside
                if lost:
                    files = "1 file is" if len(lost) == 1 else f"{len(lost):,} files are"
                    self.log(f"{layer}: {files} not there any more, such as {min(lost)}.parquet; computed again")
                    self.totals.finished -= lost
                    self.totals.postponed |= lost

    def _lost(self, layer: str, listing: Listing) -> set[str]:
        """The shards of a layer whose files were there, or were written by this run, and are not in its ``listing``."""
        written = Listing.of((name, 0) for name in self.committed.get(layer, ()))
        before = [written, self.plan.committed] if layer == SAMPLES else [written]
        names = (name for one in before for name in one.without(listing.names))
        return {name for name in names if self.store.is_missing(layer, name)}

    # -- leases that have ended

    def _handle_lease_end(self, ref: Any) -> None:
        slot = self.pool.leases[ref]
        try:
            result: ShardResult = ray.get(ref)
        except RayTaskError as error:
            self._handle_error(slot, self.pool.end_lease(ref), cause_of(error))
        except RayError as error:
            self.lifecycle.record_death(slot, error)
        else:
            shard = self.pool.end_lease(ref)
            if not (result.quarantine_reason and self._try_elsewhere(slot, shard, result.quarantine_reason)):
                self.lifecycle.record_success(slot, result)
                self._handle_result(result)
        if slot.exhausted and not slot.leases and slot in self.pool.started:
            self.lifecycle.recycle(slot)

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

    def _try_elsewhere(self, slot: Slot, shard: PendingShard, reason: str) -> bool:
        """Queue a shard that could not be read for another node; False if it is not tried again."""
        nodes = len({slot.id.node for slot in self.pool.started})
        decision = self.policy.read_failed(shard, reason, slot.id, nodes, time.monotonic())
        if decision is None:
            return False
        self.store.forget_quarantine(SAMPLES, shard.name)
        self.log(f"{shard.name} is tried on another node: {reason} on {slot.id.place}")
        self._carry_out(decision)
        return True

    def _handle_error(self, slot: Slot, shard: PendingShard, error: Exception) -> None:
        if isinstance(error, StorageFailure):
            self.store.refresh()
        if not isinstance(error, UserError):
            self.lifecycle.record_failure(slot, shard, error)
        decision = self.policy.lease_raised(shard, error, time.monotonic())
        text = self.redact.cut(error_text(error))
        self.events.add("shard_raised", shard=shard.name, attempt=decision.attempt, error=shorten(text, 2000))
        shown = shorten(text, 1000)
        of = "" if isinstance(error, StorageFailure) else f" of {self.config.failures.attempts}"
        self.log(f"{shard.name}: attempt {decision.attempt}{of} raised {shown}")
        self._carry_out(decision)

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

    def _carry_out(self, decision: Decision) -> None:
        if (reason := _RETRY_REASONS.get(type(decision))) is not None:
            self.totals.retries[reason] += 1
        name = decision.shard.name
        if isinstance(decision, Quarantine):
            self._quarantine(decision)
        elif isinstance(decision, LeaveShard):
            self.log(f"{name} is left for the next run, because the storage has failed for too long")
        self.queue.put_back(decision, self.policy.faults.tried(name))

    def _quarantine(self, decision: Quarantine) -> None:
        name, layer, reason = decision.shard.name, decision.layer, decision.reason
        detail = shorten(self.redact.cut(decision.detail), 2000)
        self.store.quarantine(layer, name, [(None, reason, detail)])
        self.events.add("shard_quarantined", shard=name, layer=layer, reason=reason.value, detail=detail)
        cause = f"{reason.value}: {shorten(detail, 300)}"
        self.log(f"{name} is quarantined in {layer}: {cause}")
        self.totals.add_quarantined(name, layer, reason.value, detail)
        self.policy.shard_quarantined(name, cause)
        if decision.rest is None:
            self.totals.finished.add(name)


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
