"""The CPU cores that there are, and how ranks, loader processes, trials and workers share them: defaults of configs.

A node is a mapping with its numbers of ``CPU`` and ``GPU``, as Ray reports them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

Node = Mapping[str, float]

#: From so many cores on, a core is worth less to the arithmetic than its loader process loses by sharing it.
_LEAVES_CORES = 8
_CORES_PER_LOADER = 32  # without an accelerator, where a sample takes much longer to train on than to read


def let_waiting_threads_sleep() -> None:
    """Set OpenMP's wait policy to passive, unless the environment has one. Needed before torch is imported.

    By default threads spin while they wait for each other. On a machine with other work, that work then delays every
    step of the arithmetic: a training run with two threads ran at a third of the speed.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def available_cores() -> int:
    """Number of cores that this process may use: its affinity, limited by the CPU quotas of its control groups."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = cpu_quotas(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    return max(1, min([cores, *(int(quota) for quota in quotas)]))


def cpu_quotas(groups: Path, mount: Path) -> list[float]:
    """CPU quotas, in cores, of the control groups in the file ``groups`` and of their parents; versions 1 and 2."""
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return []
    quotas = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # In a container the path may be the host's; its own group is then the mounted folder itself.
        below = PurePosixPath(group.lstrip("/"))
        for folder in (mount / controllers / parent for parent in (below, *below.parents)):
            with contextlib.suppress(OSError, ValueError):
                if (folder / "cpu.max").exists():
                    quota, period = (folder / "cpu.max").read_text().split()
                else:
                    files = (folder / f"cpu.cfs_{name}_us" for name in ("quota", "period"))
                    quota, period = (file.read_text().strip() for file in files)
                if quota not in ("max", "-1"):
                    quotas.append(int(quota) / int(period))
    return quotas


def capacity(nodes: Sequence[Node], cpus: float, gpus: float) -> int:
    """Number of processes with these CPUs and GPUs, each on one node, that the nodes can hold."""
    return sum(
        int(min(node.get("CPU", 0) // cpus, node.get("GPU", 0) // gpus if gpus else float("inf"))) for node in nodes
    )


def default_gpus(nodes: Sequence[Node]) -> float:
    """GPUs of a process: one if a node has any, else none."""
    return float(any(node.get("GPU", 0) >= 1 for node in nodes))


def cores_per_process(nodes: Sequence[Node], processes: int, gpus: float) -> int:
    """Cores of each of so many processes.

    With GPUs it is a GPU's part of the cores of its node. Otherwise it is the largest number for which all processes
    fit; if there are more processes than cores, it is 1.
    """
    if gpus:
        with_gpus = [node for node in nodes if node.get("GPU", 0) >= gpus]
        return max(1, int(min((node.get("CPU", 0) * gpus / node["GPU"] for node in with_gpus), default=1)))
    most = int(max((node.get("CPU", 0) for node in nodes), default=1))
    return next((cores for cores in range(most, 1, -1) if capacity(nodes, cores, 0) >= processes), 1)


def describe_share(cpus: float, gpus: float) -> str:
    """What a process has, such as `12 CPUs and 1 GPU`."""
    counts = [(cpus, "CPU"), *([(gpus, "GPU")] if gpus else [])]
    return " and ".join(f"{count:g} {kind}{'s' * (count != 1)}" for count, kind in counts)


def loader_processes(cores: int, accelerated: bool) -> int:
    """Loader processes of a rank with so many cores, at least 1.

    With an accelerator, reading is most of the CPUs' work: two thirds of the cores. Without one, it takes a small share
    of the time of a step.
    """
    if accelerated:
        return max(1, cores * 2 // 3)
    return 1 + cores // _CORES_PER_LOADER


def arithmetic_threads(cores: int, loaders: int, accelerated: bool) -> int:
    """Threads of a rank's arithmetic, so that they and the loader processes do not compete for cores.

    With few cores and no accelerator, all compute: a loader process is mostly idle there.
    """
    return max(1, cores - loaders) if accelerated or cores >= _LEAVES_CORES else cores
