"""Make the datasets one by one, then run the trainings on Ray, as many in parallel as it has cores."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayError

from benchmarks.ablations.arms import WRONG, Study
from benchmarks.ablations.results import Training
from examples.demo.data import SHARE, write_wrong_captions
from reinforce.engine.plan.plan import make_plan
from reinforce.engine.run import run
from reinforce.errors import UserError
from reinforce.processes.cluster import cause_of
from reinforce.processes.signals import Stopped, StopSignal, handled_signals
from reinforce.storage import Storage
from reinforce.student.config import StudentConfig
from reinforce.student.train import build, student_job
from reinforce.terminal import Screen, format_duration
from reinforce.training.loop import run_rank
from reinforce.training.ranks import join_ranks

_TICK = 2.0
_MAX_ERRORS = 3  # after so many failed trainings no further ones are started


def make_datasets(study: Study, names: Iterable[str], start_cluster: Callable[[], None], screen: Screen) -> None:
    """Compute the missing layers of the datasets; ``start_cluster`` is called if there are any.

    Raises UserError if a run fails.
    """
    for name in names:
        if name == WRONG:
            write_wrong_captions(study.demo.source, study.wrong_shards, SHARE)
        config = study.dataset_config(name)
        plan = make_plan(config)
        if plan.pending:
            screen.log(f"dataset {name}: {len(plan.pending)} of {plan.shards} shards to do")
            start_cluster()
        summary = run(config)
        if summary.status:
            raise UserError(f"dataset {name}: {summary.message}. See `reinforce status {config.output}`.")


def train_all(trainings: Sequence[Training], done: int, on_finished: Callable[[], None], screen: Screen) -> None:
    """Run trainings on the current Ray cluster; ``done`` is the number of already finished ones, for the progress.

    ``on_finished`` is called after each. Raises UserError at the end if trainings failed, and Stopped after a signal;
    running trainings then resume from their last checkpoints next time.
    """
    for training in trainings:
        training.begin()
    queue, running, errors = deque(trainings), dict[Any, Training](), list[str]()
    progress, stop = _Progress(trainings, done), StopSignal()
    with handled_signals(stop.request), screen:
        while running or (queue and len(errors) < _MAX_ERRORS):
            while queue and len(running) < _max_parallel(queue[0].config) and len(errors) < _MAX_ERRORS:
                training = queue.popleft()
                running[_start_training(training.config)] = training
            for ref in ray.wait([*running], num_returns=1, timeout=_TICK)[0]:
                training = running.pop(ref)
                try:
                    ray.get(ref)
                except RayError as error:
                    errors.append(f"{training.name}: {cause_of(error)}")
                    screen.log(f"{training.name} failed: {cause_of(error)}")
                else:
                    progress.finish(training)
                    screen.log(f"{training.name} is finished")
                    on_finished()
            if stop.signum:
                raise Stopped(stop.signum)
            screen.draw(progress.line(running.values()), progress.steps, progress.total)
    if errors:
        left = f"; {len(queue)} were not started" if queue else ""
        raise UserError(f"{len(errors)} trainings failed{left}:\n  " + "\n  ".join(errors))


class _Progress:
    """The progress line: finished and running trainings, and the remaining time at the pace since the start."""

    def __init__(self, trainings: Sequence[Training], done: int) -> None:
        self._done, self._count = done, done + len(trainings)
        self._steps_by_name = {training.name: training.step for training in trainings}
        self.total = sum(training.steps for training in trainings)
        self._steps_before = self.steps
        self._started = time.monotonic()

    @property
    def steps(self) -> int:
        return sum(self._steps_by_name.values())

    def finish(self, training: Training) -> None:
        self._done += 1
        self._steps_by_name[training.name] = training.steps

    def line(self, running: Iterable[Training]) -> str:
        parts = [f"{self._done} of {self._count} trainings"]
        for training in running:
            self._steps_by_name[training.name] = training.step
            parts.append(f"{training.name} at {training.step:,} of {training.steps:,}")
        if (new := self.steps - self._steps_before) > 0:
            left = (time.monotonic() - self._started) / new * (self.total - self.steps)
            parts.append(f"about {format_duration(left)} left")
        return "  ".join(parts)


def _max_parallel(config: StudentConfig) -> int:
    """Return the number of trainings that the cluster can run in parallel."""
    return max(1, int(ray.cluster_resources().get("CPU", 1) // (config.train.compute.cpus or 1)))


def _start_training(config: StudentConfig) -> Any:
    compute = config.train.compute
    cpus = compute.cpus or 1
    threads = str(cpus)
    task = ray.remote(_run_training).options(
        num_cpus=cpus,
        num_gpus=compute.gpus or 0,
        max_retries=config.train.retries,  # if a worker dies, another resumes from the last checkpoint
        runtime_env={"env_vars": {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}},
    )
    return task.remote(config, os.getcwd())


def _run_training(config: StudentConfig, folder: str) -> None:
    """Train as `reinforce train` does, in a worker of Ray.

    ``folder`` is the driver's working directory, to which paths in configs are relative; other nodes may not have it.
    """
    if os.path.isdir(folder):
        os.chdir(folder)
    job = student_job(config)
    device = None if config.train.compute.gpus else "cpu"
    with join_ranks(config.train.compute, device) as ranks, Storage(job.output).lock():
        run_rank(partial(build, config), job, ranks, StopSignal())
