"""Trial folders: each holds the output of an ordinary training, from which the trial's state is read.

``trial.json`` identifies the training run, ``log.jsonl`` holds the evaluations so far, ``results.json`` exists once it
is finished, ``stopped.json`` once it was stopped early. A search keeps no other state.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from reinforce.errors import UserError
from reinforce.storage import Storage
from reinforce.student.config import StudentConfig
from reinforce.student.train import student_job
from reinforce.training.config import describe_changes
from reinforce.training.record.log import read_rows
from reinforce.training.record.results import read_results
from reinforce.training.saving import Checkpoints

_TRIAL, _STOPPED = "trial.json", "stopped.json"


@dataclass(frozen=True)
class Outcome:
    """State of a trial.

    ``curve`` holds (step, metric) of its evaluations; ``continued`` is whether it took steps after the last of them.
    ``error`` is why it failed in this search; a failed trial is retried by the next one.
    """

    state: Literal["open", "finished", "stopped"]
    curve: Sequence[tuple[int, float]] = ()
    continued: bool = False
    seconds: float = 0.0
    error: str | None = None

    @property
    def value(self) -> float | None:
        """The final metric, that of the exported weights; None unless the trial is finished."""
        return self.curve[-1][1] if self.curve and self.state == "finished" else None


def begin_trial(config: StudentConfig, steps: int) -> None:
    """Record the training run in its folder. Raises UserError if the folder holds another training run."""
    store = Storage(config.output)
    now: dict[str, Any] = {"train.steps": steps, **student_job(config).fixed_config}
    now = json.loads(json.dumps(now))
    then = store.read_json(_TRIAL)
    if then is None:
        store.write_json(now, _TRIAL)
    elif changed := describe_changes(then, now):
        raise UserError(
            f"{store.url} holds a trial of another training:\n  " + "\n  ".join(changed) + "\n"
            "Write to another `output`, restore these values, or delete the folder to train it again."
        )


def read_outcome(config: StudentConfig, steps: int, metric: str) -> Outcome:
    """Read a trial's state from its folder. A trial that was stopped by another metric is open again."""
    store = Storage(config.output)
    store.fs.invalidate_cache(store.root)  # a worker may have written there since
    values = {row["step"]: row["metrics"].get(metric) for row in read_rows(store) if "metrics" in row}
    curve = sorted((at, value) for at, value in values.items() if value is not None)
    results = read_results(store)
    if results is not None and results.steps == steps and curve and curve[-1][0] == steps:
        return Outcome("finished", curve, seconds=results.seconds)
    stopped = store.read_json(_STOPPED)
    if stopped is not None and stopped["metric"] == metric:
        return Outcome("stopped", [point for point in curve if point[0] <= stopped["step"]])
    latest = max(Checkpoints(store, 1).steps(), default=0)
    return Outcome("open", curve, continued=bool(curve) and latest > curve[-1][0])


def mark_stopped(config: StudentConfig, metric: str, step: int, value: float) -> None:
    """Record that a trial was stopped early, and at which evaluation."""
    Storage(config.output).write_json({"metric": metric, "step": step, "value": value, "by": "ASHA"}, _STOPPED)
