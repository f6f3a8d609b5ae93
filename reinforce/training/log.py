"""The logs of a training run: rows of JSON, TensorBoard events, a picture of the curves, trackers, a line of speed.

The packages of trackers are imported only if the config names them. Each tracker works in a thread of its own, so that
a server that does not answer costs no step, and a tracker that fails is reported once and dropped: it never ends a
training run. A training run that resumes continues its run of each tracker, by the name in trackers.json of the output.
"""

from __future__ import annotations

import json
import logging
import math
import os
import queue
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from reinforce import reports
from reinforce.processes.imports import installed, require
from reinforce.settings import flatten
from reinforce.storage import Storage
from reinforce.terminal import format_duration, plural
from reinforce.training.config import Job, Trackers
from teachers.redact import redact

_LOG = logging.getLogger(__name__)
_DRAWING_SECONDS = 30.0
LOG, CURVES, EVENTS, RUNS = "log.jsonl", "curves.png", "tensorboard", "trackers.json"
#: Files that a package of the extra `train` writes.
_PACKAGES = {"matplotlib": CURVES, "tensorboard": EVENTS}
_WAITING_ROWS = 10_000  # for a tracker; more are dropped
_CLOSING_SECONDS = 60.0
_COLUMNS = 3
#: Title, label of the y axis, and the values that a row of the log contributes, by series.
_PANELS: tuple[tuple[str, str, Callable[[Mapping[str, Any]], Mapping[str, Any]]], ...] = (
    ("Loss", "loss", lambda row: {"all": row["loss"], **row["losses"]} if "losses" in row else {}),
    ("Learning rate", "learning rate", lambda row: {"": row["lr"]} if "lr" in row else {}),
    ("Learnt scalars", "value", lambda row: row.get("scalars", {})),
    ("Teachers: share of the loss", "share", lambda row: row.get("shares", {}).get("loss", {})),
    ("Teachers: share of the gradient", "share", lambda row: row.get("shares", {}).get("gradient", {})),
    ("Evaluation: losses", "loss", lambda row: _metrics(row, "loss")),
    ("Evaluation: retrieval", "metric", lambda row: _metrics(row, "retrieval")),
    ("Evaluation", "metric", lambda row: _metrics(row, "")),
)


def name_part(metric: str, parts: Mapping[str, str]) -> str:
    """A metric's name, which says what part it is of, such as ``datacomp/mean of 2 of 38 sets``."""
    return f"{metric} of {parts[metric]}" if metric in parts else metric


