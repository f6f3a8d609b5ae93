"""The training loop: the same for every task, on one rank or many.

Each of the steps 0 .. ``steps`` - 1 takes a global batch of ``train.batch`` samples, ``train.batch / ranks`` per rank:

1. set the learning rate of the step (`reinforce.training.checkpoints.learning_rate`);
2. compute losses and gradients of the rank's batch (`reinforce.training.step`); random numbers are seeded from
   (seed, step, rank, microbatch), and DistributedDataParallel averages the gradients over the ranks;
3. fetch the next batch while the device computes;
4. clip the gradient to ``optimizer.grad_clip_norm`` and update the weights, or skip the update if the norm is not
   finite; clamp logit scales to [1, 100]; update the moving average of the weights.

Every ``checkpoints.every`` steps, before an evaluation, after a signal and at the end, rank 0 saves a checkpoint, while
the training run continues (`reinforce.training.checkpoints`). A training run that is started again resumes from the
last checkpoint with the same batches, random numbers and weights, so its curve is the one of an uninterrupted training,
bit for bit.
"""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import torch

from reinforce.errors import UserError
from reinforce.processes.cores import arithmetic_threads, describe_share, loader_processes
from reinforce.processes.signals import Stopped, StopSignal, handled_signals
from reinforce.settings import use_accelerator
from reinforce.storage import Storage
from reinforce.terminal import Screen, plural
from reinforce.training import gather
from reinforce.training.batch_norms import synchronize_batch_norms
from reinforce.training.checkpoints import (
    CheckpointFolder,
    CheckpointWriter,
    DamagedCheckpoint,
    Progress,
    State,
    check_resumable,
    check_skipped,
    describe_differences,
    describe_length,
    learning_rate,
    make_adamw,
)
from reinforce.training.config import Job, total_steps
from reinforce.training.log import Log, Throughput, format_row, open_trackers
from reinforce.training.log import notes as log_notes
from reinforce.training.ranks import Ranks, check_output_is_shared, wrap_ddp
from reinforce.training.results import Evaluations, OnEvaluation, Results, StepProfiler, read_results
from reinforce.training.step import Prefetcher, StepOutput, backpropagate, describe_failure
from reinforce.training.task import Build, Feed, Task
from reinforce.training.trials import Trials, compile_model
from schemas.seeds import seed_for
from teachers.fast_paths.recompilation import Compiler
from teachers.fast_paths.usage import snapshot, total
from teachers.runtime.flops import peak_flops

#: Above all signals: the last checkpoint could not be written.
_NOT_SAVED = 1000
#: Steps of a training run that `compile: auto` compiles: shorter ones would wait for the compiler and gain little.
_LEAST_COMPILED = 1000


def run_rank(
    build: Build,
    job: Job,
    ranks: Ranks,
    stop: StopSignal,
    screen: Screen | None = None,
    on_evaluation: OnEvaluation | None = None,
) -> Results:
    """Seed torch, build the task and its feed, and train to the end, from the last checkpoint in ``job.output`` if any.

    Call it on every rank; all return the results. Rank 0 shows progress on ``screen``. When ``on_evaluation`` is
    called, a checkpoint of the step exists: an exception in it ends the training run, which resumes from there when it
    is started again.

    Raises UserError for a config, checkpoint or output that does not fit, and if the gradient stays not finite;
    Stopped after ``stop`` was requested and a checkpoint was written. SIGINT and SIGTERM request it if this is the
    main thread.
    """
    torch.manual_seed(job.seed)
    use_accelerator(job.accelerator)
    task, feed = build(ranks.accelerator)
    try:
        with handled_signals(stop.request):
            return _Loop(task, feed, job, ranks, stop, screen or Screen(), on_evaluation).run()
    except RuntimeError as error:
        if cause := describe_failure(error, job.training.compute, ranks.accelerator):
            raise UserError(cause) from error
        raise


