"""What Ray's nodes can hold, and how Ray is found."""

from __future__ import annotations

import signal
import socket
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch

from reinforce.errors import RayEnded
from reinforce.processes.cluster import (
    ControlWatch,
    RayletWatch,
    cause_of,
    live_nodes,
    live_resources,
    ray_cluster,
)


@pytest.mark.usefixtures("ray_session")
def test_an_initialised_ray_is_used_and_left_running_and_its_live_nodes_have_their_resources() -> None:
    with ray_cluster("192.0.2.1:6379"):
        assert ray.is_initialized()
    assert ray.is_initialized()
    assert [node["CPU"] for node in live_resources()] == [2]
    assert live_nodes() == {ray.get_runtime_context().get_node_id()}


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Ray has not started here; an entry for each time that it is shut down."""
    found: list[bool] = []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: found.append(True))
    return found


@pytest.mark.usefixtures("stopped")
def test_ray_on_this_machine_has_the_cores_and_gpus_that_this_process_can_use(monkeypatch: pytest.MonkeyPatch) -> None:
    started: dict[str, Any] = {}
    monkeypatch.setattr(ray, "init", lambda **options: started.update(options))
    monkeypatch.setattr("reinforce.processes.cluster.available_cores", lambda: 16)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with ray_cluster(None):
        assert (started["address"], started["num_cpus"], started["num_gpus"]) == ("local", 16, 2)


@pytest.mark.usefixtures("stopped")
@pytest.mark.parametrize("own", [None, lambda *_: None], ids=["default", "own"])
def test_sigterm_is_handled_as_before_and_ends_a_program_without_a_handler(
    monkeypatch: pytest.MonkeyPatch, own: Any
) -> None:
    monkeypatch.setattr(ray, "init", lambda **_: signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(signum)))
    first = signal.signal(signal.SIGTERM, own or signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit, match="143") if own is None else nullcontext(), ray_cluster(None):
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == (own or signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGTERM, first)


def test_sigterm_while_ray_starts_ends_with_143_and_stops_what_ray_has_started(
    monkeypatch: pytest.MonkeyPatch, stopped: list[bool]
) -> None:
    def init(**_: object) -> None:
        signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(signum))
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(ray, "init", init)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"), ray_cluster(None):
        pytest.fail("Ray has not started")
    assert stopped
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.usefixtures("stopped")
@pytest.mark.parametrize("starts", [False, True])
def test_ray_that_does_not_start_on_a_busy_machine_is_started_once_more_and_then_one_error(
    monkeypatch: pytest.MonkeyPatch, starts: bool
) -> None:
    nodes: list[Busy] = []

    def init(**_: object) -> None:
        if len(nodes) < 1 + (not starts):
            Busy(nodes)

    monkeypatch.setattr(ray, "init", init)
    ends = nullcontext() if starts else pytest.raises(RayEnded, match=r"too busy, .* run the same command again")
    with ends, ray_cluster(None):
        assert starts
    assert [node.killed for node in nodes] == [True] * (1 + (not starts)), "what Ray had started is stopped"


class Busy(ray._private.node.Node):
    """A node of Ray whose processes do not answer in time."""

    killed = False

    def __init__(self, nodes: list[Busy]) -> None:
        nodes.append(self)
        raise Exception("The current node timed out during startup. This could happen because ...")  # as Ray does

    def kill_all_processes(self, *_: object, **__: object) -> None:
        self.killed = True


def test_the_cause_of_a_task_error_is_the_exception_that_the_task_raised() -> None:
    raised = ValueError("bad row")
    assert cause_of(ray.exceptions.RayTaskError("task", "traceback", raised)) is raised
    assert cause_of(raised) is raised


def test_a_raylet_is_watched_by_one_connection_until_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "raylet")
    monkeypatch.setattr("ray._private.worker._global_node", SimpleNamespace(raylet_socket_name=path))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        watch = RayletWatch()
        assert all(watch.is_alive() for _ in range(10))
        connection, _ = server.accept()
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
        connection.close()
        assert watch.is_alive(), "it accepts another connection"
    assert not watch.is_alive()
    watch.close()


def test_the_control_service_is_watched_though_it_has_sent_something_before_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = "{}:{}".format(*server.getsockname())
        monkeypatch.setattr("ray._private.worker._global_node", SimpleNamespace(gcs_address=address))
        watch = ControlWatch()
        assert watch.is_alive()
        connection, _ = server.accept()
        connection.sendall(b"settings of HTTP/2")
        assert all(watch.is_alive() for _ in range(10))
        connection.close()
    assert not watch.is_alive()
    watch.close()


def test_without_a_raylet_of_this_machine_there_is_nothing_to_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray._private.worker._global_node", None)
    assert RayletWatch().is_alive()
    assert ControlWatch().is_alive()
