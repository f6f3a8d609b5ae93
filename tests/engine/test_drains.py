"""Nodes that Ray drains."""

from __future__ import annotations

from reinforce.engine.driver.policy.drains import Drain, Drains


def test_each_drain_is_found_once_with_the_seconds_that_are_left() -> None:
    drains = Drains()
    assert drains.update({}, 100.0) == []
    assert drains.update({"b": 130_000, "a": 0}, 100.0) == [Drain("a", None), Drain("b", 30.0)]
    assert drains.update({"b": 130_000, "a": 0}, 110.0) == []
    assert drains.update({"c": 90_000}, 110.0) == [Drain("c", 0.0)]


def test_what_dies_on_a_drained_node_is_lost_with_the_node() -> None:
    drains = Drains()
    drains.update({"a": 0}, 100.0)
    assert drains.remaining({"a", "b"}) == {"b"}
    drains.update({}, 200.0)  # the node has ended
    assert drains.remaining({"b"}) == {"b"}
    assert drains.remaining({"a", "b"}) == {"b"}


def test_a_drain_is_reported_with_what_is_in_flight() -> None:
    assert Drain("a", 29.6).line("spot-7", 1, 2) == (
        "node spot-7 is drained and ends in 30 s (1 worker, 2 shards in flight): its workers finish these and get no "
        "others"
    )
    assert Drain("a", None).line("spot-7", 2, 1).startswith("node spot-7 is drained (2 workers, 1 shard in flight)")
