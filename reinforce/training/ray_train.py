"""Training runs on Ray Train, which starts and restarts the ranks; the loop does everything else."""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
from dataclasses import dataclass
from typing import Any

import ray
import ray.train.torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from reinforce.cluster import live_resources, ray_cluster
from reinforce.errors import UserError
from reinforce.processes.cores import capacity, cores_per_process, default_gpus, describe_share
from reinforce.processes.imports import no_garbage_collection
from reinforce.storage import Storage
from reinforce.terminal import Screen, plural
from reinforce.training.config import Compute
from reinforce.training.distributed.host_watch import RankHost, live_hosts
from reinforce.training.distributed.mailbox import Mailbox
from reinforce.training.distributed.network import use_interface_of
from reinforce.training.distributed.rank_watch import TIMEOUT
from reinforce.training.distributed.ranks import join_ranks
from reinforce.training.distributed.supervisor import Supervisor
from reinforce.training.job import Job
from reinforce.training.loop import run_rank
from reinforce.training.record.results import Results, read_results
from reinforce.training.stop import Stopped, StopSignal
from reinforce.training.task import Build
from teachers.runtime import determinism

_TICK = 0.2
#: Callbacks of Ray Train that are not used. The cleaner is for long-lived drivers, and without a dashboard it delays
#: the end by 10 s. The others, of several versions, start an actor for Ray Data and import that in each rank.
_UNUSED_CALLBACKS = {"PlacementGroupCleanerCallback", "DatasetsCallback", "DatasetsSetupCallback"}
_ALL_FAILED_SECONDS = 5.0  # wait for the other ranks to report the same user error


@dataclass(frozen=True)
class Reserved:
    """Resources that Ray reserves for each of some processes on one node."""

    processes: int
    cpus: int
    gpus: float

    @property
    def resources(self) -> dict[str, float]:
        """The reserved resources by Ray's names."""
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}

    def __str__(self) -> str:
        return describe_share(self.cpus, self.gpus)


def reserve(compute: Compute, processes: int) -> Reserved:
    """Resources of each of so many processes: the numbers of the config, or else a share of the live nodes."""
    nodes = live_resources()
    gpus = default_gpus(nodes) if compute.gpus is None else compute.gpus
    return Reserved(processes, compute.cpus or cores_per_process(nodes, processes, gpus), gpus)


def launch_on_ray(build: Build, job: Job, address: str | None) -> Results:
    """Train on a cluster: the initialised one, the one at ``address``, or this machine.

    Ray Train restarts all ranks up to ``retries`` times; they resume from the last checkpoint in ``job.output``, which
    every node must reach. Ray's own storage is a temporary folder. Raises UserError and Stopped as
    `reinforce.training.loop.run_rank` does, UserError if the ranks do not fit on the cluster, and HostLost if they do
    not fit on the hosts that are left.
    """
    # Otherwise Ray Train runs the ranks in its own folder, where relative paths of the config are wrong.
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"

    class Trainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            made = super()._create_default_callbacks()
            used = [callback for callback in made if type(callback).__name__ not in _UNUSED_CALLBACKS]
            return [*used, ReportController(mailbox)]

    compute = job.training.compute
    storage = Storage(job.output)
    # Ray Train logs a lot; output of the ranks stays in Ray's logs, and messages for the user go through the mailbox.
    cluster = ray_cluster(address, log_to_driver=False)
    can_grow = ray.is_initialized() or bool(address or os.environ.get("RAY_ADDRESS"))
    with storage.lock(), cluster, tempfile.TemporaryDirectory(prefix="reinforce-ray-") as scratch:
        hosts = live_hosts(ray.nodes())
        each = reserve(compute, compute.ranks)
        check_capacity(each, can_grow)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        mailbox = ray.remote(num_cpus=0, scheduling_strategy=here)(Mailbox).remote()
        trainer = Trainer(
            _train_rank,
            train_loop_config={
                "work": ray.put((build, job)),  # by reference: Ray's controller would import what they need
                "cpus": each.cpus,
                "mailbox": mailbox,
                "folder": os.getcwd(),
                "log_level": logging.getLogger("reinforce").getEffectiveLevel(),
            },
            torch_config=GroupConfig(timeout_s=int(TIMEOUT.total_seconds())),
            scaling_config=ScalingConfig(
                num_workers=compute.ranks,
                use_gpu=each.gpus > 0,
                resources_per_worker=each.resources,
            ),
            run_config=RunConfig(
                name="training",
                storage_path=scratch,
                failure_config=FailureConfig(max_failures=job.training.retries),
                **environment_of_ranks(each.gpus),
            ),
        )
        ray.get(mailbox.log.remote(f"starting {plural(compute.ranks, 'rank')} on Ray, {each} each"))
        Supervisor(mailbox, hosts, each.processes, each.cpus, each.gpus).run(trainer.fit)
    results = read_results(storage)
    assert results is not None
    return results


