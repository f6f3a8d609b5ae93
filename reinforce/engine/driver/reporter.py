"""The part of the driver that reports a run while it goes: metrics, and ``runs/<run>/progress.json``."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from typing import Any

from reinforce.dataset.files.store import Store
from reinforce.dataset.runs.progress import (
    FILE,
    FailingShard,
    LeaseProgress,
    RunProgress,
    SlowShard,
    WorkerProgress,
)
from reinforce.engine.driver.policy.failures import FailurePolicy
from reinforce.engine.driver.pool import Pool, Slot
from reinforce.engine.driver.shard_queue import ShardQueue
from reinforce.engine.plan.plan import Plan
from reinforce.engine.record.events import Events
from reinforce.engine.record.metrics import Recorder, totals_values
from reinforce.engine.record.progress import Progress, Rates, Snapshot
from reinforce.engine.record.summary import RunTotals
from reinforce.errors import UserError
from reinforce.storage import JOB_VARIABLE
from teachers.redact import Redactor

_METRICS_SECONDS = 2.0
_PROGRESS_SECONDS, _PROGRESS_SECONDS_LOCAL = 10.0, 2.0
_SECONDS_PER_WORKER = 0.006  # a driver of 10,000 workers writes 3 MB once a minute
_FAILING = 20  # shards that are named


class RunReporting:
    """Reports the state of the driver, in which it changes nothing."""

    plan: Plan
    store: Store
    pool: Pool
    policy: FailurePolicy
    queue: ShardQueue
    totals: RunTotals
    events: Events
    progress: Progress
    redact: Redactor

    def _begin_reports(self) -> None:
        self._recorder = Recorder()
        self._metrics_due = self._progress_due = 0.0
        self._started = time.time()

    def _report(self, last: bool = False) -> None:
        """Record metrics and write the progress if they are due, or at the end of the run."""
        now = time.monotonic()
        if not (last or now >= self._metrics_due):
            return
        self._metrics_due = now + _METRICS_SECONDS
        snapshot = self._snapshot()
        rates = self.progress.rates(snapshot)
        self._record_metrics(snapshot, Rates(eta=0.0) if last else rates, 0 if last else snapshot.workers)
        if last or now >= self._progress_due:
            least = _PROGRESS_SECONDS_LOCAL if self.store.local else _PROGRESS_SECONDS
            interval = least + len(self.pool.slots) * _SECONDS_PER_WORKER
            self._progress_due = now + interval
            with contextlib.suppress(UserError):  # the run itself does not need it
                self._write_progress(self._state(snapshot, rates, interval))

    def _snapshot(self) -> Snapshot:
        return Snapshot(
            shards_done=len(self.totals.finished),
            shards=len(self.plan.pending),
            samples=max(self.totals.samples, self.pool.samples),
            samples_done=self.totals.samples,
            busy=self.pool.busy,
            alive=self.pool.alive(time.monotonic()),
            workers=self.pool.started_count,
            quarantined_shards=len(self.policy.quarantined),
            refused_rows=sum(self.totals.refused.values()),
        )

    def _record_metrics(self, snapshot: Snapshot, rates: Rates, workers: int) -> None:
        self._recorder.record(
            {
                **totals_values(self.totals, self.events.digest.counts),
                "reinforce_accelerator_busy_seconds_total": max(snapshot.busy, self.totals.busy),
                "reinforce_worker_seconds_total": snapshot.alive,
                "reinforce_workers": workers,
                "reinforce_waiting_shards": len(self.queue),
                "reinforce_leased_shards": len(self.pool.leases),
                **({} if rates.eta is None else {"reinforce_eta_seconds": rates.eta}),
            }
        )

    def _state(self, snapshot: Snapshot, rates: Rates, interval: float) -> RunProgress:
        digest = self.events.digest
        failing = list(digest.failing.items())[-_FAILING:]
        return RunProgress(
            run=self.events.run,
            time=time.time(),
            interval=interval,
            started=self._started,
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
            job=job_id(),
        )

    def _write_progress(self, state: RunProgress) -> None:
        text = self.redact(json.dumps(state.model_dump(mode="json"), ensure_ascii=False))
        self.store.write_bytes(text.encode("utf-8", "replace"), "runs", self.events.run, FILE)


def worker_progress(slot: Slot) -> WorkerProgress:
    """Where the shards of a started worker were at its last answer."""
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
    info = slot.info
    return WorkerProgress(
        worker=slot.index,
        host=info.id.place,
        pid=info.pid,
        log=info.log,
        samples=slot.pulse.samples,
        shards=shards,
    )


def job_id() -> str:
    """The id by which `ray job logs` finds this process, or ''."""
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        found = json.loads(os.environ.get(JOB_VARIABLE, "{}")).get("metadata", {}).get("job_submission_id")
        return found if isinstance(found, str) else ""
    return ""
