"""Progress of a run as its driver writes it every few seconds, ``runs/<run>/progress.json``, and as people see it.

It is one small file, so that the status of a running job takes a few requests for a dataset of any size.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from rich.table import Table
from rich.text import Text

from reinforce.dataset.manifest.schema import check_run
from reinforce.errors import UserError
from reinforce.storage import Storage
from reinforce.terminal import escape, format_duration, plural
from teachers.fast_paths.usage import Usage

FILE = "progress.json"
SUMMARY = "summary.json"
WORKERS = 30  # rows of the table
_ERROR_CHARACTERS = 200
_SILENT_SECONDS = 30.0  # without news, or three times the interval, after which a run counts as ended


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class LeaseProgress(_Record):
    """A shard that a worker has. ``leased`` is the time since when, and ``since`` that since which it is in ``stage``,
    in seconds since 1970; a stage that is not known yet is ''."""

    shard: str
    leased: float
    stage: str = ""
    what: str = ""
    since: float = 0.0


class WorkerProgress(_Record):
    """A worker whose models are loaded. ``log`` is the path of its output on ``host``."""

    worker: int
    host: str
    pid: int
    log: str = ""
    samples: int = 0
    shards: Sequence[LeaseProgress] = ()


class SlowShard(_Record):
    """A finished shard, with the stage that took it longest."""

    shard: str
    seconds: float
    stage: str = ""


class FailingShard(_Record):
    """A shard that has failed and is not finished, with its last error."""

    shard: str
    failures: int
    error: str


class RunProgress(_Record):
    """Progress of a run at ``time``; the next is due ``interval`` seconds later. ``shards`` counts those of the run,
    and ``job`` is the id of its Ray job, '' without one."""

    run: str
    time: float
    interval: float
    started: float
    host: str
    pid: int
    shards: int
    shards_done: int
    samples: int
    samples_per_second: float | None = None
    busy_share: float | None = None
    eta_seconds: float | None = None
    waiting_shards: int = 0
    starting_workers: int = 0
    quarantined_shards: int = 0
    quarantined: Mapping[str, int] = {}
    workers: Sequence[WorkerProgress] = ()
    slowest: Sequence[SlowShard] = ()
    failing: Sequence[FailingShard] = ()
    failing_shards: int = 0
    fast_paths: Sequence[Usage] = ()
    job: str = ""

    def silent_for(self) -> float | None:
        """Seconds since the last news if the run does not report any more, else None."""
        age = time.time() - self.time
        ended = self.host == socket.gethostname() and not os.path.exists(f"/proc/{self.pid}")
        return max(0.0, age) if ended or age > max(_SILENT_SECONDS, 3 * self.interval) else None

    def log_command(self) -> str:
        """The command that shows the log of the run; '' if only its terminal does."""
        return f"ray job logs {self.job} --follow" if self.job else ""


def list_runs(store: Storage) -> list[str]:
    """Names of the runs of a dataset, the latest first."""
    return store.names("runs")[::-1]


def read_summary(store: Storage, run: str) -> dict[str, Any] | None:
    """The summary of a run, None if it has not ended properly."""
    summary = store.read_json("runs", run, SUMMARY)
    if summary is not None:
        check_run(summary, store.path("runs", run, SUMMARY))
    return summary


def read_progress(store: Storage, run: str) -> RunProgress | None:
    """The progress of a run, None if it has none, as those of earlier versions."""
    found = store.read_json("runs", run, FILE)
    if found is None:
        return None
    try:
        return RunProgress.model_validate(found)
    except ValidationError as error:
        raise UserError(f"{store.path('runs', run, FILE)} is not the progress of a run. Delete it.") from error


def running(store: Storage, runs: Sequence[str]) -> RunProgress | None:
    """The progress of the latest of some runs, if it has one and has not ended."""
    with contextlib.suppress(IndexError):
        if read_summary(store, runs[0]) is None:
            return read_progress(store, runs[0])
    return None


def headline(run: RunProgress) -> str:
    """One line: how far the run is, how fast, and how long it will take."""
    parts = [f"{run.shards_done:,} of {plural(run.shards, 'shard')}"]
    if run.eta_seconds is not None:
        parts.append(f"ETA {format_duration(run.eta_seconds)}")
    parts.append(plural(run.samples, "sample"))
    if run.samples_per_second is not None:
        parts.append(f"{run.samples_per_second:,.0f} samples/s")
    if run.busy_share is not None:
        parts.append(f"models busy {run.busy_share:.0%}")
    starting = f", {run.starting_workers} starting" if run.starting_workers else ""
    parts.append(f"{plural(len(run.workers), 'worker')}{starting}")
    if run.failing_shards:
        parts.append(f"{plural(run.failing_shards, 'failing shard')}")
    if run.quarantined_shards or run.quarantined:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in sorted(run.quarantined.items()))
        parts.append(f"quarantine: {plural(run.quarantined_shards, 'shard')}; {counts}")
    return escape("  ".join(parts))


def state_line(run: RunProgress) -> str:
    """Whether the run continues, since when, and the command that shows its log."""
    silent = run.silent_for()
    if silent is not None:
        return escape(
            f"run {run.run} has not reported for {format_duration(silent)} and has not ended: its process (pid "
            f"{run.pid} on {run.host}) was probably killed. The same `reinforce run` continues."
        )
    age = format_duration(max(0.0, time.time() - run.started))
    command = run.log_command()
    log = f"log: {command}" if command else f"log: in the terminal of pid {run.pid} on {run.host}"
    return escape(f"run {run.run} is running since {age}; {log}")


def detail_lines(run: RunProgress) -> list[str]:
    """The slowest finished shards, and the failing ones with their errors."""
    lines = []
    if run.slowest:
        slow = [f"{one.shard} {one.seconds:.1f} s" + f" ({one.stage})" * bool(one.stage) for one in run.slowest]
        lines.append(f"slowest finished shards, with their longest stage: {', '.join(slow)}")
    for one in run.failing:
        error = " ".join(one.error.split())[:_ERROR_CHARACTERS]
        lines.append(f"failing: {one.shard}, {plural(one.failures, 'failure')}: {error}")
    if rest := run.failing_shards - len(run.failing):
        lines.append(f"and {plural(rest, 'more failing shard')}")
    hidden = len(run.workers) - WORKERS
    if hidden > 0:
        lines.append(f"and {hidden:,} more workers, whose shards have changed their stage later; --json has all")
    return [escape(line) for line in lines]


def workers_table(run: RunProgress) -> Table:
    """The stage of each worker's shards, one row per shard, the longest in its stage first."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("worker", "on", "shard", "for", "stage", "for", "log"):
        table.add_column(heading, justify="right" if heading == "for" else "left", no_wrap=heading != "log")
    now = time.time()
    for worker in sorted(run.workers, key=_since)[:WORKERS]:
        first = (str(worker.worker), f"{worker.host} pid {worker.pid}")
        for row, lease in enumerate(worker.shards or [LeaseProgress(shard="no shard", leased=now)]):
            waited = format_duration(max(0.0, now - lease.since)) if lease.stage else ""
            cells = lease.shard, format_duration(max(0.0, now - lease.leased)), lease.stage, waited
            names, log = (first, worker.log) if row == 0 else (("", ""), "")
            table.add_row(*(Text(escape(cell)) for cell in (*names, *cells, log)))
    return table


def _since(worker: WorkerProgress) -> float:
    return min((lease.since or lease.leased for lease in worker.shards), default=float("inf"))
