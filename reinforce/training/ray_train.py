"""Training runs on Ray Train, which starts and restarts the ranks; the loop does everything else.

The driver shows the ranks' logs, forwards signals, and ends what cannot continue. Ray reports a silent host as dead
after about a minute. Ray Train then restarts all ranks, and waits without a limit where the hosts that are left cannot
hold them. A host may be lost before its rank has started, so all hosts that were alive when the training run began are
watched.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
import ray.train.torch
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from reinforce.errors import HostLost, RayEnded, UserError
from reinforce.processes.cluster import (
    ControlWatch,
    has_autoscaler,
    live_resources,
    ray_cluster,
    remove_placement_groups,
)
from reinforce.processes.cores import capacity, cores_per_process, default_gpus, describe_share
from reinforce.processes.imports import no_garbage_collection
from reinforce.processes.signals import Stopped, StopSignal, handled_signals
from reinforce.storage import Storage
from reinforce.terminal import Screen, plural
from reinforce.training.config import Compute, Job
from reinforce.training.loop import run_rank
from reinforce.training.mailbox import Mailbox, RankHost, Status
from reinforce.training.ranks import TIMEOUT, join_ranks, use_interface_of
from reinforce.training.results import Results, read_results
from reinforce.training.task import Build
from teachers.runtime import determinism

_INTERVAL = 2.0  # seconds between two questions to Ray
#: Seconds from the loss of a host until the training run ends, if the other hosts cannot hold its ranks by then.
_RETURN_SECONDS = 30.0
_TICK = 0.2
_WAITING_SECONDS = 30.0  # between messages while the cluster is too small
_RECEIPT_SECONDS = 30.0  # from a signal until a rank has received it; later, none runs
#: From SIGINT and other signals until the step and its checkpoint are finished. Whoever sends SIGTERM ends the machine
#: soon after, so what takes longer is left to the last checkpoint. A second SIGINT ends the training run at once.
_STOP_SECONDS, _TERMINATION_SECONDS = 600.0, 40.0
_CONTROL_SECONDS = 20.0  # without Ray's control service; Ray itself ends this process after 60
#: Callbacks of Ray Train that are not used. The cleaner is for long-lived drivers, and without a dashboard it delays
#: the end by 10 s. The others, of several versions, start an actor for Ray Data and import that in each rank.
_UNUSED_CALLBACKS = {"PlacementGroupCleanerCallback", "DatasetsCallback", "DatasetsSetupCallback"}
#: For other threads to end. One that asks Ray for something while Ray shuts down here would end this process.
_END_SECONDS = 5.0
_ALL_FAILED_SECONDS = 5.0  # wait for the other ranks to report the same user error


def live_hosts(nodes: Iterable[Mapping[str, Any]]) -> dict[str, RankHost]:
    """The hosts of those of Ray's ``nodes`` that are alive, by the ids of the nodes."""
    hosts = (
        RankHost(node["NodeID"], node["NodeManagerHostname"], node["NodeManagerAddress"])
        for node in nodes
        if node["Alive"]
    )
    return {host.node: host for host in hosts}


@dataclass(frozen=True)
class Cluster:
    """Ray's report: hosts whose nodes are dead, with their ranks, and the number of ranks that live nodes can hold.

    ``grows`` is whether an autoscaler may add nodes.
    """

    lost: Mapping[RankHost, tuple[int, ...]] = field(default_factory=dict)
    places: int = 0
    grows: bool = False


def find_lost(
    known: Iterable[RankHost], ranks: Mapping[int, RankHost], live: Collection[str], fit: bool
) -> dict[RankHost, tuple[int, ...]]:
    """Return the lost hosts with their ranks: those of ``ranks``, and others that were ``known`` if the ranks do not
    ``fit`` on the nodes in ``live``."""
    lost: dict[RankHost, tuple[int, ...]] = {}
    for rank, host in sorted(ranks.items()):
        if host.node not in live:
            lost[host] = (*lost.get(host, ()), rank)
    named = {host.node for host in lost}
    others = () if fit else (host for host in known if host.node not in live and host.node not in named)
    return lost | dict.fromkeys(others, ())


class LostHosts:
    """Decides from what Ray reports when a training run ends because of lost hosts; pure."""

    def __init__(self, ranks: int, cpus: float, gpus: float) -> None:
        self._ranks, self._share = ranks, describe_share(cpus, gpus)
        self._since: float | None = None
        self.cluster = Cluster()

    def update(self, cluster: Cluster, now: float) -> str | None:
        """Take what Ray reports; returns a line for the log when hosts have been lost since the last call."""
        before, self.cluster = self.cluster.lost, cluster
        fresh = {host: ranks for host, ranks in cluster.lost.items() if host not in before}
        if not cluster.lost:
            self._since = None
        elif self._since is None or fresh:
            self._since = now
        return f"{_names(fresh)} lost; the ranks restart once the other hosts can hold them" if fresh else None

    def error(self, now: float, failed: bool = False) -> str | None:
        """The error that ends the training run; None while it may go on. ``failed`` if Ray Train has given up."""
        if self._since is None:
            return None
        lost, fits = _names(self.cluster.lost), self.cluster.places >= self._ranks
        if fits:
            advice = "after train.retries restarts. Check the hosts"
        else:
            advice = (
                f"and the other hosts can hold {self.cluster.places} of {self._ranks} ranks with {self._share} "
                "each. Bring back what is lost, or set train.compute.ranks to fit"
            )
            failed = failed or (not self.cluster.grows and now - self._since >= _RETURN_SECONDS)
        again = "run the same command again, which resumes from the last checkpoint"
        return f"{lost} lost, {advice}; then {again}." if failed else None