class _Loop:
    def __init__(
        self,
        task: Task,
        feed: Feed,
        job: Job,
        ranks: Ranks,
        stop: StopSignal,
        screen: Screen,
        on_evaluation: OnEvaluation | None,
    ) -> None:
        self.task, self.feed, self.job, self.ranks, self.stop, self.screen = task, feed, job, ranks, stop, screen
        self.training = job.training
        self.steps = total_steps(self.training, feed.samples, ranks.size)
        self.accelerator = ranks.accelerator
        self.storage = Storage(job.output)
        fixed = {**job.fixed_config, **task.chosen}
        if fixed.get("train.compute.precision") == "auto":
            fixed["train.compute.precision"] = self.accelerator.precision
        self.progress = Progress(0, fixed, model_config=job.model_config, data=feed.data, steps=self.steps)
        model = self.accelerator.place(task.model).train()
        if self.training.compute.sync_batch_norm:
            synchronize_batch_norms(model, ranks)
        average = None
        if self.training.ema and ranks.is_first:
            from timm.utils import ModelEmaV3

            # its decay rises from 0 as 1 - (1 + step)^(-3/4), so that a short training does not export its start
            average = ModelEmaV3(model, decay=self.training.ema, use_warmup=True, warmup_power=3 / 4)
        self.state = State(model, make_adamw(model, self.training.optimizer), average)
        self.checkpoints = CheckpointFolder(self.storage, self.training.checkpoints.keep)
        self.writer = CheckpointWriter(self.checkpoints)
        self.evaluations = Evaluations(
            task, job, ranks, self.state, self.writer, self.steps, stop, screen, on_evaluation
        )
        self.log: Log | None = None  # only on rank 0
        self.finds_microbatches = self.training.compute.accumulate == "auto" and self.accelerator.device.type == "cuda"
        self.microbatches, self.kept = self.training.compute.stated_microbatches, 0
        self.resumed = False
        self.compiled: Compiler | None = None

    def run(self) -> Results:
        check_output_is_shared(self.storage, self.ranks)
        notes = self._resume()
        results = read_results(self.storage)
        finished = results is not None and results.steps == self.progress.step == self.steps
        if results is not None and finished and results.exported == self.evaluations.exported_step():
            return results
        # share the rank's cores between arithmetic and reading
        size, accelerated = self.ranks.size, self.accelerator.device.type != "cpu"
        cores = -self.ranks.start_max(-self.ranks.cpus)()  # all ranks read in the same way
        before, batch = self.progress, self.training.batch // size
        reading = self.feed.set_up(size, batch, loader_processes(cores, accelerated), before.streams)
        now = replace(before, streams=reading.streams, samples=self.feed.samples, files=reading.files)
        # With `auto`, that of the checkpoint until the first step is tried.
        self.progress = replace(now, division=before.division if self.finds_microbatches else self._division())
        threads = arithmetic_threads(self.ranks.cpus, reading.loaders, accelerated)
        if self.training.compute.cpus is None and threads < self.ranks.cpus:
            torch.set_num_threads(threads)
        uses = [
            f"{plural(size, 'rank')} x {describe_share(self.ranks.cpus, 0)}, {reading.text}{' each' * (size > 1)}, "
            f"device {self.accelerator.device.type}"
        ]
        notes = [
            *uses,
            *reading.notes,
            *describe_differences(before, self.progress),
            *notes,
            *self.task.notes,
            *log_notes(),
        ]
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.storage.space_errors())
            stack.enter_context(self.writer)
            if self.ranks.is_first:
                trackers = open_trackers(self.job, self.storage)
                # without a checkpoint the config may be another one, so an evaluation before the first step is repeated
                kept = self.progress.step if self.resumed else -1
                self.evaluations.log = self.log = stack.enter_context(Log(self.storage, kept, trackers))
                stack.enter_context(self.screen)
            self._note(*notes)
            if self.progress.step:
                self._note(f"resuming after step {self.progress.step:,} of {self.steps:,}")
            if self.job.export_best and not self.progress.step and self.evaluations.due(self.progress.step):
                self._save()  # the state before the first step may be the best one
            # in case the process was killed between a checkpoint and its evaluation
            self.evaluations.evaluate(self.progress.step)
            self._train()
            usage = total(chain.from_iterable(self.ranks.run_on_all(snapshot)))
            self.ranks.run_on_first(lambda: self.evaluations.finish(self.progress, usage))
        results = read_results(self.storage)
        assert results is not None
        return results

    def _division(self) -> str:
        division = f"{plural(self.ranks.size, 'rank')} x {plural(self.microbatches, 'part')}"
        shared = self.training.compute.sync_batch_norm and self.ranks.size > 1
        return division + " with shared batch statistics" * shared

    def _find_kept(self, trials: Trials) -> None:
        self.kept = trials.most_kept(self.microbatches, self.training.compute.keep_activations)
        if self.kept:
            self._note(
                f"{self.kept} of {self.microbatches} microbatches pass the model once: their activations are kept"
            )

    def _note(self, *lines: str) -> None:
        """Show lines on rank 0."""
        if self.ranks.is_first:
            for line in lines:
                self.screen.log(line)

    def _resume(self) -> list[str]:
        """Load the last checkpoint that every rank reads whole, if any; returns lines about it.

        Raises UserError if none is whole, or if it does not fit the config or the model.
        """
        found, damage = None, list[str]()
        for step in reversed(self.ranks.run_on_first(self.checkpoints.steps)):
            try:
                found = self.checkpoints.load(step)
            except DamagedCheckpoint as error:
                damage.append(str(error))
            if not self.ranks.start_max(found is None)():
                break
            if found is not None:
                found = None
                damage.append(f"another rank finds the checkpoint of step {step:,} damaged")
        if found is None:
            if damage:
                raise UserError(
                    f"{damage[0]}, and no earlier one is left. Restore it, or delete the folder to start over."
                )
            return []
        self.resumed = True
        progress, tensors = found
        notes = [f"{damage[0]}: resuming from the one of step {progress.step:,}"] if damage else []
        check_resumable(progress, self.progress, self.steps, self.job.output)
        try:
            self.state.load(tensors)
        except (KeyError, RuntimeError) as error:
            raise UserError(
                f"the checkpoint of step {progress.step:,} in {self.job.output} is of another model: {error}. Write to "
                "another `output`, or resume with the versions of this program and of open_clip that wrote it."
            ) from error
        notes += describe_length(progress, self.steps, self.training.optimizer)
        self.progress = replace(progress, model_config=self.job.model_config, data=self.progress.data, steps=self.steps)
        return notes

    def _save(self, last: bool = False) -> None:
        def save() -> None:
            self.writer.save(self.progress, self.state.tensors())
            assert self.log is not None
            if last:
                self.writer.wait()
            self.log.publish(last)

        self.ranks.run_on_first(save)

    def _train(self) -> None:
        if self.progress.step == self.steps:
            return
        rank_batch = self.training.batch // self.ranks.size
        batches = self.feed.batches(self.ranks.rank, self.ranks.size, rank_batch, self.progress.step)
        prefetcher = Prefetcher(batches, self.accelerator)
        self.ranks.at(f"reading the batch of step {self.progress.step + 1:,}")
        self._fetch(prefetcher)
        if signum := self.ranks.start_max(self.stop.signum)():
            raise Stopped(signum)
        trials = Trials(self.task, self.state, prefetcher.peek(), rank_batch, self.ranks)
        device = self.accelerator.device
        card = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        peak = peak_flops(card, self.accelerator.precision)
        peak = None if peak is None else peak * self.ranks.size
        self.throughput = Throughput(self.progress.step, self.steps, trials.flops_of_sample(), peak)
        # find what of the division of a rank's batch the config leaves open, before the model is wrapped and compiled
        self.ranks.at("finding how many samples fit in memory")
        if self.finds_microbatches:
            before = self.progress
            count = self.microbatches = trials.fewest_microbatches(before.part)
            self.progress = replace(before, part=rank_batch // count, division=self._division())
            of = f"{count:,} microbatches of {rank_batch // count:,}" if count > 1 else "one microbatch"
            self._note(
                f"accumulate: auto: a rank's {rank_batch:,} samples of a step fit in {of}",
                *describe_differences(before, self.progress),
            )
        self._find_kept(trials)
        model = wrap_ddp(self.state.model, self.ranks)
        self.ranks.at("compiling the model")
        before = self.progress
        suits = bool(before.compiled) if before.step else self.steps >= _LEAST_COMPILED  # it resumes as it began
        step_of = partial(trials.step, microbatches=self.microbatches, kept=self.kept)
        self.compiled = compile_model(trials, model, step_of, self.training.compute, suits)
        self.progress = replace(before, compiled=None if self.compiled is None else True)
        self._note(*describe_differences(before, self.progress))
        del trials, step_of  # and their batch
        profiler = None
        if self.training.profile is not None and self.ranks.is_first:
            counts = self.training.profile, self.progress.step, self.steps
            profiler = StepProfiler(self.storage, self.accelerator, *counts)
        while self.progress.step < self.steps:
            if profiler is not None:
                profiler.begin_step(self.progress.step)
            signum = self._step(model, prefetcher, rank_batch)
            if profiler is not None:
                self._note(*profiler.end_step(self.progress.step - 1))
            if signum == _NOT_SAVED:
                self.ranks.run_on_first(self.writer.wait)  # raises on all ranks
            step, every = self.progress.step, self.training.checkpoints.every
            if signum or step == self.steps or self.evaluations.due(step) or step % every == 0:
                self._save(last=bool(signum))
            if signum:
                raise Stopped(signum)
            self.evaluations.evaluate(self.progress.step)

    def _fetch(self, prefetcher: Prefetcher) -> None:
        try:
            prefetcher.fetch()
        except RuntimeError:
            if not self.stop.signum:  # Ctrl-C also ends the loader processes, and then the feed
                raise

    def _step(self, model: Any, prefetcher: Prefetcher, rank_batch: int) -> int:
        """Train on the fetched batch; returns the signal by which any rank was asked to stop, _NOT_SAVED, or 0."""
        step, begun = self.progress.step, time.perf_counter()
        if note := self.task.begin_step(step, self.steps):
            self._note(note)
            # the activations may have changed
            self._find_kept(Trials(self.task, self.state, prefetcher.peek(), rank_batch, self.ranks))
            if self.compiled is not None and self.training.compute.compile == "auto":
                self.compiled.give_up("it has changed since it was compared with plain code")
        lr = learning_rate(step, self.steps, self.training.optimizer)
        for group in self.state.optimizer.param_groups:
            rate = learning_rate(step, self.steps, self.training.optimizer, group["tower"])
            group["lr"] = rate * group["scale"]
        first = self.ranks.rank * self.microbatches
        numbers = range(first, first + self.microbatches)
        seeds = [seed_for(self.job.seed, f"step {step}", "training", number) for number in numbers]
        self.ranks.at(f"the gradients of step {step + 1:,}")
        logged = (step + 1) % self.training.log_every == 0 or step + 1 == self.steps
        batch = prefetcher.take()
        output = backpropagate(self.task, model, batch, rank_batch, seeds, self.accelerator, self.kept, logged)
        del batch
        computed = self.accelerator.mark()
        if step + 1 < self.steps:
            self.ranks.at(f"reading the batch of step {step + 2:,}")
            self._fetch(prefetcher)  # while the device computes
        fetched = self.accelerator.mark()
        self.ranks.at(f"the update of step {step + 1:,}", waits=True)
        stop_of_ranks = self.ranks.start_max(_NOT_SAVED if self.writer.failed else self.stop.signum)
        norm = self.state.update(self.training.optimizer.grad_clip_norm, step + 1)
        seconds = time.perf_counter() - begun
        self.throughput.add_step(seconds, self.accelerator.seconds_between(computed, fetched))
        before, skipped = self.progress, not math.isfinite(norm)
        self.progress = replace(
            before,
            step=step + 1,
            seconds=before.seconds + seconds,
            skipped=before.skipped + skipped,
            skipped_last=before.skipped_last + 1 if skipped else 0,
        )
        check_skipped(self.progress, self.steps)
        if logged:
            self._log_step(output, lr, norm)
        elif self.ranks.is_first:
            self.screen.advance(self.progress.step)
        return stop_of_ranks() or (self.stop.signum if self.ranks.size == 1 else 0)

    def _log_step(self, output: StepOutput, lr: float, norm: float) -> None:
        """Write a row of the log; its losses are the means over the ranks of this step's losses."""
        losses = gather.mean(torch.stack([loss.float() for loss in output.losses.values()])).tolist()
        if self.log is None:
            return
        step = self.progress.step
        row = {
            "step": step,
            "epoch": step * self.training.batch / self.feed.samples,
            "loss": sum(losses),
            "losses": dict(zip(output.losses, losses, strict=True)),
            "lr": lr,
            "scalars": {name: float(value) for name, value in output.scalars.items()},
            "shares": {what: {name: float(v) for name, v in of.items()} for what, of in output.shares.items()},
            "grad_norm": norm,
            **self.throughput.measure(self.training.batch),
            "memory": self.accelerator.peak_memory(),
            "skipped": self.progress.skipped,
        }
        self.log.add(row)
        self.screen.draw(format_row(row, self.steps, self.throughput.seconds_left(step)), step, self.steps)
