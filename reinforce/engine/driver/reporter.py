"""Reports a run while it goes: metrics, and ``runs/<run>/progress.json``."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from typing import Any

from reinforce.dataset.runs.progress import FILE, FailingShard, LeaseProgress, RunProgress, SlowShard, WorkerProgress
from reinforce.engine.driver.state import RunState
from reinforce.engine.driver.worker_pool import Slot
from reinforce.engine.record.metrics import Recorder, totals_values
from reinforce.engine.record.progress import Rates, Snapshot
from reinforce.errors import UserError
from reinforce.storage import JOB_VARIABLE

_METRICS_SECONDS = 2.0
_PROGRESS_SECONDS, _PROGRESS_SECONDS_LOCAL = 10.0, 2.0
_SECONDS_PER_WORKER = 0.006  # a driver of 10,000 workers writes 3 MB once a minute
_FAILING = 20  # shards that are named


class Reporter:
    """Records metrics and writes ``progress.json``. Changes nothing of the run."""

    def __init__(self, state: RunState) -> None:
        self._state = state
        self._recorder = Recorder()
        self._metrics_due = self._progress_due = 0.0
        self._started = time.time()

    def report(self, last: bool = False) -> None:
        """Record metrics and write the progress if they are due, or at the end of the run."""
        now = time.monotonic()
        if not (last or now >= self._metrics_due):
            return
        self._metrics_due = now + _METRICS_SECONDS
        snapshot = self._state.snapshot(now)
        rates = self._state.progress.rates(snapshot)
        self._record_metrics(snapshot, Rates(eta=0.0) if last else rates, 0 if last else snapshot.workers)
        if last or now >= self._progress_due:
            least = _PROGRESS_SECONDS_LOCAL if self._state.store.local else _PROGRESS_SECONDS
            interval = least + len(self._state.pool.slots) * _SECONDS_PER_WORKER
            self._progress_due = now + interval
            progress = self._progress(snapshot, rates, interval)
            text = self._state.redact(json.dumps(progress.model_dump(mode="json"), ensure_ascii=False))
            with contextlib.suppress(UserError):  # the run itself does not need it
                self._state.store.write_bytes(text.encode("utf-8", "replace"), "runs", progress.run, FILE)

    def _record_metrics(self, snapshot: Snapshot, rates: Rates, workers: int) -> None:
        state = self._state
        self._recorder.record(
            {
                **totals_values(state.totals, state.events.digest.counts),
                "reinforce_accelerator_busy_seconds_total": max(snapshot.busy, state.totals.busy),
                "reinforce_worker_seconds_total": snapshot.alive,
                "reinforce_workers": workers,
                "reinforce_waiting_shards": len(state.queue),
                "reinforce_leased_shards": len(state.pool.leases),
                **({} if rates.eta is None else {"reinforce_eta_seconds": rates.eta}),
            }
        )

    def _progress(self, snapshot: Snapshot, rates: Rates, interval: float) -> RunProgress:
        state, digest = self._state, self._state.events.digest
        failing = list(digest.failing.items())[-_FAILING:]
        return RunProgress(
            run=state.events.run,
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
            waiting_shards=len(state.queue),
            starting_workers=len(state.pool.loading),
            quarantined_shards=snapshot.quarantined_shards,
            quarantined=state.totals.refused + state.totals.quarantined,
            workers=[worker_progress(slot) for slot in state.pool.started],
            slowest=[SlowShard(shard=name, seconds=s, stage=stage) for s, name, stage in sorted(digest.slowest)[::-1]],
            failing=[FailingShard(shard=name, failures=count, error=error) for name, (count, error) in failing],
            failing_shards=len(digest.failing),
            fast_paths=state.totals.fast_paths,
            job=job_id(),
        )


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
