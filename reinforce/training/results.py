"""What came out of a training: results.json, and a few sentences for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from reinforce.storage import Storage
from reinforce.terminal import format_duration
from reinforce.training.checkpoint import FOLDER, Best
from reinforce.training.log import CURVES, EVENTS, LOG

RESULTS = "results.json"


@dataclass(frozen=True)
class Results:
    """The end of a training.

    ``seconds`` were spent in steps, over all starts; ``export`` is a folder of ``output``; numbers that were not finite
    are None.
    """

    output: str
    export: str
    steps: int
    samples: int
    seconds: float
    parameters: int
    loss: float | None
    metrics: Mapping[str, float | None]
    best: Best | None
    skipped: int

    @property
    def seconds_per_step(self) -> float:
        return self.seconds / self.steps

    @property
    def samples_per_second(self) -> float:
        return self.samples / self.seconds

    def text(self) -> str:
        """A short summary in plain English."""
        lines = [
            f"trained {self.parameters / 1e6:,.1f} million parameters for {self.steps:,} steps on {self.samples:,} "
            f"samples in {format_duration(self.seconds)} ({self.seconds_per_step:.3g} s a step, "
            f"{self.samples_per_second:,.0f} samples/s)"
        ]
        if self.loss is not None:
            lines.append(f"loss at the end: {self.loss:.4f}")
        for name, value in self.metrics.items():
            lines.append(f"{name}: {'not finite' if value is None else f'{value:.4f}'}")
        if self.best is not None and self.best.step != self.steps:
            lines.append(
                f"best {self.best.metric}: {self.best.value:.4f} at step {self.best.step:,}, kept as checkpoint"
            )
        if self.skipped:
            lines.append(f"{self.skipped:,} steps were skipped, since their gradient was not finite")
        lines.append(f"weights: {self.output}/{self.export}   curves: {self.output}/{CURVES}")
        return "\n".join(lines)

    def write(self, store: Storage) -> None:
        rates = {"seconds_per_step": self.seconds_per_step, "samples_per_second": self.samples_per_second}
        files = {"weights": self.export, "checkpoints": FOLDER, "log": LOG, "tensorboard": EVENTS, "curves": CURVES}
        store.write_json({**asdict(self), **rates, "files": files}, RESULTS)


def read_results(store: Storage) -> Results | None:
    """The results in an output, if a training ended there."""
    found: dict[str, Any] | None = store.read_json(RESULTS)
    if found is None:
        return None
    best = found["best"]
    fields = {name: found[name] for name in Results.__dataclass_fields__}
    return Results(**{**fields, "best": Best(**best) if best else None})
