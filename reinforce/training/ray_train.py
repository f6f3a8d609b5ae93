"""Trainings on Ray Train: it starts the ranks, and starts them again when one dies; all else is the loop's own."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import threading
import time
from typing import Any

import ray

from reinforce.cluster import capacity, live_resources, ray_cluster
from reinforce.errors import UserError
from reinforce.storage import Storage
from reinforce.terminal import Screen
from reinforce.training.config import Compute
from reinforce.training.loop import Job, run_rank
from reinforce.training.ranks import join
from reinforce.training.results import Results, read_results
from reinforce.training.stop import Stop, Stopped
from reinforce.training.task import Build

_TICK = 0.2
_AGREEMENT_SECONDS = 5.0
_WAITING_SECONDS = 30.0


def launch_on_ray(build: Build, job: Job, address: str | None) -> Results:
    """Train on a cluster: the one that is initialised, the one at ``address``, or this machine.

    Ray Train restarts all ranks up to ``retries`` times; they go on from the last checkpoint in ``job.output``, which
    every node must reach. Nothing of Ray's is kept: its own storage is a folder that goes with this process.
    """
    # Ray Train would move the ranks to a folder of its own, and paths of the config would lead nowhere.
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    class Trainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            # The cleaner is for drivers that stay; where there is no dashboard to ask, it holds the end up for 10 s.
            made = super()._create_default_callbacks()
            return [callback for callback in made if type(callback).__name__ != "PlacementGroupCleanerCallback"]

    compute = job.training.compute
    store = Storage(job.output)
    # What ranks print stays in Ray's logs: Ray Train tells much. What matters comes by the desk, as plain lines.
    cluster = ray_cluster(address, log_to_driver=False)
    grows = ray.is_initialized() or bool(address or os.environ.get("RAY_ADDRESS"))
    with store.lock(), cluster, tempfile.TemporaryDirectory(prefix="reinforce-ray-") as storage:
        check_room(compute, grows)
        desk = ray.remote(num_cpus=0)(_Desk).remote()
        trainer = Trainer(
            _rank,
            train_loop_config={"build": build, "job": job, "desk": desk, "folder": os.getcwd()},
            scaling_config=ScalingConfig(
                num_workers=compute.ranks,
                use_gpu=compute.gpus > 0,
                resources_per_worker={"CPU": compute.cpus, **({"GPU": compute.gpus} if compute.gpus else {})},
            ),
            run_config=RunConfig(
                name="training",
                storage_path=storage,
                failure_config=FailureConfig(max_failures=job.training.retries),
            ),
        )
        ray.get(desk.log.remote(f"starting {compute.ranks} rank{'s' * (compute.ranks > 1)} on Ray"))
        fault = _run(trainer, desk, compute)
        faults, signum = ray.get(desk.word.remote())
        if faults:
            raise UserError(faults[min(faults)])
        if signum:
            raise Stopped(signum)
        if fault is not None:
            raise fault
    results = read_results(store)
    assert results is not None
    return results


def _run(trainer: Any, desk: Any, compute: Compute) -> Exception | None:
    """Let Ray Train work in a thread, since this one has to hear signals; returns what it raised."""
    faults: list[Exception] = []

    def work() -> None:
        try:
            trainer.fit()
        except Exception as error:
            faults.append(error)

    stop, asked, waiting = Stop(), False, time.monotonic()
    with stop.listening(), Screen() as screen:
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(_TICK)
            started = _show(desk, screen)
            if not started and time.monotonic() - waiting > _WAITING_SECONDS:
                waiting = time.monotonic()
                screen.log(f"waiting until the cluster has room for {compute.ranks} ranks, each of {_needs(compute)}")
            if stop.signum and not asked:
                desk.ask.remote(stop.signum)
                asked = True
        _show(desk, screen)
    return faults[0] if faults else None


def _show(desk: Any, screen: Screen) -> int:
    """Show what rank 0 has shown since the last time; returns how often the ranks were started."""
    lines, bar, starts = ray.get(desk.read.remote())
    for line in lines:
        screen.log(line)
    if bar is not None:
        screen.draw(*bar)
    return int(starts)


class _DeskScreen(Screen):
    """Rank 0's screen is the driver's. It waits for each word to arrive: else they might overtake each other."""

    def __init__(self, desk: Any) -> None:
        super().__init__()
        self._desk = desk

    def log(self, text: str) -> None:
        ray.get(self._desk.log.remote(text))

    def draw(self, line: str, done: float, total: float) -> None:
        ray.get(self._desk.draw.remote((line, done, total)))

    def advance(self, done: float) -> None:
        """Nothing: a message for each step would be too many."""


class _Desk:
    """Where driver and ranks leave word for each other."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._bar: tuple[str, float, float] | None = None
        self._starts = 0
        self._asked = asyncio.Event()
        self._signum = 0
        self._stopped = 0
        self._faults: dict[int, str] = {}

    async def ask(self, signum: int) -> None:
        """The driver got a signal."""
        self._signum = signum
        self._asked.set()

    async def asked(self) -> int:
        """Wait for a signal."""
        await self._asked.wait()
        return self._signum

    async def stopped(self, signum: int) -> None:
        """The ranks have written a checkpoint and ended, as they were asked to."""
        self._stopped = signum

    async def fault(self, rank: int, message: str) -> None:
        """A rank met something that the user has to mend."""
        self._faults[rank] = message

    async def start(self) -> int:
        """The ranks start; returns how often they have before."""
        self._starts += 1
        return self._starts - 1

    async def log(self, line: str) -> None:
        """A line for the driver's screen."""
        self._lines.append(line)

    async def draw(self, bar: tuple[str, float, float]) -> None:
        """The bar of the driver's screen."""
        self._bar = bar

    async def read(self) -> tuple[list[str], tuple[str, float, float] | None, int]:
        """What is to be shown since the last time, and how often the ranks were started."""
        lines, bar = self._lines, self._bar
        self._lines, self._bar = [], None
        return lines, bar, self._starts

    async def word(self) -> tuple[dict[int, str], int]:
        """Faults by rank, and the signal that ended the training, or 0."""
        return self._faults, self._stopped


