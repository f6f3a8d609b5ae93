"""Trackers of training runs besides the log of the output: Weights & Biases, MLflow, trackio.

Their packages are imported only if the config names them. Each tracker works in a thread of its own, so that a server
that does not answer costs no step, and a tracker that fails is reported once and dropped: it never ends a training run.
A training run that resumes continues its run of each tracker, by the name in trackers.json of the output.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

from reinforce.processes.imports import require
from reinforce.storage import Storage
from reinforce.training.config import Mlflow, Trackers, Trackio, Wandb
from reinforce.training.job import Job
from teachers.redact import redact

_LOG = logging.getLogger(__name__)
RUNS = "trackers.json"
_WAITING_ROWS = 10_000  # more are dropped
_CLOSING_SECONDS = 60.0

Scalars = Mapping[str, float]


class Backend(Protocol):
    """One run of one tracker."""

    def log(self, step: int, scalars: Scalars) -> None:
        """Send the numbers of a step."""

    def close(self, failed: bool) -> None:
        """End the run."""


def check_trackers(config: Trackers | None) -> None:
    """Raise UserError if a tracker's package is not installed."""
    for name in _named(config):
        require(name, f"log.{name}", name)


def open_trackers(job: Job, storage: Storage) -> list[Tracker]:
    """Start or continue the run of each tracker of a training run. Raises UserError if a package is missing."""
    check_trackers(job.trackers)
    named = _named(job.trackers)
    if not named:
        return []
    found = storage.read_json(RUNS) or {}
    runs = {name: found.get(name) or uuid.uuid4().hex[:12] for name in named}
    if runs != {name: found.get(name) for name in runs}:
        storage.write_json({**found, **runs}, RUNS)
    title = storage.url.rstrip("/").rpartition("/")[2]
    return [
        Tracker(name, partial(_BACKENDS[name], section, runs[name], section.name or title, job.fixed_config))
        for name, section in named.items()
    ]


def _named(config: Trackers | None) -> dict[str, Wandb | Mlflow | Trackio]:
    return {name: section for name in _BACKENDS if (section := getattr(config, name, None)) is not None}


class Tracker:
    """Passes rows to a tracker in a thread of its own. After an error, which is logged once, it does nothing."""

    def __init__(self, name: str, start: Callable[[], Backend], closing_seconds: float = _CLOSING_SECONDS) -> None:
        self._name, self._start, self._closing_seconds = name, start, closing_seconds
        self._rows: queue.Queue[tuple[int, Scalars] | bool] = queue.Queue(_WAITING_ROWS)
        self._broken = False
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def add(self, step: int, scalars: Scalars) -> None:
        """Pass on the numbers of a step that are finite; returns at once."""
        finite = {name: float(value) for name, value in scalars.items() if math.isfinite(value)}
        if self._broken or not finite:
            return
        try:
            self._rows.put_nowait((step, finite))
        except queue.Full:
            self._fail(f"{_WAITING_ROWS:,} rows wait for it")

    def close(self, failed: bool) -> None:
        """Send what waits, and end the run; waits a minute at most."""
        if self._broken:
            return
        try:
            self._rows.put_nowait(failed)
        except queue.Full:
            return
        self._thread.join(self._closing_seconds)
        if self._thread.is_alive():
            self._fail(f"it did not end within {self._closing_seconds:g} s")

    def _work(self) -> None:
        try:
            backend = self._start()
            while not isinstance(row := self._rows.get(), bool):
                backend.log(*row)
            backend.close(row)
        except Exception as error:  # each tracker has its own exceptions
            self._fail(f"{type(error).__name__}: {error}")
        except SystemExit as ended:  # wandb and mlflow end the program in some errors
            self._fail(f"it ended with {ended.code}")

    def _fail(self, why: str) -> None:
        if not self._broken:
            self._broken = True
            text = redact(" ".join(why.split()))
            _LOG.warning("log.%s failed, and gets no further rows; the training goes on: %s", self._name, text)


class _Wandb:
    def __init__(self, section: Wandb, run: str, title: str, config: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project=section.project, entity=section.entity, name=title, tags=section.tags or None, id=run,
            resume="allow", mode=section.mode, config=dict(config), dir=section.folder, reinit="create_new",
            settings=wandb.Settings(console="off", silent=True, init_timeout=60),
        )  # fmt: skip
        self._run.define_metric("*", step_metric="step")  # steps that are repeated after a crash are not refused

    def log(self, step: int, scalars: Scalars) -> None:
        self._run.log({"step": step, **scalars})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _Mlflow:
    def __init__(self, section: Mlflow, run: str, title: str, config: Mapping[str, Any]) -> None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        if (section.uri or "").startswith("file:"):  # MLflow 3.7 wants a database, unless a folder is asked for
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric, self._client = Metric, MlflowClient(tracking_uri=section.uri)
        experiment = self._client.get_experiment_by_name(section.experiment)
        number = experiment.experiment_id if experiment else self._client.create_experiment(section.experiment)
        # MLflow names runs itself, so the run is found again by a tag.
        found = self._client.search_runs([number], f"tags.reinforce = '{run}'", max_results=1)
        if found:
            self._run = found[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
            return
        self._run = self._client.create_run(number, run_name=title, tags={"reinforce": run}).info.run_id
        values = [Param(name, str(value)[:500]) for name, value in config.items()]
        for start in range(0, len(values), 100):
            self._client.log_batch(self._run, params=values[start : start + 100])

    def log(self, step: int, scalars: Scalars) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(self._run, [self._metric(name, value, now, step) for name, value in scalars.items()])

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self._run, "KILLED" if failed else "FINISHED")


class _Trackio:
    def __init__(self, section: Trackio, run: str, title: str, config: Mapping[str, Any]) -> None:
        import trackio

        self._run = trackio.init(
            project=section.project, name=f"{title}-{run[:6]}", space_id=section.space, config=dict(config),
            resume="allow", embed=False, auto_log_gpu=False,
        )  # fmt: skip

    def log(self, step: int, scalars: Scalars) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self, failed: bool) -> None:
        self._run.finish()


#: By the modules of the trackers, which are also the names of the extras with their packages.
_BACKENDS: Mapping[str, Callable[..., Backend]] = {"wandb": _Wandb, "mlflow": _Mlflow, "trackio": _Trackio}
