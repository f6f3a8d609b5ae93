"""The results of a training run: results.json, and a summary in a few lines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from reinforce.storage import Storage
from reinforce.terminal import format_duration, plural
from reinforce.training.record.curves import name_part
from reinforce.training.record.log import CURVES, EVENTS, LOG, written
from reinforce.training.saving import FOLDER, BestCheckpoint
from teachers.fast_paths.usage import Usage, parse, problem_lines

RESULTS = "results.json"
_METRICS = "metric, %"
#: Ends of the names of metrics that are no shares.
_NUMBERS = ("loss", "cider", "bleu")


def metric_text(name: str, value: float | None) -> str:
    """A metric for people: a share in percent, another one, whose row is marked by its digits, as it is."""
    if value is None:
        return "not finite"
    return f"{value:.4f}" if name.endswith(_NUMBERS) else f"{100 * value:.2f}"


def metric_lines(metrics: Mapping[str, float | None], parts: Mapping[str, str], head: str) -> list[str]:
    """Metrics as an aligned table; ``parts`` says which are of a part of what their names say."""
    shown = [(name_part(metric, parts), metric_text(metric, value)) for metric, value in metrics.items()]
    rows = [(_METRICS, head), *shown] if shown else []
    left, right = (max((len(row[side]) for row in rows), default=0) for side in (0, 1))
    return [f"{name:<{left}}  {value:>{right}}" for name, value in rows]


@dataclass(frozen=True)
class Results:
    """The results of a finished training run; the field names are the keys of results.json.

    ``seconds`` is the time spent in steps, over all starts; ``export`` is a folder in ``output`` with the weights of
    step ``exported``, of which ``metrics`` are; earlier versions exported the last step. ``parts`` says by metric what
    part of a set or suite it is of, ``fast_paths`` has the calls of models since the last start, of all ranks. Numbers
    that are not finite are None.
    """

    output: str
    export: str
    steps: int
    samples: int
    seconds: float
    parameters: int
    loss: float | None
    metrics: Mapping[str, float | None]
    best: BestCheckpoint | None
    skipped: int
    exported: int | None = None
    parts: Mapping[str, str] = field(default_factory=dict)
    fast_paths: tuple[Usage, ...] = ()

    @property
    def seconds_per_step(self) -> float:
        return self.seconds / self.steps

    @property
    def samples_per_second(self) -> float:
        return self.samples / self.seconds

    def summary(self) -> str:
        """A summary in plain English, several lines."""
        lines = [
            f"trained {self.parameters / 1e6:,.1f} million parameters for {plural(self.steps, 'step')} on "
            f"{self.samples:,} samples in {format_duration(self.seconds)} ({self.seconds_per_step:.3g} s per step, "
            f"{self.samples_per_second:,.0f} samples/s)"
        ]
        if self.loss is not None:
            lines.append(f"final loss: {self.loss:.4f}")
        lines += metric_lines(
            self.metrics, self.parts, f"step {self.steps if self.exported is None else self.exported:,}"
        )
        if self.best is not None and self.best.step != self.steps:
            where = "exported" if self.best.step == self.exported else "kept as a checkpoint"
            name, best = name_part(self.best.metric, self.parts), metric_text(self.best.metric, self.best.value)
            lines.append(f"best {name}: {best} at step {self.best.step:,}, {where}")
        if self.skipped:
            lines.append(f"{plural(self.skipped, 'step')} skipped, because the gradient was not finite")
        lines += problem_lines(self.fast_paths)
        curves = f"curves: {self.output}/{CURVES}" if written()[CURVES] else f"log: {self.output}/{LOG}"
        lines.append(f"weights: {self.output}/{self.export}   {curves}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        from reinforce.markup import notebook_table

        facts = [
            ("steps", f"{self.steps:,}"),
            ("samples", f"{self.samples:,}"),
            ("time", f"{format_duration(self.seconds)}, {self.seconds_per_step:.3g} s per step"),
            ("parameters", f"{self.parameters / 1e6:,.1f} million"),
            *([("final loss", f"{self.loss:.4f}")] if self.loss is not None else []),
            ("weights", f"{self.output}/{self.export}"),
        ]
        best = self.best
        found = {best.metric: f"{metric_text(best.metric, best.value)} at step {best.step:,}"} if best else {}
        metrics = [
            (name_part(name, self.parts), metric_text(name, value), found.get(name, ""))
            for name, value in self.metrics.items()
        ]
        return notebook_table(self.output, facts, (_METRICS, "last", "best"), metrics)

    def as_json(self) -> dict[str, Any]:
        rates = {"seconds_per_step": self.seconds_per_step, "samples_per_second": self.samples_per_second}
        optional = {"tensorboard": EVENTS, "curves": CURVES}
        files = {"weights": self.export, "checkpoints": FOLDER, "log": LOG}
        files |= {key: file for key, file in optional.items() if written()[file]}
        return {**asdict(self), **rates, "files": files}

    def write(self, storage: Storage) -> None:
        storage.write_json(self.as_json(), RESULTS)


def read_results(storage: Storage) -> Results | None:
    """The results in an output folder, or None if no training run has finished there."""
    found: dict[str, Any] | None = storage.read_json(RESULTS)
    if found is None:
        return None
    best = found["best"]
    optional = {"exported": found["steps"], "parts": {}, "fast_paths": ()}  # which earlier versions did not write
    found = {**optional, **found}
    found["fast_paths"] = parse(found["fast_paths"])
    fields = {name: found[name] for name in Results.__dataclass_fields__}
    return Results(**{**fields, "best": BestCheckpoint(**best) if best else None})
