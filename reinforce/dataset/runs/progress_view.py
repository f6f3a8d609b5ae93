"""The progress of a run for people: lines, and a table of its workers."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from reinforce.dataset.runs.progress import LeaseProgress, RunProgress, WorkerProgress
from reinforce.terminal import escape, format_duration, plural

WORKERS = 30  # rows of the table
_ERROR_CHARACTERS = 200


def headline(run: RunProgress) -> str:
    """One line: how far the run is, how fast, and how long it will take."""
    parts = [f"{run.shards_done:,} of {plural(run.shards, 'shard')}", plural(run.samples, "sample")]
    if run.samples_per_second is not None:
        parts.append(f"{run.samples_per_second:,.0f} samples/s")
    if run.busy_share is not None:
        parts.append(f"accelerator busy {run.busy_share:.0%}")
    starting = f", {run.starting_workers} starting" if run.starting_workers else ""
    parts.append(f"{plural(len(run.workers), 'worker')}{starting}")
    if run.eta_seconds is not None:
        parts.append(f"ETA {format_duration(run.eta_seconds)}")
    if run.failing_shards:
        parts.append(f"{plural(run.failing_shards, 'failing shard')}")
    if run.quarantined_shards or run.quarantined:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in sorted(run.quarantined.items()))
        parts.append(f"quarantine: {plural(run.quarantined_shards, 'shard')}; {counts}")
    return escape("  ".join(parts))


def state_line(run: RunProgress) -> str:
    """Whether the run goes on, since when, and what shows its log."""
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
    """What each worker is at, those first that have been in their stage for the longest time; a row a shard."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("worker", "on", "shard", "for", "stage", "for", "log"):
        table.add_column(heading, justify="right" if heading == "for" else "left", no_wrap=heading != "log")
    now = time.time()
    for worker in sorted(run.workers, key=_since)[:WORKERS]:
        first = (str(worker.worker), f"{worker.host} pid {worker.pid}")
        for row, lease in enumerate(worker.shards or [LeaseProgress(shard="no shard", leased=now)]):
            cells = _lease_cells(lease, now)
            names, log = (first, worker.log) if row == 0 else (("", ""), "")
            table.add_row(*(Text(escape(cell)) for cell in (*names, *cells, log)))
    return table


def _since(worker: WorkerProgress) -> float:
    return min((lease.since or lease.leased for lease in worker.shards), default=float("inf"))


def _lease_cells(lease: LeaseProgress, now: float) -> Sequence[str]:
    seconds = format_duration(max(0.0, now - lease.since)) if lease.stage else ""
    return lease.shard, format_duration(max(0.0, now - lease.leased)), lease.stage, seconds
