"""Series for Ray's metrics, which Ray's dashboard and Prometheus show; ``SERIES`` lists them all.

The driver and the workers record their counts every few seconds and at the end of a shard. Ray exports a series from
the node where it is recorded, with the prefix ``ray_`` and the labels of its process. The number of label values is
bounded: reasons, stages, layers, and indexes of workers.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from reinforce.engine.record.rates import unit_of
from reinforce.errors import UserError

if TYPE_CHECKING:
    from reinforce.engine.record.summary import RunTotals

#: Values by name of series: a number, or one for each value of the series' label.
Values: TypeAlias = "dict[str, float | Mapping[str, float]]"

#: Reasons of ``reinforce_workers_ended_total``, and the events that they are counted by.
_ENDED = {
    "died": "worker_died",
    "hung": "worker_hung",
    "replaced": "worker_replaced",
    "drained": "worker_drained",
    "recycled": "worker_recycled",
    "failed to start": "worker_failed_to_start",
}


@dataclass(frozen=True)
class Series:
    """One series. ``label`` is the name of its label, or None, and ``source`` the process that records it."""

    name: str
    kind: Literal["counter", "gauge"]
    source: Literal["driver", "worker"]
    text: str
    label: str | None = None


def _counter(name: str, text: str, label: str | None = None) -> Series:
    return Series(f"reinforce_{name}", "counter", "driver", text, label)


def _gauge(name: str, text: str) -> Series:
    return Series(f"reinforce_{name}", "gauge", "driver", text)


def _of_worker(name: str, kind: Literal["counter", "gauge"], text: str) -> Series:
    return Series(f"reinforce_worker_{name}", kind, "worker", text, "worker")


SERIES = {
    one.name: one
    for one in (
        _counter("samples_total", "Samples of shards that were written."),
        _counter("shards_total", "Shards that were finished, or quarantined as a whole.", "result"),
        _counter("captions_total", "Captions that captioners have generated for them."),
        _counter("tokens_total", "Tokens of these captions, of captioners that report them."),
        _counter("read_bytes_total", "Encoded images and texts that were read, of the source or of stored samples."),
        _counter("written_bytes_total", "Bytes of the layer files that were written."),
        _counter("quarantined_total", "Samples and shards that were quarantined.", "reason"),
        _counter("stage_seconds_total", "Time of shards by stage of their reading thread.", "stage"),
        _counter("model_seconds_total", "Time of models on the accelerator.", "layer"),
        _counter("model_inputs_total", "Images, captions or texts of which models made a layer.", "layer"),
        _counter("accelerator_busy_seconds_total", "Time in which the accelerators of all workers worked."),
        _counter("worker_seconds_total", "Time of all workers since their models were loaded."),
        _counter("retries_total", "Shards that were leased again.", "reason"),
        _counter("workers_ended_total", "Workers that ended before the run did.", "reason"),
        _gauge("workers", "Workers whose models are loaded."),
        _gauge("waiting_shards", "Shards that no worker has."),
        _gauge("leased_shards", "Shards that workers have."),
        _gauge("eta_seconds", "Estimated time until the end of the run."),
        _of_worker("samples_total", "counter", "Samples through the models, also of shards that are not finished."),
        _of_worker("busy_seconds_total", "counter", "Time in which the worker's accelerator worked."),
        _of_worker("decode_queue", "gauge", "Chunks of images that wait for a decode process."),
        _of_worker("accelerator_queue", "gauge", "Batches that wait for the accelerator; 0 if it waits for images."),
        _of_worker("memory_bytes", "gauge", "Memory of the worker's process."),
    )
}


class Recorder:
    """Passes values to Ray: gauges unchanged, counters as the growth since the last call.

    ``label`` is the label value of a worker's series. Does nothing if Ray is not initialised.
    """

    def __init__(self, label: str = "") -> None:
        self._label = label
        self._before: dict[tuple[str, str], float] = {}
        self._lock = threading.Lock()  # a worker records from several threads

    def record(self, values: Values) -> None:
        """Record the current totals."""
        import ray

        if not ray.is_initialized():
            return
        with self._lock:
            for name, value in values.items():
                for label, number in (value if isinstance(value, Mapping) else {self._label: value}).items():
                    self._record(SERIES[name], label, float(number))

    def _record(self, series: Series, label: str, number: float) -> None:
        tags = {} if series.label is None else {series.label: label}
        if series.kind == "gauge":
            _metric(series.name).set(number, tags)
        elif (grown := number - self._before.get((series.name, label), 0.0)) > 0:
            self._before[series.name, label] = number
            _metric(series.name).inc(grown, tags)


@cache
def _metric(name: str) -> Any:
    """Ray's metric of a series; a process creates it once."""
    from ray.util.metrics import Counter, Gauge

    series = SERIES[name]
    kind = Counter if series.kind == "counter" else Gauge
    return kind(name, series.text, () if series.label is None else (series.label,))


def totals_values(totals: RunTotals, events: Mapping[str, int]) -> Values:
    """The series of a run's totals; ``events`` counts its events by kind."""
    stages, captions = totals.stages, [one for layer, one in totals.stages.items() if unit_of(layer) == "captions"]
    return {
        "reinforce_samples_total": totals.samples,
        "reinforce_shards_total": {"finished": totals.written, "quarantined": totals.quarantined_shards},
        "reinforce_captions_total": sum(stage["inputs"] for stage in captions),
        "reinforce_tokens_total": sum(stage["tokens"] for stage in captions),
        "reinforce_read_bytes_total": totals.read_bytes,
        "reinforce_written_bytes_total": totals.bytes,
        "reinforce_quarantined_total": totals.refused + totals.quarantined,
        "reinforce_stage_seconds_total": totals.times,
        "reinforce_model_seconds_total": {layer: stage["seconds"] for layer, stage in stages.items()},
        "reinforce_model_inputs_total": {layer: stage["inputs"] for layer, stage in stages.items()},
        "reinforce_retries_total": totals.retries,
        "reinforce_workers_ended_total": {reason: events.get(event, 0) for reason, event in _ENDED.items()},
    }


NAME = "reinforce_grafana_dashboard.json"
_FOLDER_VARIABLE = "RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR"  # Ray's, for its own dashboards
_SESSION_FOLDER = "/tmp/ray/session_latest/metrics/grafana/dashboards"  # noqa: S108 - Ray's default


def dashboard_text() -> str:
    """The dashboard as JSON."""
    return files("reinforce.engine.record").joinpath("grafana_dashboard.json").read_text(encoding="utf-8")


def ray_folder() -> Path:
    """The folder in which Ray puts its own dashboards on this machine."""
    return Path(os.environ.get(_FOLDER_VARIABLE) or _SESSION_FOLDER)


def write_dashboard(folder: Path | None = None) -> Path:
    """Write the dashboard into a folder, by default beside those of Ray. Raises UserError."""
    target = folder or ray_folder()
    if folder is None and not target.is_dir():
        raise UserError(f"{target} does not exist: name a folder, or start Ray with its dashboard on this machine.")
    try:
        target.mkdir(parents=True, exist_ok=True)
        (target / NAME).write_text(dashboard_text(), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{target / NAME} cannot be written: {error}.") from error
    return target / NAME
