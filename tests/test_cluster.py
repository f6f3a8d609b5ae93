"""What Ray's nodes can hold, and how Ray is found."""

from __future__ import annotations

import pytest
import ray

from reinforce.cluster import capacity, cause_of, is_node_alive, live_resources, ray_cluster


@pytest.mark.usefixtures("ray_session")
def test_an_initialised_ray_is_used_and_left_running() -> None:
    with ray_cluster("192.0.2.1:6379"):
        assert ray.is_initialized()
    assert ray.is_initialized()


@pytest.mark.usefixtures("ray_session")
def test_capacity_counts_processes_that_fit_on_one_node() -> None:
    [node] = live_resources()
    assert node["CPU"] == 2
    assert [capacity(cpus, 0) for cpus in (0.5, 1, 2, 3)] == [4, 2, 1, 0]
    assert capacity(1, 1) == node.get("GPU", 0) // 1


@pytest.mark.usefixtures("ray_session")
def test_only_known_nodes_are_alive() -> None:
    assert is_node_alive(ray.get_runtime_context().get_node_id())
    assert not is_node_alive("f" * 56)


def test_the_cause_of_a_task_error_is_the_exception_that_the_task_raised() -> None:
    raised = ValueError("bad row")
    assert cause_of(ray.exceptions.RayTaskError("task", "traceback", raised)) is raised
    assert cause_of(raised) is raised
