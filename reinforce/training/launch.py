"""Where the loop runs: in this process, as one of torchrun's ranks, or on the workers of Ray Train."""

from __future__ import annotations

import contextlib
import os

from reinforce.storage import Storage
from reinforce.training.loop import Job, run_rank
from reinforce.training.ranks import join, under_torchrun
from reinforce.training.results import Results
from reinforce.training.stop import Stop
from reinforce.training.task import Build


def launch(build: Build, job: Job, address: str | None = None) -> Results:
    """Train, and return what came of it.

    Runs on Ray Train or in this process, see `runs_on_ray`. Raises UserError and Stopped as the loop does.
    """
    if runs_on_ray(job, address):
        from reinforce.training.ray_train import launch_on_ray

        return launch_on_ray(build, job, address)
    with contextlib.ExitStack() as stack:
        ranks = stack.enter_context(join(job.training.compute))
        ranks.on_first(lambda: stack.enter_context(Storage(job.output).lock()))
        return run_rank(build, job, ranks, Stop())


def runs_on_ray(job: Job, address: str | None) -> bool:
    """With more than one rank, or an address (or RAY_ADDRESS) of a cluster; never where torchrun started us."""
    return not under_torchrun() and bool(job.training.compute.ranks > 1 or address or os.environ.get("RAY_ADDRESS"))
