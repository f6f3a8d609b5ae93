"""The machines that run a config or a parallel map: the nodes of a Ray cluster, or this machine.

Imports Ray only where there is a cluster.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

from reinforce.processes.cores import Node

#: Of these one exists where torch may find a GPU.
_DEVICE_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")


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
