"""What Ray's nodes can hold, and how Ray is found."""

from __future__ import annotations

from typing import Any

import pytest
import ray
import torch

from reinforce.cluster import cause_of, live_nodes, live_resources, ray_cluster


@pytest.mark.usefixtures("ray_session")
def test_an_initialised_ray_is_used_and_left_running() -> None:
    with ray_cluster("192.0.2.1:6379"):
        assert ray.is_initialized()
    assert ray.is_initialized()


@pytest.mark.usefixtures("ray_session")
def test_live_nodes_have_their_resources() -> None:
    [node] = live_resources()
    assert node["CPU"] == 2


def test_ray_on_this_machine_has_the_cores_and_gpus_that_this_process_can_use(monkeypatch: pytest.MonkeyPatch) -> None:
    started: dict[str, Any] = {}
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: started.update(options))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr("reinforce.cluster.available_cores", lambda: 16)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with ray_cluster(None):
        assert (started["address"], started["num_cpus"], started["num_gpus"]) == ("local", 16, 2)


@pytest.mark.usefixtures("ray_session")
def test_only_known_nodes_are_alive() -> None:
    assert live_nodes() == {ray.get_runtime_context().get_node_id()}


def test_the_cause_of_a_task_error_is_the_exception_that_the_task_raised() -> None:
    raised = ValueError("bad row")
    assert cause_of(ray.exceptions.RayTaskError("task", "traceback", raised)) is raised
    assert cause_of(raised) is raised