def _names(lost: Mapping[RankHost, tuple[int, ...]]) -> str:
    """The hosts, with a verb."""
    names = []
    for host, ranks in lost.items():
        names.append(f"{host.name} ({', '.join([host.address, *(f'rank {rank}' for rank in ranks)])})")
    return f"host{'s' * (len(names) != 1)} {' and '.join(names)} {'was' if len(names) == 1 else 'were'}"


class HostWatch:
    """Asks Ray for its nodes every few seconds, in a thread, because the answer may take a minute."""

    def __init__(self, mailbox: Any, known: Mapping[str, RankHost], ranks: int, cpus: float, gpus: float) -> None:
        """``known`` are the hosts that were alive when the places on them were counted, by their nodes."""
        self._mailbox, self._ranks, self._cpus, self._gpus = mailbox, ranks, cpus, gpus
        self._known = {**known}
        #: What is lost by the last look: hosts on which ranks run, or ran last, or without which they have no place.
        self.decision = LostHosts(ranks, cpus, gpus)
        self._lock, self.closed = threading.Lock(), threading.Event()
        self._lines: list[str] = []
        self.thread = threading.Thread(target=self._watch, daemon=True, name="host watch")
        self.thread.start()

    def lines(self) -> list[str]:
        """Lines for the log that are new since the last call."""
        with self._lock:
            lines, self._lines = self._lines, []
        return lines

    def error(self, failed: bool = False) -> str | None:
        """The error that ends the training run, None while it may go on; with ``failed`` see ``LostHosts.error``."""
        if failed:
            with contextlib.suppress(RayError):
                self._look()
        with self._lock:
            return self.decision.error(time.monotonic(), failed)

    def _watch(self) -> None:
        while not self.closed.wait(_INTERVAL):
            with contextlib.suppress(RayError, RuntimeError, OSError):  # Ray is being shut down
                self._look()

    def _look(self) -> None:
        ranks: dict[int, RankHost] = ray.get(self._mailbox.status.remote()).hosts
        nodes = [node for node in ray.nodes() if node["Alive"]]
        live = live_hosts(nodes)
        self._known |= live
        places = capacity([node["Resources"] for node in nodes], self._cpus, self._gpus)
        lost = find_lost(self._known.values(), ranks, live, places >= self._ranks)
        found = Cluster(lost, places, bool(lost) and has_autoscaler())
        with self._lock:
            if line := self.decision.update(found, time.monotonic()):
                self._lines.append(line)


