"""Where the training loop runs: in this process, as a rank of torchrun, or on Ray Train."""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace

from reinforce.processes.signals import StopSignal
from reinforce.settings import use_accelerator
from reinforce.storage import Storage
from reinforce.training.config import Job
from reinforce.training.loop import run_rank
from reinforce.training.ranks import join_ranks, under_torchrun
from reinforce.training.results import Results
from reinforce.training.task import Build


def launch(build: Build, job: Job, address: str | None = None) -> Results:
    """Run a training run to its end and return its results; `runs_on_ray` decides where it runs.

    Raises UserError and Stopped as `reinforce.training.loop.run_rank` does.
    """
    job = replace(job, accelerator=use_accelerator(job.accelerator))  # ranks may have another environment
    if runs_on_ray(job, address):
        from reinforce.training.ray_train import launch_on_ray

        return launch_on_ray(build, job, address)
    with contextlib.ExitStack() as stack:
        ranks = stack.enter_context(join_ranks(job.training.compute))
        ranks.run_on_first(lambda: stack.enter_context(Storage(job.output).lock()))
        return run_rank(build, job, ranks, StopSignal())


def runs_on_ray(job: Job, address: str | None) -> bool:
    """Whether there is more than one rank or an ``address`` (or RAY_ADDRESS) of a cluster; never under torchrun."""
    return not under_torchrun() and bool(job.training.compute.ranks > 1 or address or os.environ.get("RAY_ADDRESS"))
