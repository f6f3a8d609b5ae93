"""What the pool records of a worker, and the line about its workers."""

from __future__ import annotations

import pytest

from reinforce.config import Workers
from reinforce.engine.driver.pool import Slot, describe_workers
from tests.helpers.driver import Actor, pool_of, shard, started

SHARD = shard("a")


def test_a_run_names_its_workers_and_the_cores_that_few_shards_leave_idle() -> None:
    nodes = [{"CPU": 16.0}]

    def line(shards: int, limit: int = 16, **given: float) -> str:
        return describe_workers(Workers.model_validate(given).fitted_to(nodes), shards, limit, nodes)

    assert line(100) == "16 workers x 1 CPU, batches of 256 images, device cpu"
    assert line(3) == (
        "3 workers x 1 CPU, batches of 256 images, device cpu; there are 16 places for workers and 3 shards: "
        "workers.cpus=5 uses more cores"
    )
    assert line(3, 3, cpus=5) == "3 workers x 5 CPUs, batches of 256 images, device cpu"
    assert line(15) == "15 workers x 1 CPU, batches of 256 images, device cpu"
    assert line(3, 1, max=1) == "1 worker x 1 CPU, batches of 256 images, device cpu"
    gpus = [{"CPU": 96.0, "GPU": 8.0}]
    assert describe_workers(Workers().fitted_to(gpus), 2, 8, gpus) == (
        "2 workers x 12 CPUs and 1 GPU, batches of 256 images, device cuda"
    )
    automatic = describe_workers(Workers(batch="auto").fitted_to(gpus), 2, 8, gpus)
    assert automatic == "2 workers x 12 CPUs and 1 GPU, the largest batches that fit, device cuda"
    assert line(15, batch="auto") == line(15)


def test_a_worker_gets_as_many_leases_as_recycle_allows_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pool_of(monkeypatch, [slot := started()], recycle=3)
    for lease in range(3):
        assert slot.free > 0
        pool.lease(slot, SHARD)
        if lease == 0:
            pool.end_lease(next(iter(slot.leases)))
    assert (slot.free, slot.exhausted, len(slot.leases)) == (0, True, 2)


def test_a_shard_that_is_leased_again_may_have_been_quarantined_by_its_first_lease(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = pool_of(monkeypatch, [slot := started()])
    pool.lease(slot, SHARD)
    assert pool.end_lease(next(iter(slot.leases))).quarantined == SHARD.layers


def test_a_new_worker_gets_the_number_of_one_that_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pool_of(monkeypatch, [], max=4)
    pool.grow(3)
    assert [slot.index for slot in pool.slots] == [0, 1, 2]
    pool.remove(pool.slots[1])
    pool.discard(pool.slots[0])
    pool.grow(4)
    assert sorted(slot.index for slot in pool.slots) == [0, 1, 2, 3]


def test_the_pool_shrinks_by_workers_that_have_not_started_and_then_by_those_that_fail(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    good, bad, loading = started(pid=1), started(pid=2), Slot(Actor())
    pool = pool_of(monkeypatch, [good, bad, loading])
    for size, left in ((2, [good, bad]), (1, [good])):
        pool.shrink(size, {bad.id: 2})
        assert pool.slots == left


def test_no_worker_is_placed_on_an_avoided_node_unless_there_is_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    running, loading = started(), Slot(Actor())
    pool = pool_of(monkeypatch, [running, loading])
    monkeypatch.setattr("reinforce.engine.driver.pool.live_nodes", lambda: frozenset({"x"}))
    pool.avoid(frozenset({"x"}))
    assert pool.slots == [running, loading], "it is the only node"
    monkeypatch.setattr("reinforce.engine.driver.pool.live_nodes", lambda: frozenset({"x", "y"}))
    pool.avoid(frozenset({"x", "z"}))
    assert pool.slots == [running], "what has not started may be on the node"


def test_workers_on_a_drained_node_get_no_further_leases_and_others_are_started_in_their_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drained, other, late = started(), started("other"), Slot(Actor())
    pool = pool_of(monkeypatch, [drained, other], max=2, cpus=1)
    pool.lease(drained, SHARD)
    pool.drain(frozenset({"node"}))
    assert (drained.free, other.free, pool.free) == (0, 2, [other])
    assert list(drained.leases.values()) == [SHARD], "what is in flight goes on"
    pool.grow(10)
    assert len(pool.slots) == 3
    pool.shrink(2, {})
    pool.grow(2)
    assert len(pool.slots) == 3, "a worker that leaves is not counted"
    pool.end_lease(next(iter(drained.leases)))
    assert pool.free == [other]
    assert drained.info is not None
    pool.record_start(late, drained.info)
    assert (late.free, pool.free) == (0, [other]), "it has started on the drained node"
    pool.remove(drained)
    assert list(pool.leaving) == [late]


def test_a_drained_node_has_no_places_for_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [{"NodeID": name, "Alive": True, "Resources": {"CPU": 4.0}} for name in ("node", "other")]
    monkeypatch.setattr("reinforce.cluster.ray.nodes", lambda: nodes)
    pool = pool_of(monkeypatch, [], cpus=1)
    pool.grow(100)
    assert len(pool.slots) == 8
    pool.close()
    pool.drain(frozenset({"node"}))
    pool.grow(100)
    assert len(pool.slots) == 4
