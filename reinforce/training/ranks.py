"""The processes that train together, and what they have to tell each other beside gradients."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from reinforce.errors import UserError
from reinforce.training.config import Compute
from reinforce.training.stop import Stopped
from teachers.device import Accelerator

T = TypeVar("T")
#: Rank 0 may evaluate and write for longer than any collective of a step takes.
_PATIENCE = timedelta(hours=12)
#: What rank 0 tells of its work; else it is the signal that stopped it.
_GOOD, _FAULT, _USER = 0, -1, -2


@dataclass(frozen=True)
class Ranks:
    """This process among those of the training. ``control`` is a group on the CPU, apart from the gradients'."""

    rank: int
    size: int
    accelerator: Accelerator
    control: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    def on_first(self, work: Callable[[], T]) -> T | None:
        """Do ``work`` on rank 0 while the others wait; if it raises, all do. Returns None on the others."""
        if self.size == 1:
            return work()
        told = torch.tensor([_GOOD])
        result, fault = None, None
        if self.first:
            try:
                result = work()
            except Exception as error:
                fault = error
                told.fill_(_code(error))
        dist.broadcast(told, 0, group=self.control)
        if fault is not None:
            raise fault
        code = int(told.item())
        if code == _GOOD:
            return result
        if code == _USER:
            raise UserError("rank 0 failed: see its message")
        raise RuntimeError("rank 0 failed: see its message") if code == _FAULT else Stopped(code)

    def highest(self, value: int) -> Callable[[], int]:
        """Begin to find the highest value of all ranks; call what is returned to have it. Overlaps with a step."""
        if self.size == 1:
            return lambda: value
        shared = torch.tensor([value])
        work = dist.all_reduce(shared, dist.ReduceOp.MAX, group=self.control, async_op=True)

        def result() -> int:
            assert work is not None
            work.wait()
            return int(shared.item())

        return result

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean over the ranks of a tensor on the device."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
            values /= self.size
        return values


@contextlib.contextmanager
def join(compute: Compute, device: str | None = None) -> Iterator[Ranks]:
    """Take one's place: alone, by torchrun's environment, or in the process group that Ray Train has made.

    ``device`` is given by Ray; otherwise it follows from ``compute.gpus`` and the local rank. Raises UserError where
    the accelerator is not there.
    """
    made_here = not dist.is_initialized() and under_torchrun()
    local_rank = int(os.environ.get("LOCAL_RANK", "0")) if made_here else 0
    try:
        accelerator = Accelerator(device or (f"cuda:{local_rank}" if compute.gpus else "cpu"), compute.precision)
    except ValueError as error:
        raise UserError(f"compute.gpus: {error}. Set train.compute.gpus to 0 to train on the CPU.") from error
    if accelerator.device.type == "cuda":
        torch.cuda.set_device(accelerator.device)
    threads = torch.get_num_threads()
    torch.set_num_threads(compute.cpus)
    if made_here:
        dist.init_process_group("nccl" if accelerator.device.type == "cuda" else "gloo")
    try:
        if dist.is_initialized():
            control = dist.new_group(backend="gloo", timeout=_PATIENCE)
            yield Ranks(dist.get_rank(), dist.get_world_size(), accelerator, control)
        else:
            yield Ranks(0, 1, accelerator)
    finally:
        torch.set_num_threads(threads)
        if made_here:
            dist.destroy_process_group()


def _code(error: Exception) -> int:
    if isinstance(error, Stopped):
        return error.signum
    return _USER if isinstance(error, UserError) else _FAULT


def under_torchrun() -> bool:
    """Whether the environment names a rank, as torchrun's does."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def wrapped(model: torch.nn.Module, ranks: Ranks) -> Any:
    """The model in DistributedDataParallel, where there is more than one rank.

    Looking for unused parameters keeps DDP from regrouping gradients after its first step: a resumed training sums
    them in the same order as an undisturbed one, and a task may leave parameters unused.
    """
    if ranks.size == 1:
        return model
    return torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True, gradient_as_bucket_view=True)
