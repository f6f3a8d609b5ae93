"""The processes that train together: how they connect, what they communicate besides gradients, and where each is.

Ranks on several hosts connect through the interface that has the address of the host. Left alone, gloo uses the address
that the name of its host resolves to. On many systems that is a loopback address, such as Debian's 127.0.1.1, which no
other host reaches. NCCL takes the first interface that is not a loopback one.

A collective that times out, of NCCL as of gloo, does not say which rank is missing. Therefore each rank counts the
places that it passes, which are the same on all ranks, and writes the last one to the store of the process group every
few seconds, from a thread. A rank that stays at one place while another is behind logs which one it waits for. If that
lasts for the time limit of collectives, the collective raises or NCCL ends the process; a wait without a collective
ends here.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import logging
import os
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist

from reinforce.errors import UserError
from reinforce.processes.cores import available_cores, cores_per_process, default_gpus
from reinforce.processes.signals import Stopped
from reinforce.storage import Storage
from reinforce.terminal import Screen
from reinforce.training import gather
from reinforce.training.config import Compute
from teachers.runtime.accelerator import Accelerator, best_device
from teachers.runtime.determinism import strict_flags

#: Variables that choose an interface, with the prefix by which NCCL takes a name as a whole.
_VARIABLES = {"GLOO_SOCKET_IFNAME": "", "NCCL_SOCKET_IFNAME": "="}
_NCCL_FILES = ("/etc/nccl.conf", "~/.nccl.conf")
_OUTSIDE = ("198.51.100.1", 9)  # of a range for documentation; no packet is sent there
#: Longest wait for the slowest rank in a step. It must exceed compiling, a stalled storage, and a slow first batch.
TIMEOUT = timedelta(hours=1)
#: Timeout of the control group: rank 0 may evaluate and write for longer than any collective of a step takes.
_CONTROL_TIMEOUT = timedelta(hours=12)
_INTERVAL = 10.0  # seconds between two messages to the store
_FIRST_WARNING = 300.0  # seconds; then whenever the time has doubled
_NAMED = 5  # ranks that a message describes
_GRACE = 120.0  # seconds after the time limit in which a collective raises by itself
_COLLECTIVE_ERROR = re.compile(r"Timed out waiting|[Cc]onnection (closed|reset) by peer|[Gg]loo|NCCL|Broken pipe")
_LIBRARIES = re.compile(r"/torch/|/lib/python3\.\d+/(?!site-packages)")  # torch and Python's own modules
_COLLECTIVES = re.compile(r"/torch/(distributed|autograd)/")
_SHARED_PROBE = (".tmp", "shared-output.json")
#: What rank 0 broadcasts about its work; a positive number is the signal that stopped it.
_SUCCESS, _ERROR, _USER_ERROR = 0, -1, -2
_LOG = logging.getLogger(__name__)
T = TypeVar("T")


def use_interface_of(address: str | None) -> None:
    """Let gloo and NCCL use the interface with this address of the host, unless the user has chosen one.

    With None it is the address from which the host reaches MASTER_ADDR. Does nothing where no interface but the
    loopback has the address.
    """
    addresses = interface_addresses()
    found = address or own_address(os.environ.get("MASTER_ADDR", ""), addresses)
    settings = []
    for name in (*_NCCL_FILES, os.environ.get("NCCL_CONF_FILE")):
        with contextlib.suppress(OSError, RuntimeError):
            settings.append(Path(name).expanduser().read_text(errors="replace") if name else "")
    os.environ.update(interface_variables(found, addresses, os.environ, "\n".join(settings)))


def interface_variables(
    address: str | None, addresses: Sequence[tuple[str, str]], environment: Mapping[str, str], nccl: str = ""
) -> dict[str, str]:
    """The variables to set for a host with ``address``; ``addresses`` are (interface, address) of the host.

    ``nccl`` is the text of NCCL's own settings, which variables of the environment would override.
    """
    names = [name for name, own in addresses if own == address]
    if not names or _is_loopback(address):
        return {}
    chosen = {*environment, *re.findall(r"^\s*(\w+)\s*=", nccl, re.MULTILINE)}
    return {key: prefix + names[0] for key, prefix in _VARIABLES.items() if key not in chosen}


def own_address(master: str, addresses: Sequence[tuple[str, str]]) -> str | None:
    """The address of this host from which it reaches the host ``master``, a name or an address.

    On the master itself its name may resolve to the loopback interface: then that of the default route, or of the
    only other interface.
    """
    for target in ((master, 9), _OUTSIDE):
        with contextlib.suppress(OSError):  # where there is no route
            family, kind, _, _, address = socket.getaddrinfo(*target, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind) as probe:
                probe.connect(address)  # sends nothing
                found = str(probe.getsockname()[0])
            if found and not _is_loopback(found):
                return found
    others = [(name, own) for name, own in addresses if not _is_loopback(own) and ":" not in own]
    return others[0][1] if len({name for name, _ in others}) == 1 else None


def interface_addresses() -> list[tuple[str, str]]:
    """(interface, address) of this host, IPv4 before IPv6."""
    return [
        (name, address.partition("%")[0])
        for version in (socket.AF_INET, socket.AF_INET6)
        for name, found in psutil.net_if_addrs().items()
        for family, address, *_ in found
        if family == version
    ]


def _is_loopback(address: str | None) -> bool:
    try:
        return address is None or ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return True


class AbsentRanks(RuntimeError):
    """Some ranks did not reach the collective in which the others wait. The message names them and where they are."""


@dataclass(frozen=True)
class RankPlace:
    """Where a rank is in its training run.

    ``count`` numbers the places of a rank, ``what`` names the place, ``since`` is when it was reached, ``frame`` the
    line of code, and ``waits`` whether the rank waits for others there. ``written`` is the time of this message,
    ``ended`` the error that ended the rank.
    """

    count: int
    what: str
    since: float
    frame: str
    waits: bool
    host: str
    pid: int
    written: float
    ended: str = ""


class RankWatch:
    """Writes this rank's place to a store, reads those of others, and reports whom it waits for."""

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        size: int,
        timeout: timedelta = TIMEOUT,
        report: Callable[[str], None] | None = None,
        interval: float | None = None,
        end_process: Callable[[int], None] = os._exit,
    ) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._limit, self._report = timeout.total_seconds(), report or Screen().log
        self._interval = min(_INTERVAL, self._limit / 5) if interval is None else interval
        self._end_process = end_process
        self._thread_id = threading.get_ident()
        self._silence = 3 * self._interval + 5  # seconds after which a rank that writes nothing counts as lost
        self._at = (0, "the start", time.time(), False)
        self._due = self._first = min(_FIRST_WARNING, self._limit / 2)  # seconds until the next report
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="rank watch")
        self._thread.start()

    def at(self, what: str, waits: bool = False) -> None:
        """Record that the rank is at ``what``, where it may wait for others; every rank calls this equally often."""
        self._at, self._due = (self._at[0] + 1, what, time.time(), waits), self._first

    def close(self, error: BaseException | None = None) -> None:
        """End the thread. ``error`` is what ended the rank."""
        self._closed.set()
        self._thread.join(2 * self._interval)
        with contextlib.suppress(RuntimeError, OSError):  # rank 0 may be gone
            if error is not None:
                self._write(f"{type(error).__name__}: {error}"[:300])

    def explain(self, error: BaseException) -> AbsentRanks | None:
        """The error that names the absent ranks, for one of a collective."""
        if not isinstance(error, RuntimeError) or not _COLLECTIVE_ERROR.search(str(error)):
            return None
        return AbsentRanks(f"{self.describe()} The error of rank {self._rank} is: {str(error).splitlines()[0][:300]}")

    def describe(self) -> str:
        """The ranks that this one waits for, and where to look."""
        try:
            places = self._read()
        except (RuntimeError, OSError):
            return (
                f"rank {self._rank} waits at {self._at[1]}, and rank 0, which keeps the list of places, cannot be "
                "reached: its process has ended or its machine is lost. See its log."
            )
        absent = absent_ranks(places, self._rank, self._size, self._silence)
        if not absent:
            return (
                f"all {self._size} ranks have arrived at {self._at[1]}, so the likely cause is the network between "
                "them: run again with NCCL_DEBUG=INFO, and check NCCL_SOCKET_IFNAME and the firewalls of the machines."
            )
        names = ", ".join(map(str, absent[:_NAMED])) + (f" and {len(absent) - _NAMED} more" * (len(absent) > _NAMED))
        lines = [describe_rank(rank, places.get(rank), self._silence) for rank in absent[:_NAMED]]
        return f"rank {self._rank} waits at {self._at[1]} for rank {names}. {' '.join(lines)}"

    def _watch(self) -> None:
        """Write this rank's place; log whom it waits for, and end the process if that has lasted for the time limit."""
        while not self._closed.wait(self._interval):
            with contextlib.suppress(RuntimeError, OSError):  # rank 0 may be gone
                self._write()
                waited, due = time.time() - self._at[2], self._due
                if waited < due:
                    continue
                self._due = next_report(waited, self._first, self._limit + _GRACE)
                if not any(place.count < self._at[0] for place in self._read().values()):
                    continue
                over = waited >= self._limit + _GRACE
                if over or self._store.add(f"reports/{self._at[0]}/{due:.2f}", 1) == 1:
                    self._report(f"{self.describe()} It has waited for {waited:,.0f} s.")
                if over:
                    self._end_process(1)  # the waiting thread is in a library that does not return

    def _write(self, ended: str = "") -> None:
        count, what, since, waits = self._at
        frame, line = sys._current_frames().get(self._thread_id), "code of libraries"
        while frame is not None:  # to the innermost one outside torch and Python
            code = frame.f_code
            waits = waits or bool(_COLLECTIVES.search(code.co_filename))
            if not code.co_filename.startswith("<") and not _LIBRARIES.search(code.co_filename):
                line = f"{'/'.join(code.co_filename.split('/')[-3:])}:{frame.f_lineno} in {code.co_name}"
                break
            frame = frame.f_back
        host, pid = socket.gethostname(), os.getpid()
        place = RankPlace(count, what, since, line, waits, host, pid, time.time(), ended)
        self._store.set(f"places/{self._rank}", json.dumps(asdict(place)))

    def _read(self) -> dict[int, RankPlace]:
        """The places of the other ranks that have written one, and this one's own."""
        self._write()
        found = {}
        for rank in range(self._size):
            if self._store.check([f"places/{rank}"]):
                found[rank] = RankPlace(**json.loads(self._store.get(f"places/{rank}")))
        return found


