"""The processes that train together, and what they communicate besides gradients."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from reinforce.errors import UserError
from reinforce.processes.cores import available_cores, cores_per_process, default_gpus, describe_share
from reinforce.storage import Storage
from reinforce.terminal import plural
from reinforce.training.config import Compute
from reinforce.training.distributed import gather
from reinforce.training.distributed.network import use_interface_of
from reinforce.training.distributed.rank_watch import TIMEOUT, RankWatch
from reinforce.training.stop import Stopped
from teachers.runtime.accelerator import Accelerator, best_device
from teachers.runtime.determinism import strict_flags

_LOG = logging.getLogger(__name__)
T = TypeVar("T")
#: Timeout of the control group: rank 0 may evaluate and write for longer than any collective of a step takes.
_CONTROL_TIMEOUT = timedelta(hours=12)
_SHARED_PROBE = (".tmp", "shared-output.json")
#: What rank 0 broadcasts about its work; a positive number is the signal that stopped it.
_SUCCESS, _ERROR, _USER_ERROR = 0, -1, -2


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

    def describe(self, reading: str) -> str:
        """A line about what the ranks use; ``reading`` describes the loaders of each."""
        ranks = f"{plural(self.size, 'rank')} x {describe_share(self.cpus, 0)}"
        return f"{ranks}, {reading}{' each' * (self.size > 1)}, device {self.accelerator.device.type}"

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
    device = device or _own_device(compute, gpus, local_rank, alone=not (owns_group or dist.is_initialized()))
    with strict_flags(device, compute.deterministic):
        try:
            accelerator = Accelerator(device, compute.precision)
        except ValueError as error:
            raise UserError(f"train.compute.gpus: {error}. Set train.compute.gpus to 0 to train on the CPU.") from error
        with _process_group(accelerator, owns_group, cpus, report, timeout) as ranks:
            yield ranks


def _own_device(compute: Compute, gpus: float, local_rank: int, alone: bool) -> str:
    """The device of a rank that Ray gave none: a card, else a GPU of Apple if the rank is ``alone``, or the CPU."""
    if compute.gpus != 0 and best_device() == "mps":
        if alone:
            return "mps"
        _LOG.warning("several ranks train on the CPU: torch cannot exchange gradients on mps")
    return f"cuda:{local_rank}" if gpus else "cpu"


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
