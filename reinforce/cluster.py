"""Ray as a run, a training or a tuning finds it, and what its nodes can hold."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterator

import ray

from reinforce.errors import UserError


@contextlib.contextmanager
def ray_cluster(address: str | None, log_to_driver: bool = True) -> Iterator[None]:
    """Ray as a run finds it: initialised, at an address, or started here and ended with the run.

    ``log_to_driver`` lets what workers print appear here, under Ray's prefix.
    """
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS")
    if address:
        try:
            ray.init(address=address, logging_level=logging.WARNING, log_to_driver=log_to_driver)
        except (ConnectionError, RuntimeError) as error:
            raise UserError(f"no Ray cluster at {address}: {error}") from error
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        # On ERROR, since on WARNING Ray explains its token authentication, which nobody meets on one machine.
        quiet = {"include_dashboard": False, "logging_level": logging.ERROR}
        ray.init(address="local", num_cpus=cores, log_to_driver=log_to_driver, **quiet)
    try:
        yield
    finally:
        ray.shutdown()


def is_node_alive(node: str) -> bool:
    """Whether Ray reports the node as alive."""
    return any(n["NodeID"] == node and n["Alive"] for n in ray.nodes())


def cause_of(error: Exception) -> Exception:
    """The error a task raised, out of Ray's wrapping."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, Exception) else error


def capacity(cpus: float, gpus: float) -> int:
    """Number of processes, each with this many CPUs and GPUs on one node, that the live nodes can hold."""
    return sum(
        int(min(node.get("CPU", 0) // cpus, node.get("GPU", 0) // gpus if gpus else math.inf))
        for node in live_resources()
    )


def live_resources() -> list[dict[str, float]]:
    """Resources of each live node, by name."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