def draw_curves(rows: Sequence[Mapping[str, Any]], url: str) -> None:
    """Draw the rows of a log as PNG to a path or URL: one panel each for losses, learning rate, scalars and metrics.

    Panels without values are left out; nothing is written if all are empty.
    """
    panels = [(title, y, _series(rows, values)) for title, y, values in _PANELS]
    panels = [panel for panel in panels if panel[2]]
    if not panels:
        return
    columns = min(len(panels), _COLUMNS)
    lines = -(-len(panels) // columns)
    made, axes = reports.figure(len(panels), width=4.6 * columns, height=3.6 * lines, columns=columns)
    for panel, (title, y, series) in zip(axes, panels, strict=True):
        reports.label(panel, title, "step", y)
        for index, (label, points) in enumerate(series.items()):
            marker = "o" if len(points) == 1 else None
            panel.plot(*zip(*points, strict=True), color=reports.colour(index), label=label or None, marker=marker)
        reports.legend(panel)
    reports.save(made, url)


def _metrics(row: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    """The metrics of a kind: ``loss`` (on a scale of its own), ``retrieval``, or an empty string for all others."""
    parts, found = row.get("parts", {}), {}
    for name, value in row.get("metrics", {}).items():
        own = "loss" if name.endswith("_loss") else "retrieval" if name.startswith("retrieval/") else ""
        if kind == own:
            found[name_part(name, parts).removeprefix("retrieval/")] = value
    return found


def _series(
    rows: Sequence[Mapping[str, Any]], values: Callable[[Mapping[str, Any]], Mapping[str, Any]]
) -> dict[str, list[tuple[int, float]]]:
    """Points (step, value) by series; null values are skipped."""
    series: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in values(row).items():
            if value is not None:
                series.setdefault(name, []).append((row["step"], value))
    return series


Scalars = Mapping[str, float]


@dataclass(frozen=True)
class TrackerRun:
    """One run of one tracker: sends the numbers of a step, and ends the run, which may have failed."""

    log: Callable[[int, Scalars], object]
    close: Callable[[bool], object]


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
    title = getattr(job.trackers, "name", None) or storage.url.rstrip("/").rpartition("/")[2]
    return [
        Tracker(name, partial(_BACKENDS[name], project, runs[name], title, job.fixed_config))
        for name, project in named.items()
    ]


def _named(config: Trackers | None) -> dict[str, str]:
    """The project of each tracker that a config names."""
    return {name: project for name in _BACKENDS if (project := getattr(config, name, None)) is not None}


class Tracker:
    """Passes rows to a tracker in a thread of its own. After an error, which is logged once, it does nothing."""

    def __init__(self, name: str, start: Callable[[], TrackerRun], closing_seconds: float = _CLOSING_SECONDS) -> None:
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


def _open_wandb(project: str, run: str, title: str, config: Mapping[str, Any]) -> TrackerRun:
    import wandb

    begun = wandb.init(
        project=project, name=title, id=run, resume="allow", config=dict(config), reinit="create_new",
        settings=wandb.Settings(console="off", silent=True, init_timeout=60),
    )  # fmt: skip
    begun.define_metric("*", step_metric="step")  # steps that are repeated after a crash are not refused
    return TrackerRun(
        lambda step, scalars: begun.log({"step": step, **scalars}),
        lambda failed: begun.finish(exit_code=int(failed)),
    )


def _open_mlflow(project: str, run: str, title: str, config: Mapping[str, Any]) -> TrackerRun:
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    # MLflow 3.7 wants a database, unless a folder is asked for.
    if os.environ.get("MLFLOW_TRACKING_URI", "").startswith("file:"):
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    client = MlflowClient()
    experiment = client.get_experiment_by_name(project)
    number = experiment.experiment_id if experiment else client.create_experiment(project)
    # MLflow names runs itself, so the run is found again by a tag.
    found = client.search_runs([number], f"tags.reinforce = '{run}'", max_results=1)
    if found:
        begun = found[0].info.run_id
        client.update_run(begun, status="RUNNING")
    else:
        begun = client.create_run(number, run_name=title, tags={"reinforce": run}).info.run_id
        values = [Param(name, str(value)[:500]) for name, value in config.items()]
        for start in range(0, len(values), 100):
            client.log_batch(begun, params=values[start : start + 100])

    def log(step: int, scalars: Scalars) -> None:
        now = int(time.time() * 1000)
        client.log_batch(begun, [Metric(name, value, now, step) for name, value in scalars.items()])

    return TrackerRun(log, lambda failed: client.set_terminated(begun, "KILLED" if failed else "FINISHED"))


def _open_trackio(project: str, run: str, title: str, config: Mapping[str, Any]) -> TrackerRun:
    import trackio

    begun = trackio.init(
        project=project, name=f"{title}-{run[:6]}", config=dict(config), resume="allow", embed=False,
        auto_log_gpu=False,
    )  # fmt: skip
    return TrackerRun(lambda step, scalars: begun.log(dict(scalars), step=step), lambda failed: begun.finish())


#: By the modules of the trackers, which are also the names of the extras with their packages.
_BACKENDS: Mapping[str, Callable[..., TrackerRun]] = {
    "wandb": _open_wandb,
    "mlflow": _open_mlflow,
    "trackio": _open_trackio,
}


def written() -> dict[str, bool]:
    """Whether the packages are installed that write the curves and the events, by the name of the file."""
    return {file: installed(package) for package, file in _PACKAGES.items()}


def notes() -> list[str]:
    """A line if a package is not installed, without which a training run has no curves or no events."""
    missing = {package: file for package, file in _PACKAGES.items() if not installed(package)}
    if not missing:
        return []
    files = " and ".join(missing.values())
    return [f"without {' and '.join(missing)} there is no {files}, only {LOG}: pip install -e '.[train]'"]


class Log:
    """The logs in one output folder, written by rank 0.

    A row is ``{"step": ..., name: number or {name: number}}``. ``parts`` of a row with ``metrics`` says which are of a
    part of what their names say; events and trackers get these under longer names. On a local disk a row is written at
    once; in an object store the files are uploaded by ``publish``.
    """

    def __init__(self, storage: Storage, start: int, trackers: Sequence[Tracker] = ()) -> None:
        """Continue after step ``start``: later rows, of steps that will be repeated, are deleted."""
        self._storage, self._trackers = storage, trackers
        self.rows = [row for row in read_rows(storage) if row["step"] <= start]
        self._temporary = None if storage.local else tempfile.TemporaryDirectory(prefix="reinforce-log-")
        folder = Path(storage.root if self._temporary is None else self._temporary.name)
        text = "".join(json.dumps(row) + "\n" for row in self.rows).encode()
        if storage.local:
            storage.write_bytes(text, LOG)
        else:
            Path(folder, LOG).write_bytes(text)
        self._file = open(Path(folder, LOG), "a", encoding="utf-8")  # noqa: SIM115
        self._drawn = time.monotonic()
        self._written, self._events = written(), None
        if self._written[EVENTS]:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(folder / EVENTS), purge_step=start + 1 if start else None, flush_secs=30)

    def add(self, row: Mapping[str, Any]) -> None:
        """Write one row. In log.jsonl, numbers that are not finite become null."""
        clean = {key: _finite_or_none(value) for key, value in row.items()}
        self.rows.append(clean)
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()
        if "parts" in row:
            named = {name_part(name, row["parts"]): value for name, value in row["metrics"].items()}
            row = {**{key: value for key, value in row.items() if key != "parts"}, "metrics": named}
        flat = flatten(row, separator="/")
        scalars = {name: value for name, value in flat if name != "step" and not isinstance(value, Mapping)}
        if self._events is not None:
            for name, value in scalars.items():
                self._events.add_scalar(name, value, row["step"])
        for tracker in self._trackers:
            tracker.add(row["step"], scalars)

    def publish(self, last: bool = False) -> None:
        """Write all files to the output. Curves, which take a second, are drawn every 30 s and when ``last``."""
        if self._events is not None:
            self._events.flush()
        if self._written[CURVES] and (last or time.monotonic() - self._drawn > _DRAWING_SECONDS):
            draw_curves(self.rows, f"{self._storage.url}/{CURVES}")
            self._drawn = time.monotonic()
        if self._temporary is not None:
            self._storage.put_folder(self._temporary.name)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        for tracker in self._trackers:
            tracker.close(failed=error is not None)
        self._file.close()
        if self._events is not None:
            self._events.close()
        if self._temporary is not None:
            self._temporary.cleanup()


def read_rows(storage: Storage) -> Iterator[dict[str, Any]]:
    """The rows of the log in an output folder, up to one that was cut off; none without a log."""
    try:
        lines = storage.fs.cat_file(storage.path(LOG)).decode().splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:  # the process was killed while it wrote this line
            return


class Throughput:
    """Speed of the steps between two rows of the log, without evaluations and checkpoints, and the time left.

    A training run of ``steps`` steps begins or resumes at step ``start``. ``flops`` are those of the model for a
    sample, 0 if unknown, and ``peak`` the FLOP/s of all ranks' cards, if known.
    """

    def __init__(self, start: int, steps: int, flops: float = 0.0, peak: float | None = None) -> None:
        self._begun, self._start, self._end = time.monotonic(), start, steps
        self._flops, self._peak = flops, peak
        self._seconds = self._idle = 0.0
        self._steps = 0

    def add_step(self, seconds: float, idle: float) -> None:
        """Count a step of ``seconds``, in which the device waited ``idle`` seconds for data."""
        self._seconds += seconds
        self._idle += idle
        self._steps += 1

    def measure(self, batch: int) -> dict[str, float]:
        """Return samples per second over all ranks and the share of time spent waiting for data, then reset.

        ``batch`` is the global batch size. Where they are known, the model's FLOP/s over all ranks and their share of
        the cards' peak (``mfu``) are returned, too.
        """
        speed = {"samples_per_second": self._steps * batch / self._seconds, "waiting": self._idle / self._seconds}
        if self._flops:
            speed["flops_per_second"] = self._flops * speed["samples_per_second"]
            if self._peak is not None:
                speed["mfu"] = speed["flops_per_second"] / self._peak
        self._seconds, self._idle, self._steps = 0.0, 0.0, 0
        return speed

    def seconds_left(self, step: int) -> float:
        """An estimate by the average speed since the start, evaluations included."""
        return (time.monotonic() - self._begun) / (step - self._start) * (self._end - step)


def format_row(row: Mapping[str, Any], steps: int, seconds_left: float) -> str:
    """A row of the log as one line of text."""
    parts = [
        f"step {row['step']:,} of {steps:,}",
        f"ETA {format_duration(seconds_left)}",
        f"epoch {row['epoch']:.2f}",
        f"loss {row['loss']:.4f}",
        f"{row['samples_per_second']:,.0f} samples/s",
        *([f"MFU {row['mfu']:.0%}"] if "mfu" in row else []),
        f"waiting for data {row['waiting']:.0%}",
    ]
    if row["skipped"]:
        parts.append(f"{plural(row['skipped'], 'step')} skipped")
    return "  ".join(parts)


def _finite_or_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite_or_none(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