def next_report(waited: float, first: float, limit: float) -> float:
    """Seconds of waiting at which the next report is due, after one at ``waited``; the same on all ranks.

    Reports are due at ``first``, at twice that, and so on up to ``limit``; after it, every ``first`` seconds.
    """
    if waited >= limit:
        return waited + first
    due = first
    while due <= waited:
        due *= 2
    return min(due, limit)


def absent_ranks(places: dict[int, RankPlace], own: int, size: int, silence: float) -> list[int]:
    """The ranks that have not arrived at the place of rank ``own``.

    They are the ranks behind it; if there are none, those that have ended or have written nothing for ``silence``
    seconds; if there are none either, those that run other code at the same place.
    """
    now, here = time.time(), places[own].count
    others = [rank for rank in range(size) if rank != own]
    behind = [rank for rank in others if rank not in places or places[rank].count < here]
    lost = [rank for rank in others if rank not in places or places[rank].ended or now - places[rank].written > silence]
    busy = [rank for rank in others if rank in places and not places[rank].waits]
    return behind or lost or busy


def describe_rank(rank: int, place: RankPlace | None, silence: float) -> str:
    """A sentence about an absent rank, and one about what to look at."""
    if place is None:
        return f"Rank {rank} has not started: look at the log of its process."
    where = f"Rank {rank} (pid {place.pid} on {place.host})"
    quiet = time.time() - place.written
    if place.ended:
        return f"{where} has failed at {place.what}: {place.ended}."
    if quiet > silence:
        return (
            f"{where} has written nothing for {quiet:,.0f} s, at {place.what}: it was killed, perhaps for its memory, "
            "it holds Python's interpreter lock, or its machine is lost. Look at the logs of its process and machine."
        )
    return (
        f"{where} has been at {place.what} for {place.written - place.since:,.0f} s, in {place.frame}. Look at what it "
        f"waits for there: `py-spy dump --pid {place.pid}` on {place.host} shows its threads."
    )