class Supervisor:
    """Runs Ray Train in a thread, because the main thread handles signals."""

    def __init__(self, mailbox: Any, hosts: Mapping[str, RankHost], ranks: int, cpus: float, gpus: float) -> None:
        """``hosts`` are those that were alive when the places on them were counted, by their nodes."""
        self._mailbox, self._ranks, self._share = mailbox, ranks, describe_share(cpus, gpus)
        self._hosts = HostWatch(mailbox, hosts, ranks, cpus, gpus)
        self._control, self._control_lost = ControlWatch(), 0.0
        self._stop, self._stopped_at, self._received = StopSignal(), 0.0, False
        self._waiting, self._started = time.monotonic(), False
        self._errors: list[Exception] = []

    def run(self, fit: Callable[[], Any]) -> None:
        """Call ``fit`` and wait for its end.

        Raises the error of ``fit``; Stopped after a signal; HostLost if a host was lost and the others cannot hold its
        ranks; RayEnded if Ray's control service has ended; and UserError for one that the ranks report.
        """
        thread = threading.Thread(target=self._call, args=(fit,), daemon=True)
        try:
            with handled_signals(self._stop.request), Screen() as screen:
                thread.start()
                while thread.is_alive():
                    thread.join(_TICK)
                    # what the ranks have sent since the last time, and what the driver waits for
                    lines, bar, starts = ray.get(self._mailbox.read_screen.remote())
                    for line in [*lines, *self._hosts.lines()]:
                        screen.log(line)
                    if bar is not None:
                        screen.draw(*bar)
                    now, self._started = time.monotonic(), starts > 0
                    if (not starts or self._hosts.decision.cluster.lost) and now - self._waiting > _WAITING_SECONDS:
                        self._waiting = now
                        screen.log(f"waiting until the cluster can hold {self._ranks} ranks with {self._share} each")
                    if thread.is_alive():
                        self._check()
            status: Status = ray.get(self._mailbox.status.remote())
            if status.user_errors:
                raise UserError(status.user_errors[min(status.user_errors)])
            if status.stopped_by:
                raise Stopped(status.stopped_by)
            if self._errors:
                lost = self._hosts.error(failed=True)
                raise self._errors[0] if lost is None else HostLost(lost) from self._errors[0]
        finally:
            self._hosts.closed.set()
            self._control.close()
            running = thread.is_alive()
            if not self._control_lost:  # else requests to it would wait
                # end Ray Train's controller and its ranks, and the mailbox, which has a reference to it
                with contextlib.suppress(RayError):
                    controller = ray.get(self._mailbox.close.remote())
                    if running and controller is not None:
                        ray.kill(controller)
                        thread.join(_END_SECONDS)  # it ends after the controller, which then reserves no more places
                        remove_placement_groups(controller)
                    ray.kill(self._mailbox)
                self._hosts.thread.join(_END_SECONDS)

    def _call(self, fit: Callable[[], Any]) -> None:
        try:
            fit()
        except Exception as error:
            self._errors.append(error)

    def _check(self) -> None:
        """Raise what ends the training run before Ray Train does."""
        now = time.monotonic()
        if error := self._hosts.error():
            raise HostLost(error)
        self._control_lost = 0.0 if self._control.is_alive() else self._control_lost or now
        if self._control_lost and now - self._control_lost > _CONTROL_SECONDS:
            raise RayEnded(
                "Ray's control service ended before the training did: its process (gcs_server) was killed, perhaps for "
                "lack of memory, or crashed. Run the same command again, which resumes from the last checkpoint."
            )
        if not self._stop.signum:
            return
        if not self._stopped_at:
            self._stopped_at = now
            self._mailbox.request_stop.remote(self._stop.signum)
        self._received = self._received or ray.get(self._mailbox.status.remote()).stop_received
        limit = _RECEIPT_SECONDS
        if self._received:
            limit = _TERMINATION_SECONDS if self._stop.signum == signal.SIGTERM else _STOP_SECONDS
        if not self._started or self._hosts.decision.cluster.lost or now - self._stopped_at > limit:
            raise Stopped(self._stop.signum)  # no rank can stop by itself


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
        ray.get(mailbox.show.remote(f"starting {plural(compute.ranks, 'rank')} on Ray, {each} each"))
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
            worker_group.execute(lambda: use_interface_of(ray.util.get_node_ip_address()))
        super().on_start(worker_group, backend_config)


class ReportController(ControllerCallback):
    """Gives the ``mailbox`` the actor of the controller, for which Ray Train has no other function."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox

    def after_controller_start(self, *_: Any) -> None:
        try:
            ray.get(self._mailbox.set_controller.remote(ray.get_runtime_context().current_actor))
        except RayError:  # the training run has ended; after an error here, Ray Train would reserve places all the same
            os._exit(1)


class _RemoteScreen(Screen):
    """Rank 0's screen, which the driver shows. It waits for each message to arrive, to keep their order."""

    def __init__(self, mailbox: Any) -> None:
        super().__init__()
        self._mailbox = mailbox

    def log(self, text: str) -> None:
        ray.get(self._mailbox.show.remote(text))

    def draw(self, line: str, done: float, total: float) -> None:
        ray.get(self._mailbox.show.remote(bar=(line, done, total)))

    def advance(self, done: float) -> None:
        """Does nothing: a message per step would be too many."""


class _RemoteLog(logging.Handler):
    """The log of a rank, which the driver shows."""

    def __init__(self, mailbox: Any) -> None:
        super().__init__()
        self._mailbox = mailbox

    def emit(self, record: logging.LogRecord) -> None:
        self._mailbox.show.remote(self.format(record))


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
    node, address = ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()
    starts = ray.get(mailbox.report_start.remote(rank, RankHost(node, socket.gethostname(), address)))
    if starts is None:
        return  # this is a restart after a user error, which a restart cannot fix, or the training run has ended
    if rank == 0:
        threading.Thread(target=_forward_stop, args=(mailbox, stop), daemon=True).start()
        if starts:
            ray.get(mailbox.show.remote("all ranks were restarted"))
    try:
        device = str(ray.train.torch.get_device())
        screen = _RemoteScreen(mailbox)
        with join_ranks(job.training.compute, device, settings["cpus"], screen.log) as ranks:
            run_rank(build, job, ranks, stop, screen)
    except Stopped as stopped:
        ray.get(mailbox.report_end.remote(rank, signum=stopped.signum))
    except UserError as error:
        ray.get(mailbox.report_end.remote(rank, user_error=str(error)))
        deadline = time.monotonic() + _ALL_FAILED_SECONDS
        while time.monotonic() < deadline:
            if len(ray.get(mailbox.status.remote()).user_errors) == size:
                return
            time.sleep(_TICK)
        raise  # the other ranks wait for this one: only Ray can end them
    except Exception as error:
        ray.get(mailbox.show.remote(f"rank {rank} failed: {type(error).__name__}: {error}"))
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
