"""Ranks in processes that fork from one that has imported torch, because each import takes three seconds of CPU."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

#: An optimizer's first step imports the second; modules of tests import the last.
_PRELOADED = ["reinforce.training.launch", "torch._dynamo", "torch.utils.tensorboard", "pytest"]
#: Seconds after which ranks that wait for each other end. The longest test takes 25 on an idle machine.
_LONGEST = 400
_GRACE = 10  # seconds for writing where the threads are


def start_ranks(work: Callable[..., None], ranks: int, *arguments: Any, longest: float = _LONGEST) -> None:
    """Run ``work(rank, *arguments)`` in a process for each rank, and wait for all of them.

    After ``longest`` seconds each process writes where its threads are to standard error. Soon after, they are killed,
    and this raises TimeoutError.
    """
    multiprocessing.set_forkserver_preload(_PRELOADED)
    started = torch.multiprocessing.start_processes(
        _run, (work, longest, arguments), nprocs=ranks, join=False, start_method="forkserver"
    )
    deadline = time.monotonic() + longest + _GRACE
    while not started.join(max(0.0, deadline - time.monotonic())):
        if time.monotonic() >= deadline:
            for process in started.processes:
                process.kill()
            raise TimeoutError(f"ranks wait for each other: they have run for {longest:g} s; see standard error")


def _run(rank: int, work: Callable[..., None], longest: float, arguments: tuple[Any, ...]) -> None:
    faulthandler.dump_traceback_later(longest, file=2)
    work(rank, *arguments)
    faulthandler.cancel_dump_traceback_later()


def served_store() -> dist.TCPStore:
    """A store of a process group that this process serves, as torchrun does, at a port that nobody else can take."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def under_torchrun(rank: int, ranks: int, port: int) -> None:
    """Set the environment of a process that torchrun starts; ``port`` is that of a served store."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    place["TORCHELASTIC_USE_AGENT_STORE"] = True
    os.environ.update({name: str(value) for name, value in place.items()})


def results_of_ranks(compute: Callable[[int], Any], ranks: int, folder: Path) -> list[Any]:
    """Return what ``compute(rank)`` returns on each rank of a process group, tensors and containers of them."""
    start_ranks(_join, ranks, compute, ranks, str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(ranks)]


def _join(rank: int, compute: Callable[[int], Any], ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    torch.save(compute(rank), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