@dataclass(frozen=True)
class Ranks:
    """This process as one of the ranks, with its number of cores.

    ``control`` is a process group on the CPU, separate from the gradients', ``watch`` names ranks that others wait for,
    and ``timeout`` bounds such a wait in a step.
    """

    rank: int
    size: int
    accelerator: Accelerator
    control: dist.ProcessGroup | None = None
    cpus: int = 1
    watch: RankWatch | None = None
    timeout: timedelta = TIMEOUT

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def run_on_first(self, work: Callable[[], T]) -> T:
        """Run ``work`` on rank 0 while the others wait; returns its result, which must be picklable, on every rank.

        If it raises, every rank raises: rank 0 the error itself, the others UserError, Stopped or RuntimeError.
        """
        if self.size == 1:
            return work()
        self.at("work that rank 0 does for all", waits=not self.is_first)
        return _run_on_first(work, self.control)

    def run_on_all(self, work: Callable[[], T]) -> list[T]:
        """Run ``work`` on every rank; returns the results, which must be picklable, in the order of the ranks.

        If it raises on a rank, every rank raises: that one the error itself, the others UserError, Stopped or
        RuntimeError.
        """
        if self.size == 1:
            return [work()]
        self.at("work that ranks share out")
        result, error = None, None
        try:
            result = work()
        except Exception as raised:
            error = raised
        status = _SUCCESS if error is None else _status_of(error)
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, (status, result), group=self.control)
        if error is not None:
            raise error
        for rank, (code, _) in enumerate(found):
            _raise_of(rank, code)
        return [result for _, result in found]

    @contextlib.contextmanager
    def with_tensors_of_first(self, module: torch.nn.Module, source: torch.nn.Module) -> Iterator[torch.nn.Module]:
        """Yield on each rank a module with the weights and buffers of rank 0's ``source``.

        On other ranks it is ``module``, which has its own tensors back at the end.
        """
        if self.size == 1:
            yield source
            return
        chosen = source if self.is_first else module
        tensors = [*chosen.state_dict().values()]  # not copies: they share memory with the module
        own = [tensor.clone() for tensor in tensors if not self.is_first]
        for tensor in tensors:
            shared = tensor.contiguous()
            dist.broadcast(shared, 0)
            if not self.is_first:
                tensor.copy_(shared)
        try:
            yield chosen
        finally:
            for tensor, value in zip(tensors, own, strict=False):
                tensor.copy_(value)

    def at(self, what: str, waits: bool = False) -> None:
        """Record where this rank is, for messages of ranks that wait for it; ``waits`` if it may wait there itself."""
        if self.watch is not None:
            self.watch.at(what, waits)

    def start_max(self, value: int) -> Callable[[], int]:
        """Start an asynchronous reduction to the maximum over all ranks; the returned function waits for its result.

        It fails after ``timeout``. Otherwise it would keep a process whose training run has failed from ending, because
        gloo ends its threads only when they have done their work.
        """
        if self.size == 1:
            return lambda: value
        assert self.control is not None
        shared, options = torch.tensor([value]), dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MAX  # type: ignore[assignment]
        options.timeout = self.timeout
        work = self.control.allreduce([shared], options)

        def result() -> int:
            work.wait()
            return int(shared.item())

        return result


