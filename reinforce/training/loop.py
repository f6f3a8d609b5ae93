"""The training loop: one for every task, on one rank or many."""

from __future__ import annotations

import contextlib
import math
import secrets
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from reinforce.errors import UserError
from reinforce.seeds import seed_for
from reinforce.storage import Storage
from reinforce.terminal import Screen
from reinforce.training.batches import Prefetcher
from reinforce.training.checkpoint import Checkpoints, Record
from reinforce.training.config import HIGHEST_LOGIT_SCALE, Training, differences
from reinforce.training.log import Log
from reinforce.training.optimizer import adamw, learning_rate
from reinforce.training.progress import Eta, Meter, line
from reinforce.training.ranks import Ranks, wrapped
from reinforce.training.results import Results, read_results
from reinforce.training.state import State, average_of
from reinforce.training.step import Outcome, backpropagate
from reinforce.training.stop import Stop, Stopped
from reinforce.training.task import Build, Feed, Task
from teachers.redact import redact

_MOST_SKIPPED = 20  # steps in a row without a finite gradient
_MEETING = (".tmp", "meeting.json")


@dataclass(frozen=True)
class Job:
    """What a loop needs to know beside the task and its data.

    ``course`` is the part of the config that determines the training, by dotted keys: a checkpoint of another course
    is refused. ``evaluate_start`` asks for metrics of what the training starts from, too. ``export`` names the folder
    of ``output`` for the final weights, ``best`` the metric whose best checkpoint is kept (default: the first).
    """

    training: Training
    output: str
    seed: int
    course: Mapping[str, Any]
    evaluate_every: int | None = None
    evaluate_start: bool = False
    best: str | None = None
    export: str = "student"


#: Is given each new evaluation, on rank 0: the step and the metrics.
Evaluated = Callable[[int, Mapping[str, float]], None]


def fit(
    task: Task,
    feed: Feed,
    job: Job,
    ranks: Ranks,
    stop: Stop | None = None,
    screen: Screen | None = None,
    evaluated: Evaluated | None = None,
) -> Results:
    """Train ``task`` on ``feed`` to its end, from the last checkpoint in ``job.output`` if there is one.

    Every rank calls it and has the results; rank 0 shows progress on ``screen``. When ``evaluated`` is called, all that
    was learnt is saved: what it raises ends the training, which goes on from there when it is started again. Raises
    UserError for what the user has to mend, Stopped when ``stop`` was asked, which SIGINT and SIGTERM do where this is
    the main thread.
    """
    stop = stop or Stop()
    with stop.listening():
        return _Loop(task, feed, job, ranks, stop, screen or Screen(), evaluated).run()


def run_rank(
    build: Build,
    job: Job,
    ranks: Ranks,
    stop: Stop,
    screen: Screen | None = None,
    evaluated: Evaluated | None = None,
) -> Results:
    """One rank's part of a training; see ``fit``."""
    torch.manual_seed(job.seed)
    task, feed = build(ranks.accelerator)
    return fit(task, feed, job, ranks, stop, screen, evaluated)