def environment_of_ranks(gpus: float) -> dict[str, Any]:
    """The part of Ray Train's RunConfig that sets the environment of ranks on GPUs before CUDA starts.

    Versions of Ray without it start them without; a rank then sets it before its first work on CUDA.
    """
    key = "worker_runtime_env"
    return {key: {"env_vars": determinism.environment()}} if gpus and key in RunConfig.__dataclass_fields__ else {}


class GroupConfig(TorchConfig):
    """Ray's own config, with a backend that lets ranks on several hosts use the interfaces of their hosts."""

    @property
    def backend_cls(self) -> Any:
        return _Backend


class _Backend(TorchConfig().backend_cls):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Start the process group; runs in the controller."""
        if len(set(worker_group.execute(ray.util.get_node_ip_address))) > 1:
            worker_group.execute(_use_interface)
        super().on_start(worker_group, backend_config)


def _use_interface() -> None:
    use_interface_of(ray.util.get_node_ip_address())


class ReportController(ControllerCallback):
    """Gives the ``mailbox`` the actor of the controller, for which Ray Train has no other function."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox

    def after_controller_start(self, *_: Any) -> None:
        ray.get(self._mailbox.set_controller.remote(ray.get_runtime_context().current_actor))


class _RemoteScreen(Screen):
    """Rank 0's screen, which the driver shows. It waits for each message to arrive, to keep their order."""

    def __init__(self, mailbox: Any) -> None:
        super().__init__()
        self._mailbox = mailbox

    def log(self, text: str) -> None:
        ray.get(self._mailbox.log.remote(text))

    def draw(self, line: str, done: float, total: float) -> None:
        ray.get(self._mailbox.draw.remote((line, done, total)))

    def advance(self, done: float) -> None:
        """Does nothing: a message per step would be too many."""


class _RemoteLog(logging.Handler):
    """The log of a rank, which the driver shows."""

    def __init__(self, mailbox: Any) -> None:
        super().__init__()
        self._mailbox = mailbox

    def emit(self, record: logging.LogRecord) -> None:
        self._mailbox.log.remote(self.format(record))


def _train_rank(settings: dict[str, Any]) -> None:
    """The train loop that each worker of Ray Train runs."""
    folder, mailbox = settings["folder"], settings["mailbox"]
    log = logging.getLogger("reinforce")
    log.setLevel(settings["log_level"])
    log.addHandler(_RemoteLog(mailbox))
    if os.path.isdir(folder):  # paths of the config and custom classes are relative to the driver's folder
        os.chdir(folder)
    with no_garbage_collection():  # what the build needs is imported
        build, job = ray.get(settings["work"])
    stop = StopSignal()
    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    starts = ray.get(mailbox.report_start.remote(rank, RankHost.here()))
    if starts is None:
        return  # this is a restart after a user error, which a restart cannot fix, or the training run has ended
    if rank == 0:
        threading.Thread(target=_forward_stop, args=(mailbox, stop), daemon=True).start()
        if starts:
            ray.get(mailbox.log.remote("all ranks were restarted"))
    try:
        device = str(ray.train.torch.get_device())
        screen = _RemoteScreen(mailbox)
        with join_ranks(job.training.compute, device, settings["cpus"], screen.log) as ranks:
            run_rank(build, job, ranks, stop, screen)
    except Stopped as stopped:
        ray.get(mailbox.report_stopped.remote(stopped.signum))
    except UserError as error:
        ray.get(mailbox.report_user_error.remote(rank, str(error)))
        deadline = time.monotonic() + _ALL_FAILED_SECONDS
        while time.monotonic() < deadline:
            if len(ray.get(mailbox.outcome.remote())[0]) == size:
                return
            time.sleep(_TICK)
        raise  # the other ranks wait for this one: only Ray can end them
    except Exception as error:
        ray.get(mailbox.log.remote(f"rank {rank} failed: {type(error).__name__}: {error}"))
        raise


def _forward_stop(mailbox: Any, stop: StopSignal) -> None:
    stop.signum = ray.get(mailbox.wait_for_stop.remote())
    mailbox.confirm_stop.remote()


def check_capacity(each: Reserved, can_grow: bool) -> None:
    """Raise UserError if no node can hold a rank, or if a cluster that cannot grow cannot hold all ranks.

    Ray would wait forever.
    """
    nodes = live_resources()
    places = capacity(nodes, each.cpus, each.gpus)
    if places == 0 or (places < each.processes and not can_grow):
        cpus, gpus = (sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
        raise UserError(
            f"the cluster can hold {places} of {each.processes} ranks: each needs {each} on one node, and "
            f"{len(nodes)} nodes have {cpus:g} CPUs and {gpus:g} GPUs. Set train.compute.ranks, cpus and gpus to fit."
        )
