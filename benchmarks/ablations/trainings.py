"""Datasets one after the other, then trainings on Ray, as many side by side as it has cores."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayError

from benchmarks.ablations.arms import WRONG, Study
from benchmarks.ablations.captions import write_wrong
from benchmarks.ablations.found import Training
from benchmarks.ablations.questions import WRONG_SHARE
from reinforce.cluster import cause_of
from reinforce.engine.plan import make_plan
from reinforce.engine.runner import run
from reinforce.errors import UserError
from reinforce.storage import Storage
from reinforce.student.config import StudentConfig
from reinforce.student.train import build, make_job
from reinforce.terminal import Screen, format_duration
from reinforce.training.loop import run_rank
from reinforce.training.ranks import join_ranks
from reinforce.training.stop import Stopped, StopSignal

_TICK = 2.0
_MOST_FAULTS = 3  # what hits so many trainings would hit the rest


def make_datasets(study: Study, names: Iterable[str], cluster: Callable[[], None], screen: Screen) -> None:
    """Compute what the datasets lack. ``cluster`` sees to it that there is a Ray, and is called where it is needed.

    Raises UserError where one cannot be made.
    """
    for name in names:
        if name == WRONG:
            write_wrong(study.demo.source, study.wrong_shards, WRONG_SHARE)
        config = study.dataset_config(name)
        plan = make_plan(config)
        if plan.pending:
            screen.log(f"dataset {name}: {len(plan.pending)} of {plan.shards} shards to do")
            cluster()
        summary = run(config)
        if summary.status:
            raise UserError(f"dataset {name}: {summary.message}. `reinforce status {config.output}` tells more.")


def train_all(trainings: Sequence[Training], done: int, ended: Callable[[], None], screen: Screen) -> None:
    """Train to the end what has not ended, on the Ray that is there; ``done`` others count as finished.

    Calls ``ended`` after each. Raises UserError at the end if some failed, Stopped after a signal, when running
    trainings are left at their last checkpoints.
    """
    for training in trainings:
        training.begin()
    queue, running, faults = deque(trainings), dict[Any, Training](), list[str]()
    progress, stop = _Progress(trainings, done), StopSignal()
    with stop.handle_signals(), screen:
        while running or (queue and len(faults) < _MOST_FAULTS):
            while queue and len(running) < _places(queue[0].config) and len(faults) < _MOST_FAULTS:
                training = queue.popleft()
                running[_submit(training.config)] = training
            for ref in ray.wait([*running], num_returns=1, timeout=_TICK)[0]:
                training = running.pop(ref)
                try:
                    ray.get(ref)
                except RayError as error:
                    faults.append(f"{training.name}: {cause_of(error)}")
                    screen.log(f"{training.name} failed: {cause_of(error)}")
                else:
                    progress.ended(training)
                    screen.log(f"{training.name} has ended")
                    ended()
            if stop.signum:
                raise Stopped(stop.signum)
            screen.draw(progress.line(running.values()), progress.steps, progress.whole)
    if faults:
        left = f"; {len(queue)} were not begun" if queue else ""
        raise UserError(f"{len(faults)} trainings failed{left}:\n  " + "\n  ".join(faults))


class _Progress:
    """What is done, what is running and how long the rest may take, by the pace of this start so far."""

    def __init__(self, trainings: Sequence[Training], done: int) -> None:
        self._done, self._count = done, done + len(trainings)
        self._taken = {training.name: training.step for training in trainings}
        self.whole = sum(training.steps for training in trainings)
        self._before = self.steps
        self._begun = time.monotonic()

    @property
    def steps(self) -> int:
        return sum(self._taken.values())

    def ended(self, training: Training) -> None:
        self._done += 1
        self._taken[training.name] = training.steps

    def line(self, running: Iterable[Training]) -> str:
        parts = [f"{self._done} of {self._count} trainings"]
        for training in running:
            self._taken[training.name] = training.step
            parts.append(f"{training.name} at {training.step:,} of {training.steps:,}")
        if (taken := self.steps - self._before) > 0:
            left = (time.monotonic() - self._begun) / taken * (self.whole - self.steps)
            parts.append(f"about {format_duration(left)} left")
        return "  ".join(parts)


def _places(config: StudentConfig) -> int:
    """Trainings that the cluster holds side by side."""
    return max(1, int(ray.cluster_resources().get("CPU", 1) // config.train.compute.cpus))


def _submit(config: StudentConfig) -> Any:
    compute = config.train.compute
    threads = str(compute.cpus)
    task = ray.remote(_train).options(
        num_cpus=compute.cpus,
        num_gpus=compute.gpus,
        max_retries=config.train.retries,  # of a worker that dies; it goes on from its checkpoint
        runtime_env={"env_vars": {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}},
    )
    return task.remote(config, os.getcwd())


def _train(config: StudentConfig, folder: str) -> None:
    """One training, as `reinforce train` does it, in a worker of Ray.

    ``folder`` is the driver's, to which paths in configs are relative; on another node it may not be there.
    """
    if os.path.isdir(folder):
        os.chdir(folder)
        sys.path[:0] = [folder] if folder not in sys.path else []
    job = make_job(config)
    with join_ranks(config.train.compute) as ranks, Storage(job.output).lock():
        run_rank(partial(build, config), job, ranks, StopSignal())
