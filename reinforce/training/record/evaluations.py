"""Evaluations during a training run, and what it leaves at its end: exported weights and results."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from reinforce.errors import UserError
from reinforce.storage import Storage
from reinforce.terminal import Screen
from reinforce.training.distributed.ranks import Ranks
from reinforce.training.job import Job
from reinforce.training.record.curves import name_part
from reinforce.training.record.log import Log
from reinforce.training.record.results import Results, metric_text
from reinforce.training.saving import Checkpoints, CheckpointWriter, DamagedCheckpoint, Progress
from reinforce.training.state import State
from reinforce.training.stop import StopSignal
from reinforce.training.task import Metrics, Task
from teachers.fast_paths.usage import Usage
from teachers.redact import redact
from teachers.runtime import determinism

#: Called on rank 0 with the step and the metrics of each new evaluation.
OnEvaluation = Callable[[int, Mapping[str, float]], None]


@dataclass
class Evaluations:
    """The evaluations of a training run of ``steps`` steps, of the state of rank 0. ``log`` is None on other ranks."""

    task: Task
    job: Job
    ranks: Ranks
    state: State
    writer: CheckpointWriter
    steps: int
    stop: StopSignal
    screen: Screen
    on_evaluation: OnEvaluation | None
    log: Log | None = None
    _noted: bool = False

    @property
    def checkpoints(self) -> Checkpoints:
        return self.writer.checkpoints

    def due(self, step: int) -> bool:
        every = self.job.evaluate_every
        if step == 0:
            return self.job.evaluate_start
        return step == self.steps or (every is not None and step % every == 0)

    def evaluate(self, step: int) -> None:
        """Evaluate if it is due and not done, on all ranks if the task can share it out; rank 0 logs the metrics."""
        if not self.due(step):
            return
        logged = self.log is not None and self._logged_row(step) is not None
        if self.ranks.start_max(logged)():
            return
        combine = getattr(self.task, "combine_evaluations", None)
        if combine is None or self.ranks.size == 1:
            parts = [self.ranks.run_on_first(lambda: self._measure(self.state.final_model))]
        else:
            with self.ranks.with_tensors_of_first(self.state.model, self.state.final_model) as model:
                parts = self.ranks.run_on_all(lambda: self._measure(model))
        metrics = parts[0] if combine is None else combine(parts)
        self.ranks.run_on_first(lambda: self._record(step, metrics))

    def _measure(self, model: torch.nn.Module) -> Mapping[str, float]:
        self.state.model.eval()
        with self.stop.interruptible(), determinism.inference():
            metrics = self.task.evaluate(model)
        self.state.model.train()
        return metrics

    def _record(self, step: int, metrics: Mapping[str, float]) -> None:
        assert self.log is not None
        self.writer.wait()  # the best step must have a checkpoint, and so must one at which ``on_evaluation`` ends it
        parts = metrics.parts if isinstance(metrics, Metrics) else {}
        if metrics:
            shown = (f"{name_part(name, parts)} {metric_text(name, value)}" for name, value in metrics.items())
            self.screen.log(f"step {step:,}, %: " + "  ".join(shown))
            self._choose(step, metrics, parts)
        self.log.add({"step": step, "metrics": metrics} | ({"parts": parts} if parts else {}))
        self.log.publish()
        if self.on_evaluation is not None:
            self.on_evaluation(step, metrics)

    def _choose(self, step: int, metrics: Mapping[str, float], parts: Mapping[str, str]) -> None:
        """Keep the step as the best one if it is. Raises UserError for a metric that cannot choose."""
        chosen = self.job.best or next(iter(metrics))
        if chosen not in metrics:
            raise UserError(f"evaluate.best: there is no metric {chosen}; there are {', '.join(metrics)}.")
        if chosen in parts and not self.job.best_of_part:
            why = f"{chosen} is of {parts[chosen]}"
            if self.job.export_best:
                raise UserError(f"evaluate.export: best chooses by evaluate.best, and {why}. Set evaluate.best.")
            if not self._noted:
                self.screen.log(f"no best checkpoint is kept, since {why}; set evaluate.best to choose by it")
            self._noted = True
        elif (step or self.job.export_best) and math.isfinite(metrics[chosen]):  # else step 0 has no checkpoint
            self.checkpoints.update_best(step, chosen, metrics[chosen])

    def _logged_row(self, step: int) -> dict[str, Any] | None:
        """The row of the log with the metrics of a step, or None if it was not evaluated."""
        assert self.log is not None
        found = [row for row in self.log.rows if row["step"] == step and "metrics" in row]
        return found[-1] if found else None

    def exported_step(self) -> int:
        """The step whose weights are exported. Raises UserError if the best one is wanted and not known."""
        if not self.job.export_best:
            return self.steps
        best = self.checkpoints.best()
        if best is None or best.metric != (self.job.best or best.metric) or best.step not in self.checkpoints.steps():
            raise UserError(
                f"evaluate.export: best, but {self.job.output} has no checkpoint of a step that is known to be the "
                f"best by {self.job.best or 'a finite metric'}. Set it to last."
            )
        return best.step

    def finish(self, progress: Progress, fast_paths: tuple[Usage, ...]) -> None:
        """Export the weights, then write results.json, which marks the training run as finished.

        ``fast_paths`` has the calls of all ranks.
        """
        assert self.log is not None
        self.writer.wait()
        exported = self.exported_step()
        if exported != self.steps:
            try:
                self.state.load(self.checkpoints.load(exported)[1])
            except DamagedCheckpoint as error:
                raise UserError(f"{error}, and evaluate.export is best. Restore it, or set it to last.") from error
        storage = Storage(self.job.output)
        with self.stop.interruptible(), storage.temporary_folder() as folder:
            self.task.export(self.state.final_model, folder)
            storage.put_folder(folder, self.job.export)
        losses = [row["loss"] for row in self.log.rows if "loss" in row]
        row = self._logged_row(exported) or {}
        results = Results(
            output=redact(self.job.output),
            export=self.job.export,
            steps=self.steps,
            samples=self.steps * self.job.training.batch,
            seconds=progress.seconds,
            parameters=sum(p.numel() for p in self.state.model.parameters()),
            loss=losses[-1] if losses else None,
            metrics=row.get("metrics", {}),
            parts=row.get("parts", {}),
            best=self.checkpoints.best(),
            skipped=progress.skipped,
            exported=exported,
            fast_paths=fast_paths,
        )
        self.log.publish(last=True)
        results.write(storage)