@contextlib.contextmanager
def join_ranks(
    compute: Compute,
    device: str | None = None,
    cpus: int | None = None,
    report: Callable[[str], None] | None = None,
    timeout: timedelta = TIMEOUT,
) -> Iterator[Ranks]:
    """Set up this process as a rank: alone, from torchrun's environment, or in the process group of Ray Train.

    ``device`` and ``cpus`` are given by Ray; otherwise they follow from ``compute``, the local rank and this machine.
    ``report`` receives messages about ranks that others wait for, and ``timeout`` bounds such a wait in a step; on Ray
    Train it is that of the process group. Sets the number of torch threads to that of the rank's cores inside the
    block. Raises UserError if the accelerator does not exist, and AbsentRanks for a collective that other ranks do not
    reach.
    """
    owns_group = not dist.is_initialized() and under_torchrun()
    local_rank = int(os.environ.get("LOCAL_RANK", "0")) if owns_group else 0
    machine = {"CPU": available_cores(), "GPU": torch.cuda.device_count()}
    gpus = default_gpus([machine]) if compute.gpus is None else compute.gpus
    cpus = compute.cpus or cpus or cores_per_process([machine], gather.local_world_size() if owns_group else 1, gpus)
    if device is None:  # a card, else a GPU of Apple if the rank is alone, or the CPU
        device = f"cuda:{local_rank}" if gpus else "cpu"
        if compute.gpus != 0 and best_device() == "mps":
            if not (owns_group or dist.is_initialized()):
                device = "mps"
            else:
                _LOG.warning("several ranks train on the CPU: torch cannot exchange gradients on mps")
    with strict_flags(device, compute.deterministic):
        try:
            accelerator = Accelerator(device, compute.precision)
        except ValueError as error:
            raise UserError(f"train.compute.gpus: {error}. Set train.compute.gpus to 0 to train on the CPU.") from error
        with _process_group(accelerator, owns_group, cpus, report, timeout) as ranks:
            yield ranks