def _rank(settings: dict[str, Any]) -> None:
    """What each of Ray Train's workers runs."""
    import ray.train.torch

    folder, desk, job = settings["folder"], settings["desk"], settings["job"]
    if os.path.isdir(folder):  # paths of the config, and classes of the user's own, are relative to it
        os.chdir(folder)
        sys.path[:0] = [folder] if folder not in sys.path else []
    if ray.get(desk.word.remote())[0]:
        return  # started again, but another start would not mend it
    stop = Stop()
    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    if rank == 0:
        threading.Thread(target=_hear, args=(desk, stop), daemon=True).start()
        if ray.get(desk.start.remote()):
            ray.get(desk.log.remote("all ranks were started again"))
    try:
        with join(job.training.compute, device=str(ray.train.torch.get_device())) as ranks:
            run_rank(settings["build"], job, ranks, stop, _DeskScreen(desk))
    except Stopped as stopped:
        ray.get(desk.stopped.remote(stopped.signum))
    except UserError as error:
        ray.get(desk.fault.remote(rank, str(error)))
        deadline = time.monotonic() + _AGREEMENT_SECONDS
        while time.monotonic() < deadline:
            if len(ray.get(desk.word.remote())[0]) == size:
                return
            time.sleep(_TICK)
        raise  # the other ranks wait for this one: only Ray can end them
    except Exception as error:
        ray.get(desk.log.remote(f"rank {rank} failed: {type(error).__name__}: {error}"))
        raise


def _hear(desk: Any, stop: Stop) -> None:
    stop.signum = ray.get(desk.asked.remote())


def check_room(compute: Compute, grows: bool) -> None:
    """Raise UserError where no node can hold a rank, or all of a cluster that does not grow cannot hold all ranks.

    Ray would wait for ever.
    """
    nodes = live_resources()
    places = capacity(compute.cpus, compute.gpus)
    if places == 0 or (places < compute.ranks and not grows):
        cpus, gpus = (sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
        raise UserError(
            f"there is room for {places} of {compute.ranks} ranks: each wants {_needs(compute)} on one node, and there "
            f"are {cpus:g} CPUs and {gpus:g} GPUs on {len(nodes)}. Set train.compute.ranks, cpus and gpus to fit."
        )


def _needs(compute: Compute) -> str:
    return f"{compute.cpus} CPUs and {compute.gpus:g} GPUs"
