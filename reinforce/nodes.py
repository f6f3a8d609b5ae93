"""The nodes that run a config or functions of shards: a Ray cluster, or this machine.

Imports Ray only where there is a cluster.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from reinforce.errors import StorageError, UserError
from reinforce.processes.cores import Node
from reinforce.terminal import show_progress

R = TypeVar("R")
#: Of these one exists where torch may find a GPU.
_DEVICE_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
_ATTEMPTS = 3  # at a shard whose storage fails
_IN_FLIGHT = 2  # tasks per core, so that no core waits for the driver
_TICK_SECONDS = 0.5


@contextlib.contextmanager
def cluster_of_run(address: str | None, log_to_driver: bool = True) -> Iterator[bool]:
    """Connect to the cluster at ``address`` or RAY_ADDRESS, unless Ray is initialised -> whether there is a cluster.

    Raises UserError if there is no cluster at the address.
    """
    ray = sys.modules.get("ray")
    if not (address or os.environ.get("RAY_ADDRESS") or (ray is not None and ray.is_initialized())):
        yield False
        return
    from reinforce.cluster import ray_cluster

    with ray_cluster(address, log_to_driver):
        yield True


def nodes_of_run() -> list[Node]:
    """The nodes of the initialised Ray, or of the cluster at RAY_ADDRESS, else this machine: none without a GPU."""
    with cluster_of_run(None) as has_cluster:
        if has_cluster:
            from reinforce.cluster import live_resources

            return [*live_resources()]
    if not any(map(os.path.exists, _DEVICE_FILES)):
        return []
    import torch

    return [{"GPU": torch.cuda.device_count()}]


def for_each_shard(
    function: Callable[[str], R],
    shards: Sequence[str],
    *,
    use_ray: bool = True,
    address: str | None = None,
    unit: str = "shard",
) -> Iterator[tuple[str, R]]:
    """Yield (shard, ``function(shard)``) as they finish, and show progress; ``unit`` is what is counted.

    ``function`` must be picklable: a ``functools.partial`` of a function of a module. A StorageError costs the shard an
    attempt. Raises UserError; what has finished by then stays.
    """
    calls = _in_tasks(function, shards, address) if use_ray and shards else _here(function, shards)
    yield from show_progress(calls, len(shards), unit)


def _here(function: Callable[[str], R], shards: Iterable[str]) -> Iterator[tuple[str, R]]:
    for shard in shards:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                result = function(shard)
            except StorageError as error:
                _count_failure(shard, attempt, error)
                continue
            break
        yield shard, result


def _count_failure(shard: str, attempt: int, error: StorageError) -> None:
    """Log a failed attempt. Raises UserError after the last one."""
    if attempt >= _ATTEMPTS:
        raise UserError(f"{error} Run the same command again to resume.") from error
    logging.getLogger(__name__).warning("%s: attempt %d failed: %s", shard, attempt, error)


def _in_tasks(function: Callable[[str], R], shards: Sequence[str], address: str | None) -> Iterator[tuple[str, R]]:
    """Run in tasks of one core each; results come in the order in which tasks end."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    from reinforce.cluster import cause_of, ray_cluster

    with ray_cluster(address):
        task = ray.remote(num_cpus=1, max_retries=_ATTEMPTS)(_call)
        shared = ray.put(function)
        waiting = deque((shard, 1) for shard in shards)
        running: dict[Any, tuple[str, int]] = {}
        try:
            while waiting or running:
                limit = max(1, round(_IN_FLIGHT * ray.cluster_resources().get("CPU", 1)))
                while waiting and len(running) < limit:
                    shard, attempt = waiting.popleft()
                    running[task.remote(shared, shard)] = (shard, attempt)
                ray.wait([*running], timeout=_TICK_SECONDS)
                for ref in ray.wait([*running], num_returns=len(running), timeout=0)[0]:  # all that have ended
                    shard, attempt = running.pop(ref)
                    try:
                        result = ray.get(ref)
                    except RayTaskError as error:
                        cause = cause_of(error)
                        if not isinstance(cause, StorageError):
                            raise cause if isinstance(cause, UserError) else error from None
                        _count_failure(shard, attempt, cause)
                        waiting.append((shard, attempt + 1))
                        continue
                    except RayError as error:
                        raise UserError(f"{shard}: {error} Run the same command again to resume.") from error
                    yield shard, result
        finally:
            for ref in running:
                ray.cancel(ref, force=True)


def _call(function: Callable[[str], R], shard: str) -> R:
    return function(shard)