@contextlib.contextmanager
def _process_group(
    accelerator: Accelerator, owns_group: bool, cpus: int, report: Callable[[str], None] | None, timeout: timedelta
) -> Iterator[Ranks]:
    """Yield this process as a rank of the process group, which is created and destroyed here if ``owns_group``."""
    if accelerator.device.type == "cuda":
        torch.cuda.set_device(accelerator.device)
    threads = torch.get_num_threads()
    torch.set_num_threads(cpus)
    if owns_group:
        if gather.local_world_size() < int(os.environ["WORLD_SIZE"]):
            use_interface_of(None)
        dist.init_process_group("nccl" if accelerator.device.type == "cuda" else "gloo", timeout=timeout)
    try:
        if dist.is_initialized():
            control = dist.new_group(backend="gloo", timeout=_CONTROL_TIMEOUT)
            rank, size = dist.get_rank(), dist.get_world_size()
            with watching(rank, size, timeout, report) as watch:
                yield Ranks(rank, size, accelerator, control, cpus, watch, timeout)
        else:
            yield Ranks(0, 1, accelerator, cpus=cpus)
    finally:
        torch.set_num_threads(threads)
        if owns_group:
            dist.destroy_process_group()


@contextlib.contextmanager
def watching(
    rank: int, size: int, timeout: timedelta, report: Callable[[str], None] | None
) -> Iterator[RankWatch | None]:
    """Yield the watch of this rank, or None for a single rank; errors of collectives then name the absent ranks."""
    if size == 1:
        yield None
        return
    store = dist.distributed_c10d._get_default_store()
    own = store.clone() if hasattr(store, "clone") else store  # a connection that does not wait for another thread's
    watch, ended = RankWatch(dist.PrefixStore("reinforce/ranks", own), rank, size, timeout, report), None
    try:
        yield watch
    except BaseException as error:
        ended = error
        if absent := watch.explain(error):
            raise absent from error
        raise
    finally:
        watch.close(ended)


def share_from_first(work: Callable[[], T]) -> T:
    """``Ranks.run_on_first`` for code that does not know its ranks, such as a feed with many requests to a storage."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return work()
    group = dist.new_group(backend="gloo", timeout=_CONTROL_TIMEOUT)
    try:
        return _run_on_first(work, group)
    finally:
        dist.destroy_process_group(group)


def _run_on_first(work: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    shared: list[Any] = [None, _SUCCESS]
    error = None
    if dist.get_rank() == 0:
        try:
            shared[0] = work()
        except Exception as raised:
            error, shared[1] = raised, _status_of(raised)
    dist.broadcast_object_list(shared, 0, group=group)
    if error is not None:
        raise error
    _raise_of(0, shared[1])
    result: T = shared[0]
    return result


def under_torchrun() -> bool:
    """Whether the environment sets a rank, as torchrun does."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def check_output_is_shared(storage: Storage, ranks: Ranks) -> None:
    """Raise UserError if a rank does not see what rank 0 writes to the output."""
    if ranks.size == 1:
        return
    token = secrets.randbits(62) if ranks.is_first else 0
    ranks.run_on_first(lambda: storage.write_json({"token": token}, *_SHARED_PROBE))
    token = ranks.start_max(token)()
    seen = storage.read_json(*_SHARED_PROBE)
    if ranks.start_max(seen != {"token": token})():
        raise UserError(
            f"not every rank sees what another writes to {storage.url}. "
            "Set `output` to a folder that all nodes share or to an object store."
        )
    ranks.run_on_first(lambda: storage.fs.rm_file(storage.path(*_SHARED_PROBE)))


def wrap_ddp(model: torch.nn.Module, ranks: Ranks) -> Any:
    """The model in DistributedDataParallel if there is more than one rank, else the model itself.

    ``find_unused_parameters`` has two purposes: a task may leave parameters unused, and it keeps DDP from regrouping
    gradients after its first step, so that a resumed training run sums them in the same order as an uninterrupted one.
    """
    if ranks.size == 1:
        return model
    return torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True, gradient_as_bucket_view=True)


def _raise_of(rank: int, code: int) -> None:
    """Raise what the status of a rank means for the others."""
    if code == _USER_ERROR:
        raise UserError(f"rank {rank} failed: see its message")
    if code != _SUCCESS:
        raise RuntimeError(f"rank {rank} failed: see its message") if code == _ERROR else Stopped(code)


def _status_of(error: Exception) -> int:
    if isinstance(error, Stopped):
        return error.signum
    return _USER_ERROR if isinstance(error, UserError) else _ERROR
