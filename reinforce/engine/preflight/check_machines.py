"""What a run would use: the code of its config and the places that it reaches, of which nothing is imported or opened;
and whether its machines have what it needs: shared memory, disks, cores for each GPU."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reinforce.config import Config, Workers
from reinforce.processes.cores import Node, available_cores, capacity
from reinforce.processes.imports import HEIC_HINT, reads_heic
from reinforce.processes.parallel import cluster_of_run, nodes_of_run
from reinforce.storage import Storage
from reinforce.terminal import first_names, format_bytes, plural
from teachers.redact import CONTAINER_SCHEMES

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/\s,'\"]*)")
_LIST_BYTES = 2**20  # of a text file of URLs
_SHM = "/dev/shm"  # noqa: S108
_SHM_BYTES = 2**30  # Ray moves its object store to the disk below some hundred megabytes; Docker's default is 64 MiB
_FULL = 0.95  # Ray starts no work on a node whose disk is used above that
_ASKING_SECONDS = 20.0


@dataclass(frozen=True)
class Uses:
    """Custom classes, which are imported and run, and places: hosts and buckets by scheme, and model hubs."""

    classes: tuple[str, ...]
    places: tuple[str, ...]

    def lines(self, every: bool = True) -> list[str]:
        """One line each, for people; unless ``every``, none for a config that only uses this machine."""
        if not (every or self.classes or self.places):
            return []
        code = f"runs the code of {', '.join(self.classes)}" if self.classes else "runs no code of its own"
        return [f"this config {code}", f"it reaches {', '.join(self.places) or 'no other machine'}"]


def config_uses(config: Config) -> Uses:
    """List what a run of the config would use, without importing or opening anything but local lists of URLs."""
    values = config.model_dump(mode="json", by_alias=True)
    found = [place for text in _texts(values) for place in _places(text)]
    for text in _texts([config.source, config.reinforcements]):
        path = Path(text).expanduser()
        if text.endswith(".txt") and path.is_file():
            with path.open("rb") as file:
                found += _places(file.read(_LIST_BYTES).decode("utf-8", "replace"))
    found += [host for of in config.models.values() for spec in of.values() for host in spec.hosts()]
    return Uses(tuple(config.classes), tuple(sorted(set(found))))


def _texts(value: Any) -> Iterator[str]:
    """Every text in nested mappings and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in (*value.keys(), *value.values()):
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)


def _places(text: str) -> Iterator[str]:
    """The scheme and host or bucket of every URL in a text, without users and passwords."""
    for scheme, authority in _URL.findall(text):
        if scheme.lower() not in ("file", "local"):
            host = authority if scheme.lower() in CONTAINER_SCHEMES else authority.rpartition("@")[2]
            yield f"{scheme.lower()}://{host}"


@dataclass(frozen=True)
class Machine:
    """One node: what Ray may use of it, its free memory and disk, and its decoders; None where it did not answer."""

    name: str
    resources: Node
    shm_bytes: int | None = None
    disk_used: float | None = None
    reads_heic: bool | None = None


@contextlib.contextmanager
def machines_of_plan(address: str | None) -> Iterator[Callable[[], Sequence[Machine]]]:
    """Connect to the cluster at ``address`` or RAY_ADDRESS, unless Ray is initialised -> the machines that a run would
    use: those of the cluster, else this one.

    Raises UserError if there is no cluster at the address.
    """
    with cluster_of_run(address, log_to_driver=False) as has_cluster:
        yield cluster_machines if has_cluster else this_machine


def this_machine() -> list[Machine]:
    resources = {"CPU": available_cores(), **dict(*nodes_of_run()[:1])}
    return [Machine("this machine", resources, *look(_ray_folder()))]


def cluster_machines() -> list[Machine]:
    """The live nodes of the cluster that Ray is connected to."""
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    remote, refs = ray.remote(num_cpus=0, max_retries=0)(look), []
    for node in nodes:
        place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        refs.append(remote.options(scheduling_strategy=place).remote(_ray_folder()))
    done = set(ray.wait(refs, num_returns=len(refs), timeout=_ASKING_SECONDS)[0]) if refs else set()
    machines = []
    for node, ref in zip(nodes, refs, strict=True):
        answer: tuple[Any, ...] = ()  # of a node that does not answer in time
        with contextlib.suppress(RayError):
            answer = ray.get(ref) if ref in done else ()
        if ref not in done:
            ray.cancel(ref, force=True)
        machines.append(Machine(f"node {node['NodeManagerHostname']}", node["Resources"], *answer))
    return machines


def look(folder: str) -> tuple[int | None, float | None, bool]:
    """Bytes of shared memory, the used share of the disk with ``folder``, and whether HEIC is read, where it runs."""
    memory, disk = (shutil.disk_usage(path) if os.path.isdir(path) else None for path in (_SHM, folder))
    return memory and memory.total, disk and 1 - disk.free / disk.total, reads_heic()


def _ray_folder() -> str:
    return os.environ.get("RAY_TMPDIR", "/tmp")  # noqa: S108


def count_workers(machines: Sequence[Machine], workers: Workers) -> int:
    """Workers that the machines hold, at most `workers.max`."""
    held = capacity([machine.resources for machine in machines], workers.cores, workers.gpus or 0)
    return held if workers.max is None else min(held, workers.max)


def machine_warnings(machines: Sequence[Machine], workers: Workers, output: str, written: int | None) -> list[str]:
    """Shortages of the machines, one line each."""
    warnings = []
    for machine in machines:
        if machine.shm_bytes is not None and machine.shm_bytes < _SHM_BYTES:
            warnings.append(
                f"{machine.name}: {_SHM} has {format_bytes(machine.shm_bytes)}; Ray then keeps its objects on the "
                "disk. Start containers with --shm-size=2g or more."
            )
        if machine.disk_used is not None and machine.disk_used > _FULL:
            warnings.append(
                f"{machine.name}: the disk of Ray's temporary folder is {machine.disk_used:.0%} full; Ray starts no "
                f"work above {_FULL:.0%}. Free space, or set RAY_TMPDIR."
            )
        if machine.shm_bytes is None and machine.disk_used is None:
            warnings.append(f"{machine.name} did not answer: its shared memory and disk are not checked")
    held = count_workers(machines, workers)
    if held < workers.min:
        room = f"room for {plural(held, 'worker')} of {workers.describe()} at a time"
        warnings.append(f"{room}, and workers.min is {workers.min:,}")
    if others := [machine.name for machine in machines if machine.reads_heic not in (None, reads_heic())]:
        warnings.append(heic_note(first_names(others)))
    # Whether a local output has room; of object stores nothing is known.
    store: Any = Storage(output)
    folder = os.path.abspath(store.root)
    while store.local and not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    if store.local and written is not None and written >= (free := shutil.disk_usage(folder).free):
        room = f"{folder} has {format_bytes(free)} free, and {format_bytes(written)} are to be written"
        warnings.append(f"{socket.gethostname()}: {room}")
    return warnings


def heic_note(where: str) -> str:
    """A line about nodes that have the decoder of HEIC which this machine lacks, or lack the one that it has."""
    if reads_heic():
        return f"{where}: no pillow-heif, which this machine has, so HEIC images are quarantined there. {HEIC_HINT}"
    return f"{where}: pillow-heif, which this machine lacks, so HEIC files in folders are not listed. {HEIC_HINT}"
