"""Series for Ray's metrics, which Ray's dashboard and Prometheus show; ``SERIES`` lists them all.

The driver and the workers record their counts every few seconds and at the end of a shard. Ray exports a series from
the node where it is recorded, with the prefix ``ray_`` and the labels of its process. The number of label values is
bounded: reasons, stages, layers, fast paths of models, and indexes of workers.
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
    """One series; ``label`` is the name of its label, or None."""

    name: str
    text: str
    label: str | None = None

    @property
    def kind(self) -> Literal["counter", "gauge"]:
        return "counter" if self.name.endswith("_total") else "gauge"

    @property
    def source(self) -> Literal["driver", "worker"]:
        """The process that records it."""
        return "worker" if self.label == "worker" else "driver"


SERIES = {
    one.name: one
    for one in (
        Series("reinforce_samples_total", "Samples of shards that were written."),
        Series("reinforce_shards_total", "Shards that were finished, or quarantined as a whole.", "result"),
        Series("reinforce_captions_total", "Captions that captioners have generated for them."),
        Series("reinforce_tokens_total", "Tokens of these captions, of captioners that report them."),
        Series(
            "reinforce_read_bytes_total", "Encoded images and texts that were read, of the source or of stored samples."
        ),
        Series("reinforce_written_bytes_total", "Bytes of the layer files that were written."),
        Series("reinforce_quarantined_total", "Samples and shards that were quarantined.", "reason"),
        Series("reinforce_stage_seconds_total", "Time of shards by stage of their reading thread.", "stage"),
        Series("reinforce_model_seconds_total", "Time of models on the accelerator.", "layer"),
        Series("reinforce_model_inputs_total", "Images, captions or texts of which models made a layer.", "layer"),
        Series("reinforce_fast_calls_total", "Calls of models that ran a fast path, such as compiled code.", "path"),
        Series("reinforce_plain_calls_total", "Calls that ran the plain way instead.", "path"),
        Series("reinforce_accelerator_busy_seconds_total", "Time in which the accelerators of all workers worked."),
        Series("reinforce_worker_seconds_total", "Time of all workers since their models were loaded."),
        Series("reinforce_retries_total", "Shards that were leased again.", "reason"),
        Series("reinforce_workers_ended_total", "Workers that ended before the run did.", "reason"),
        Series("reinforce_workers", "Workers whose models are loaded."),
        Series("reinforce_waiting_shards", "Shards that no worker has."),
        Series("reinforce_leased_shards", "Shards that workers have."),
        Series("reinforce_eta_seconds", "Estimated time until the end of the run."),
        Series(
            "reinforce_worker_samples_total",
            "Samples through the models, also of shards that are not finished.",
            "worker",
        ),
        Series("reinforce_worker_busy_seconds_total", "Time in which the worker's accelerator worked.", "worker"),
        Series("reinforce_worker_decode_queue", "Chunks of images that wait for a decode process.", "worker"),
        Series(
            "reinforce_worker_accelerator_queue",
            "Batches that wait for the accelerator; 0 if it waits for images.",
            "worker",
        ),
        Series("reinforce_worker_memory_bytes", "Memory of the worker's process.", "worker"),
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
        "reinforce_fast_calls_total": {f"{one.model}/{one.path}": one.used for one in totals.fast_paths},
        "reinforce_plain_calls_total": {f"{one.model}/{one.path}": one.plain for one in totals.fast_paths},
        "reinforce_retries_total": totals.retries,
        "reinforce_workers_ended_total": {reason: events.get(event, 0) for reason, event in _ENDED.items()},
    }


NAME = "reinforce_grafana_dashboard.json"
_FOLDER_VARIABLE = "RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR"  # Ray's, for its own dashboards
_SESSION_FOLDER = "/tmp/ray/session_latest/metrics/grafana/dashboards"  # noqa: S108 - Ray's default


def dashboard_text() -> str:
    return files("reinforce.engine.record").joinpath("grafana_dashboard.json").read_text(encoding="utf-8")


def write_dashboard(folder: Path | None = None) -> Path:
    """Write the dashboard into a folder, by default beside those of Ray. Raises UserError."""
    target = folder or Path(os.environ.get(_FOLDER_VARIABLE) or _SESSION_FOLDER)
    if folder is None and not target.is_dir():
        raise UserError(f"{target} does not exist: name a folder, or start Ray with its dashboard on this machine.")
    try:
        target.mkdir(parents=True, exist_ok=True)
        (target / NAME).write_text(dashboard_text(), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{target / NAME} cannot be written: {error}.") from error
    return target / NAME