class _Loop:
    def __init__(
        self,
        task: Task,
        feed: Feed,
        job: Job,
        ranks: Ranks,
        stop: Stop,
        screen: Screen,
        evaluated: Evaluated | None,
    ) -> None:
        self.task, self.feed, self.job, self.ranks, self.stop, self.screen = task, feed, job, ranks, stop, screen
        self.evaluated = evaluated
        self.training = job.training
        self.steps = length(self.training, feed.samples, ranks.size)
        self.accelerator = ranks.accelerator
        self.store = Storage(job.output)
        self.checkpoints = Checkpoints(self.store, self.training.checkpoints.keep)
        self.record = Record(0, job.course)
        model = self.accelerator.place(task.model).train()
        average = average_of(model, self.training.ema) if self.training.ema and ranks.first else None
        self.state = State(model, adamw(model, self.training.optimizer), average)
        self.logit_scales = [p for name, p in model.named_parameters() if name.rpartition(".")[2] == "logit_scale"]
        self.skipped_in_a_row = 0
        self.meter = Meter()
        self.log: Log | None = None  # on rank 0

    def run(self) -> Results:
        self._check_shared()
        self._resume()
        results = read_results(self.store)
        if results is not None and results.steps == self.record.step == self.steps:
            return results
        with contextlib.ExitStack() as stack:
            if self.ranks.first:
                self.log = stack.enter_context(Log(self.store, self.record.step))
                stack.enter_context(self.screen)
                for note in self.task.notes:
                    self.screen.log(note)
                if self.record.step:
                    self.screen.log(f"going on after step {self.record.step:,} of {self.steps:,}")
            self._evaluate()  # if a kill came between a checkpoint and its evaluation
            self._train()
            self.ranks.on_first(self._finish)
        results = read_results(self.store)
        assert results is not None
        return results

    # -- from and to checkpoints

    def _check_shared(self) -> None:
        """Raise UserError if a rank does not see what rank 0 writes."""
        if self.ranks.size == 1:
            return
        token = secrets.randbits(62) if self.ranks.first else 0
        self.ranks.on_first(lambda: self.store.write_json({"token": token}, *_MEETING))
        token = self.ranks.highest(token)()
        seen = self.store.read_json(*_MEETING)
        if self.ranks.highest(seen != {"token": token})():
            raise UserError(
                f"not every rank sees what another writes to {self.job.output}. "
                "Set `output` to a folder that all nodes share or to an object store."
            )
        self.ranks.on_first(lambda: self.store.fs.rm_file(self.store.path(*_MEETING)))

    def _resume(self) -> None:
        latest = self.ranks.highest(max(self.checkpoints.steps(), default=0))()
        if not latest:
            return
        record, tensors = self.checkpoints.load(latest)
        if changed := differences(record.course, self.job.course):
            raise UserError(
                f"{self.job.output} has a training of another config:\n  " + "\n  ".join(changed) + "\n"
                "Write to another `output`, restore these values, or delete the folder to begin anew."
            )
        if latest > self.steps:
            raise UserError(
                f"{self.job.output} is at step {latest:,} already, beyond the {self.steps:,} of this config. "
                "Raise train.steps (or epochs), or write to another `output`."
            )
        try:
            self.state.load(tensors)
        except (KeyError, RuntimeError) as error:
            raise UserError(
                f"the checkpoint of step {latest:,} in {self.job.output} is of another model: {error}. Write to "
                "another `output`, or go on with the versions of this program and of open_clip that wrote it."
            ) from error
        self.record = record

    def _save(self, last: bool = False) -> None:
        def save() -> None:
            self.checkpoints.save(self.record, self.state.tensors())
            assert self.log is not None
            self.log.publish(last)

        self.ranks.on_first(save)

    # -- steps

    def _train(self) -> None:
        if self.record.step == self.steps:
            return
        if self.training.compute.compile:
            self.state.model.compile()
        model = wrapped(self.state.model, self.ranks)
        share = self.training.batch // self.ranks.size
        batches = self.feed.batches(self.ranks.rank, self.ranks.size, share, self.record.step)
        ahead = Prefetcher(batches, self.accelerator)
        self._fetch(ahead)
        if signum := self.ranks.highest(self.stop.signum)():
            raise Stopped(signum)
        eta = Eta(self.record.step, self.steps)
        while self.record.step < self.steps:
            signum = self._step(model, ahead, share, eta)
            last = self.record.step == self.steps
            if signum or last or self._evaluation_due() or self.record.step % self.training.checkpoints.every == 0:
                self._save(last=bool(signum))
            if signum:
                raise Stopped(signum)
            self._evaluate()

    def _fetch(self, ahead: Prefetcher) -> None:
        try:
            ahead.fetch()
        except RuntimeError:
            if not self.stop.signum:  # Ctrl-C ends the loader's processes, too
                raise

    def _step(self, model: Any, ahead: Prefetcher, share: int, eta: Eta) -> int:
        """Take a step with the batch that is ready; returns the signal by which some rank was asked to stop, or 0."""
        step, begun = self.record.step, time.perf_counter()
        lr = learning_rate(step, self.steps, self.training.optimizer)
        for group in self.state.optimizer.param_groups:
            group["lr"] = lr
        parts = self.training.compute.accumulate
        seeds = [
            seed_for(self.job.seed, f"step {step}", "training", self.ranks.rank * parts + part) for part in range(parts)
        ]
        outcome = backpropagate(self.task, model, ahead.take(), share, seeds, self.accelerator)
        computed = self.accelerator.mark()
        if step + 1 < self.steps:
            self._fetch(ahead)  # while the device computes
        fetched = self.accelerator.mark()
        asked = self.ranks.highest(self.stop.signum)
        norm = self._update()
        seconds = time.perf_counter() - begun
        self.meter.add(seconds, self.accelerator.seconds_between(computed, fetched))
        self.record = replace(self.record, step=step + 1, seconds=self.record.seconds + seconds)
        if self.record.step % self.training.log_every == 0 or self.record.step == self.steps:
            self._tell(outcome, lr, norm, eta)
        elif self.ranks.first:
            self.screen.advance(self.record.step)
        return asked() if self.ranks.size > 1 else self.stop.signum

    def _update(self) -> float:
        """Take the step that the gradients point to, unless they are not finite; returns their norm."""
        optimizer = self.state.optimizer
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        clip = self.training.optimizer.clip
        # The norm is the same on all ranks, so they skip together; to look at it waits for the device.
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, math.inf if clip is None else clip))
        if math.isfinite(norm):
            self.skipped_in_a_row = 0
            optimizer.step()
            with torch.no_grad():
                for scale in self.logit_scales:
                    scale.clamp_(0, math.log(HIGHEST_LOGIT_SCALE))
            if self.state.average is not None:
                self.state.average.update(self.state.model, self.record.step + 1)
        else:
            self.skipped_in_a_row += 1
            self.record = replace(self.record, skipped=self.record.skipped + 1)
        optimizer.zero_grad(set_to_none=True)
        if self.skipped_in_a_row >= _MOST_SKIPPED:
            raise UserError(
                f"the gradient was not finite in {_MOST_SKIPPED} steps in a row up to step {self.record.step + 1:,}. "
                "Lower train.optimizer.lr, raise its warmup, or set train.compute.precision to fp32; what was learnt "
                "before is in the last checkpoint."
            )
        return norm

    def _tell(self, outcome: Outcome, lr: float, norm: float, eta: Eta) -> None:
        """Write a row of the log; the losses are those of this step, over all ranks."""
        losses = self.ranks.mean(torch.stack([loss.float() for loss in outcome.losses.values()])).tolist()
        if self.log is None:
            return
        step = self.record.step
        row = {
            "step": step,
            "epoch": step * self.training.batch / self.feed.samples,
            "loss": sum(losses),
            "losses": dict(zip(outcome.losses, losses, strict=True)),
            "lr": lr,
            "scalars": {name: float(value) for name, value in outcome.scalars.items()},
            "grad_norm": norm,
            **self.meter.take(self.training.batch),
            "memory": self.accelerator.peak_memory(),
            "skipped": self.record.skipped,
        }
        self.log.add(row)
        self.screen.draw(line(row, self.steps, eta(step)), step, self.steps)

    # -- what came of it

    def _evaluation_due(self) -> bool:
        step, every = self.record.step, self.job.evaluate_every
        if step == 0:
            return self.job.evaluate_start
        return step == self.steps or (every is not None and step % every == 0)

    def _evaluate(self) -> None:
        if self._evaluation_due():
            self.ranks.on_first(self._evaluate_here)

    def _evaluate_here(self) -> None:
        assert self.log is not None
        step = self.record.step
        if self._metrics() is not None:
            return
        self.state.model.eval()
        with self.stop.safe():
            metrics = dict(self.task.evaluate(self.state.result))
        self.state.model.train()
        if metrics:
            chosen = self.job.best or next(iter(metrics))
            if chosen not in metrics:
                raise UserError(f"evaluate.best: there is no metric {chosen}; there are {', '.join(metrics)}.")
            if step and math.isfinite(metrics[chosen]):  # of step 0 there is no checkpoint
                self.checkpoints.rate(step, chosen, metrics[chosen])
            self.screen.log(f"step {step:,}: " + "  ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
        self.log.add({"step": step, "metrics": metrics})
        self.log.publish()
        if self.evaluated is not None:
            self.evaluated(step, metrics)

    def _metrics(self) -> dict[str, float | None] | None:
        """Metrics of this step, if it was evaluated."""
        assert self.log is not None
        found = [row["metrics"] for row in self.log.rows if row["step"] == self.record.step and "metrics" in row]
        return found[-1] if found else None

    def _finish(self) -> None:
        """Export the weights, then say so: results.json comes last."""
        assert self.log is not None
        with self.stop.safe(), tempfile.TemporaryDirectory(prefix="reinforce-export-") as folder:
            self.task.export(self.state.result, folder)
            self.store.put_folder(folder, self.job.export)
        losses = [row["loss"] for row in self.log.rows if "loss" in row]
        results = Results(
            output=redact(self.job.output),
            export=self.job.export,
            steps=self.steps,
            samples=self.steps * self.training.batch,
            seconds=self.record.seconds,
            parameters=sum(p.numel() for p in self.state.model.parameters()),
            loss=losses[-1] if losses else None,
            metrics=self._metrics() or {},
            best=self.checkpoints.best(),
            skipped=self.record.skipped,
        )
        self.log.publish(last=True)
        results.write(self.store)


def length(training: Training, samples: int, ranks: int) -> int:
    """Steps of a training, by the samples of an epoch.

    Raises UserError where the length, the ranks or the warm-up do not fit it.
    """
    parts = ranks * training.compute.accumulate
    if training.batch % parts:
        raise UserError(
            f"train.batch ({training.batch}) must be a multiple of ranks x compute.accumulate ({parts}). Change either."
        )
    if training.steps is not None:
        steps = training.steps
    else:
        assert training.epochs is not None
        steps = max(1, round(training.epochs * samples / training.batch))
    if training.optimizer.warmup >= steps:
        raise UserError(
            f"train.optimizer.warmup ({training.optimizer.warmup:,}) must be below the training's {steps:,} steps. "
            "Lower it, or train for longer."
        )
    return steps
