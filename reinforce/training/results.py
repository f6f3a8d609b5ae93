"""What a training run measures and leaves: evaluations, exported weights, results.json, a trace of some steps."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from reinforce.errors import UserError
from reinforce.processes.signals import StopSignal
from reinforce.storage import Storage
from reinforce.terminal import Screen, format_duration, plural
from reinforce.training.checkpoints import (
    FOLDER,
    BestCheckpoint,
    CheckpointWriter,
    DamagedCheckpoint,
    Progress,
    State,
)
from reinforce.training.config import Job
from reinforce.training.log import CURVES, EVENTS, LOG, Log, name_part, written
from reinforce.training.ranks import Ranks
from reinforce.training.task import Metrics, Task
from teachers.fast_paths.usage import Usage, parse, problem_lines
from teachers.redact import redact
from teachers.runtime import determinism
from teachers.runtime.accelerator import Accelerator

RESULTS = "results.json"
_METRICS = "metric, %"
#: Ends of the names of metrics that are no shares.
_NUMBERS = ("loss", "cider", "bleu")
PROFILE_FOLDER = "profile"
_AFTER, _ROWS, _NAME = 10, 25, 60
_MAX_BYTES = 256 * 2**20
#: Called on rank 0 with the step and the metrics of each new evaluation.
OnEvaluation = Callable[[int, Mapping[str, float]], None]


def metric_text(name: str, value: float | None) -> str:
    """A metric for people: a share in percent, another one, whose row is marked by its digits, as it is."""
    if value is None:
        return "not finite"
    return f"{value:.4f}" if name.endswith(_NUMBERS) else f"{100 * value:.2f}"


@dataclass(frozen=True)
class Results:
    """The results of a finished training run; the field names are the keys of results.json.

    ``seconds`` is the time spent in steps, over all starts; ``export`` is a folder in ``output`` with the weights of
    step ``exported``, of which ``metrics`` are. ``parts`` says by metric what part of a set or suite it is of,
    ``fast_paths`` has the calls of models since the last start, of all ranks. Numbers that are not finite are None.
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
    exported: int
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
        step = f"step {self.exported:,}"
        shown = [(name_part(name, self.parts), metric_text(name, value)) for name, value in self.metrics.items()]
        rows = [(_METRICS, step), *shown] if shown else []
        left, right = (max((len(row[side]) for row in rows), default=0) for side in (0, 1))
        lines += [f"{name:<{left}}  {value:>{right}}" for name, value in rows]
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
        from reinforce.reports import notebook_table

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
    found["fast_paths"] = parse(found["fast_paths"])
    fields = {name: found[name] for name in Results.__dataclass_fields__}
    return Results(**{**fields, "best": BestCheckpoint(**best) if best else None})


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
                self.writer.checkpoints.update_best(step, chosen, metrics[chosen])
        self.log.add({"step": step, "metrics": metrics} | ({"parts": parts} if parts else {}))
        self.log.publish()
        if self.on_evaluation is not None:
            self.on_evaluation(step, metrics)

    def _logged_row(self, step: int) -> dict[str, Any] | None:
        """The row of the log with the metrics of a step, or None if it was not evaluated."""
        assert self.log is not None
        found = [row for row in self.log.rows if row["step"] == step and "metrics" in row]
        return found[-1] if found else None

    def exported_step(self) -> int:
        """The step whose weights are exported. Raises UserError if the best one is wanted and not known."""
        if not self.job.export_best:
            return self.steps
        best = self.writer.checkpoints.best()
        if (
            best is None
            or best.metric != (self.job.best or best.metric)
            or best.step not in self.writer.checkpoints.steps()
        ):
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
                self.state.load(self.writer.checkpoints.load(exported)[1])
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
            best=self.writer.checkpoints.best(),
            skipped=progress.skipped,
            exported=exported,
            fast_paths=fast_paths,
        )
        self.log.publish(last=True)
        results.write(storage)


class StepProfiler:
    """Traces ``count`` steps, from ten after ``step``, or earlier where a training run of ``steps`` steps has fewer.

    ``begin_step`` and ``end_step`` are called for every step (from 0). A trace has the operations and kernels of a
    step, without shapes and stacks; one of more than 256 MiB is not kept, only its table.
    """

    def __init__(self, storage: Storage, accelerator: Accelerator, count: int, step: int, steps: int) -> None:
        self._storage, self._accelerator = storage, accelerator
        self._first = max(step, min(step + _AFTER, steps - count))
        self._last = min(self._first + count, steps) - 1
        self._profile: Any = None

    def begin_step(self, step: int) -> None:
        if step == self._first:
            self._accelerator.synchronize()
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self._accelerator.device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profile = torch.profiler.profile(activities=activities, acc_events=True)
            self._profile.start()

    def end_step(self, step: int) -> list[str]:
        """Lines for the user after the last traced step, when the files are in the output; else none."""
        if self._profile is None or step != self._last:
            return []
        self._accelerator.synchronize()
        self._profile.stop()
        first, last = self._first + 1, self._last + 1
        name = f"steps-{first:09d}-{last:09d}"
        # the operations that take longest by themselves, on the device where there is one, in milliseconds a step
        steps, events = last - first + 1, self._profile.key_averages()
        on_device = any(event.self_device_time_total for event in events)
        clock = "self_device_time_total" if on_device else "self_cpu_time_total"
        times = sorted(((getattr(event, clock), event.count, event.key) for event in events), reverse=True)
        total = sum(time for time, _, _ in times) or 1.0
        lines = [f"{'ms a step':>10} {'share':>6} {'calls':>8}  operation ({'device' if on_device else 'CPU'} time)"]
        for time, calls, operation in times[:_ROWS]:
            if time > 0:
                row = f"{time / 1000 / steps:10.2f} {time / total:6.1%} {calls / steps:8.0f}  {operation[:_NAME]}"
                lines.append(row)
        with self._storage.temporary_folder() as folder:
            trace = Path(folder, f"{name}.json.gz")
            self._profile.export_chrome_trace(str(trace))
            too_large = os.path.getsize(trace) > _MAX_BYTES
            if too_large:
                trace.unlink()
            Path(folder, f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
            self._storage.put_folder(folder, PROFILE_FOLDER)
        self._profile = None
        kept = (
            "its trace is larger than 256 MiB and was left out"
            if too_large
            else f"trace: {PROFILE_FOLDER}/{trace.name}"
        )
        return [f"profile of steps {first:,} to {last:,}; {kept}; table: {PROFILE_FOLDER}/{name}.txt", *lines]
