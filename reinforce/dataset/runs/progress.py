"""Progress of a run as its driver writes it every few seconds: ``runs/<run>/progress.json``.

It is one small file, so that the status of a running job takes a few requests whatever the size of the dataset.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from reinforce.dataset.manifest.schema import check_run
from reinforce.errors import UserError
from reinforce.storage import Storage

FILE = "progress.json"
SUMMARY = "summary.json"
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
    job: str = ""

    def silent_for(self) -> float | None:
        """Seconds since the last news if the run does not report any more, else None."""
        age = time.time() - self.time
        ended = self.host == socket.gethostname() and not os.path.exists(f"/proc/{self.pid}")
        return max(0.0, age) if ended or age > max(_SILENT_SECONDS, 3 * self.interval) else None

    def log_command(self) -> str:
        """What shows the log of the run; '' if only its terminal does."""
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
