"""Trials as folders: each is an ordinary training's output, and says by itself how far it is.

``trial.json`` holds what the training is, ``log.jsonl`` the evaluations so far, ``results.json`` that it has ended,
``stopped.json`` that it was ended early. Nothing else is kept of a search.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from reinforce.errors import UserError
from reinforce.storage import Storage
from reinforce.student.config import StudentConfig
from reinforce.student.train import job_of
from reinforce.training.checkpoint import Checkpoints
from reinforce.training.config import differences
from reinforce.training.log import LOG
from reinforce.training.results import read_results

_TRIAL, _STOPPED = "trial.json", "stopped.json"


@dataclass(frozen=True)
class Outcome:
    """How far a trial is. ``curve`` holds (step, metric) of its evaluations; ``beyond``: it took steps after the last.

    ``fault`` is why it could not go on this time; it is tried again the next.
    """

    state: Literal["open", "finished", "stopped"]
    curve: Sequence[tuple[int, float]] = ()
    beyond: bool = False
    seconds: float = 0.0
    fault: str | None = None

    @property
    def value(self) -> float | None:
        """The metric at the end, of the weights that are exported."""
        return self.curve[-1][1] if self.curve and self.state == "finished" else None


def begin(config: StudentConfig, steps: int) -> None:
    """Say what the training in a trial's folder is. Raises UserError where there is another already."""
    store = Storage(config.output)
    now: dict[str, Any] = {"train.steps": steps, **job_of(config).course}
    now = json.loads(json.dumps(now))
    then = store.read_json(_TRIAL)
    if then is None:
        store.write_json(now, _TRIAL)
    elif changed := differences(then, now):
        raise UserError(
            f"{store.url} is a trial of another training:\n  " + "\n  ".join(changed) + "\n"
            "Write to another `output`, restore these values, or delete the folder to try it anew."
        )


def outcome_of(config: StudentConfig, steps: int, metric: str) -> Outcome:
    """What a trial's folder says. One that was stopped by another metric is open again."""
    store = Storage(config.output)
    store.fs.invalidate_cache(store.root)  # a worker has written there since this process looked last
    curve = _curve(store, metric)
    results = read_results(store)
    if results is not None and results.steps == steps and curve and curve[-1][0] == steps:
        return Outcome("finished", curve, seconds=results.seconds)
    stopped = store.read_json(_STOPPED)
    if stopped is not None and stopped["metric"] == metric:
        return Outcome("stopped", [point for point in curve if point[0] <= stopped["step"]])
    latest = max(Checkpoints(store, 1).steps(), default=0)
    return Outcome("open", curve, beyond=bool(curve) and latest > curve[-1][0])


def mark_stopped(config: StudentConfig, metric: str, step: int, value: float) -> None:
    """Say that a trial was ended early, and by what."""
    Storage(config.output).write_json({"metric": metric, "step": step, "value": value, "by": "ASHA"}, _STOPPED)


def _curve(store: Storage, metric: str) -> list[tuple[int, float]]:
    try:
        lines = store.fs.cat_file(store.path(LOG)).decode().splitlines()
    except FileNotFoundError:
        return []
    found: dict[int, float] = {}
    for line in lines:
        try:
            row: Mapping[str, Any] = json.loads(line)
        except ValueError:  # cut in the middle by a kill
            break
        value = row.get("metrics", {}).get(metric)
        if value is not None:
            found[row["step"]] = value
    return sorted(found.items())
