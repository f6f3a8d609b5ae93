"""Connect to Ray, and ask for its nodes."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.core.generated.gcs_pb2 import PlacementGroupTableData
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, remove_placement_group

from reinforce.errors import RayEnded, UserError
from reinforce.processes.cores import available_cores
from reinforce.processes.signals import Terminated, terminated_by_exception

_LOG = logging.getLogger(__name__)
_TIMED_OUT = "timed out during startup"  # in what Ray raises where its processes do not answer in 30 s


@contextlib.contextmanager
def ray_cluster(address: str | None, log_to_driver: bool = True) -> Iterator[None]:
    """Use Ray as it is initialised, connect to a cluster, or start Ray on this machine and stop it at the end.

    ``address`` defaults to the environment variable RAY_ADDRESS. With ``log_to_driver``, the output of workers is
    printed here with Ray's prefix. SIGTERM is handled as before; while Ray starts, and where nothing handles it, it
    raises SystemExit with status 143. Raises UserError if there is no cluster at the address, or Ray does not start.
    """
    if ray.is_initialized():
        yield
        return
    with terminated_by_exception():
        before = signal.getsignal(signal.SIGTERM)
        try:
            try:
                _start_ray(address or os.environ.get("RAY_ADDRESS"), log_to_driver)
            except SystemExit as error:
                if error.code != signal.SIGTERM:
                    raise
                raise Terminated from None  # by Ray's handler; what Ray has started is stopped first
            _handle_sigterm(before)
            yield
        finally:
            ray.shutdown()
            _handle_sigterm(before)


def _start_ray(address: str | None, log_to_driver: bool) -> None:
    if not sys.stdout.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # Ray colours the prefix of workers' lines in files as well
    if address:
        try:
            with _package_folder():
                ray.init(address=address, logging_level=logging.WARNING, log_to_driver=log_to_driver)
        except (ConnectionError, RuntimeError) as error:
            raise UserError(f"no Ray cluster at {address}: {error}. Check --address and RAY_ADDRESS.") from error
        return
    for attempt in (1, 2):
        try:
            # ERROR, because at WARNING Ray explains token authentication, which does not apply to one machine.
            quiet = {"include_dashboard": False, "logging_level": logging.ERROR}
            # Else Ray starts a process for each core, for tasks, of which runs and training runs have none.
            os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
            import torch  # whoever starts Ray here has imported it

            # Ray counts GPUs by their drivers; those count that torch can use.
            machine = {"num_cpus": available_cores(), "num_gpus": torch.cuda.device_count()}
            with _package_folder():
                ray.init(address="local", log_to_driver=log_to_driver, **machine, **quiet)
            return
        except Exception as error:  # Ray raises this class
            if _TIMED_OUT not in str(error):
                raise
            # Kill the processes of the node that did not start. Ray has no other reference to it than the traceback.
            for frame, _ in traceback.walk_tb(error.__traceback__):
                node = frame.f_locals.get("self")
                if isinstance(node, ray._private.node.Node):
                    node.kill_all_processes(check_alive=False, allow_graceful=False)
            if attempt == 2:
                raise RayEnded(
                    "Ray did not start on this machine in half a minute, twice: the machine is too busy, or has too "
                    "little memory. End other programs, or wait for them, and run the same command again. Ray's logs "
                    "are in /tmp/ray/session_latest/logs."
                ) from error
            _LOG.warning("Ray did not start on this machine in half a minute; it is started once more")


def _handle_sigterm(handler: Any) -> None:
    """Replace the handler that ``ray.init`` installs in the main thread; that one exits with status 15."""
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


@contextlib.contextmanager
def _package_folder() -> Iterator[None]:
    """Work in the folder of this package for a moment.

    ``ray.init`` puts the working folder first on the import path of all workers, where a file such as ``pyarrow.py`` in
    the folder of a dataset would be run. Workers look custom classes up in the driver's folder by themselves.
    """
    before = os.getcwd()
    os.chdir(Path(__file__).parents[2])
    try:
        yield
    finally:
        os.chdir(before)


@dataclass
class _Watch:
    """Whether a process listens at an address, which is None where there is nothing to watch.

    One connection is kept, because Ray logs each that ends.
    """

    _family: socket.AddressFamily
    _address: Any
    _connection: socket.socket | None = None

    def is_alive(self) -> bool:
        if self._address is None:
            return True
        if self._connection is not None:
            try:
                while self._connection.recv(2**16):  # what it has sent comes before its end
                    pass
            except BlockingIOError:
                return True
            except OSError:
                pass
            self.close()
        connection = socket.socket(self._family)
        connection.settimeout(5.0)
        try:
            connection.connect(self._address)
        except OSError as error:
            connection.close()
            return not isinstance(error, (ConnectionRefusedError, FileNotFoundError))  # others: it is there, and busy
        connection.setblocking(False)
        self._connection = connection
        return True

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class RayletWatch(_Watch):
    """Whether the process of Ray that this machine needs (the raylet) runs.

    When it is gone, requests to Ray end this process after some seconds, without an exception.
    """

    def __init__(self) -> None:
        node = getattr(ray._private.worker, "_global_node", None)  # None for a client of a remote cluster
        path = getattr(node, "raylet_socket_name", None)
        super().__init__(socket.AF_UNIX, path if path is not None and os.path.isabs(path) else None)


class ControlWatch(_Watch):
    """Whether Ray's control service (GCS) runs. When it is gone, requests to it block, and end this process after a
    minute, without an exception."""

    def __init__(self) -> None:
        node = getattr(ray._private.worker, "_global_node", None)  # None for a client of a remote cluster
        host, _, port = (getattr(node, "gcs_address", None) or "").rpartition(":")
        host = host.strip("[]")
        super().__init__(socket.AF_INET6 if ":" in host else socket.AF_INET, (host, int(port)) if host else None)


def live_nodes() -> frozenset[str]:
    """Return the ids of the nodes that Ray reports as alive, in one request for all."""
    return frozenset(node["NodeID"] for node in ray.nodes() if node["Alive"])


def draining_nodes() -> dict[str, int]:
    """Return the ids of the nodes that Ray drains, with the times when they end: ms since 1970, or 0.

    Ray has no public function for it; this one is what Ray Train reads.
    """
    return dict(ray._private.state.state.get_draining_nodes())


def has_autoscaler() -> bool:
    """Return whether an autoscaler may add nodes. Ray has no public function for it; Ray Train calls this one."""
    ask = getattr(ray._private.state.state, "get_max_resources_from_cluster_config", lambda: None)
    return bool(ask())


def remove_placement_groups(actor: Any) -> None:
    """Remove the placement groups that a dead actor has created. Ray would keep them until the job ends, and has no
    public function that names the creator of one."""
    for text in ray._private.state.state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(text)
        if group.creator_actor_id == actor._actor_id.binary():
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))


def is_node_lost(error: RayError) -> bool:
    """Return whether an actor died because its node was lost or preempted, by what Ray says of it."""
    return getattr(error, "preempted", False) or "its node has died" in str(error)


def cause_of(error: Exception) -> Exception:
    """Return the exception that a task raised, without Ray's wrapper."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, Exception) else error


def live_resources(without: frozenset[str] = frozenset()) -> list[dict[str, float]]:
    """Return the resources of each live node, by name, apart from those of some nodes."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in without]
