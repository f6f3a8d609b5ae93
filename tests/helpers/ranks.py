"""Ranks in processes that fork from one that has imported torch, because each import takes three seconds of CPU."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

#: An optimizer's first step imports the second; modules of tests import the last.
_PRELOADED = ["reinforce.training.launch", "torch._dynamo", "torch.utils.tensorboard", "pytest"]


def start_ranks(work: Callable[..., None], ranks: int, *arguments: Any) -> None:
    """Run ``work(rank, *arguments)`` in a process for each rank, and wait for all of them."""
    multiprocessing.set_forkserver_preload(_PRELOADED)
    torch.multiprocessing.start_processes(work, arguments, nprocs=ranks, start_method="forkserver")


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
