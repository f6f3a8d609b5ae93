"""Which worker gets which shard, what the pool records of a worker, and what a driver reports of its workers."""

from __future__ import annotations

import time

import pytest

from reinforce.config import Workers
from reinforce.engine.driver.driver import job_id, worker_progress
from reinforce.engine.driver.faults import Quarantine, Requeue, Retry, RunAlone
from reinforce.engine.driver.worker_pool import ShardQueue, Slot, describe_workers
from reinforce.engine.messages import PendingShard, WorkerId, WorkerInfo
from reinforce.engine.pulse import LeasePulse, Pulse
from schemas import Reason
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


def test_a_worker_gets_as_many_leases_as_recycle_allows_and_a_shard_that_it_had_may_have_been_quarantined(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = pool_of(monkeypatch, [slot := started()], recycle=3)
    for lease in range(3):
        assert slot.free > 0
        pool.lease(slot, SHARD, alone=lease == 0)
        if lease == 0:
            assert pool.end_lease(next(iter(slot.leases))).quarantined == SHARD.layers
    assert (slot.free, slot.exhausted, len(slot.leases)) == (0, True, 2)


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
        assert pool.slots == [*pool.free] == left


def test_no_worker_is_placed_on_an_avoided_node_unless_no_other_can_hold_one_now(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    running, loading = started(), Slot(Actor())
    pool = pool_of(monkeypatch, [running, loading], max=2, cpus=1)
    now, cpus = [time.monotonic()], {"x": 4.0, "y": 0.0}
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr(
        "reinforce.processes.cluster.ray.nodes",
        lambda: [{"NodeID": name, "Alive": True, "Resources": {"CPU": count}} for name, count in cpus.items()],
    )
    pool.avoid(frozenset({"x"}))
    assert pool.slots == [running, loading], "no worker fits on the other one"
    for cpus["y"] in (4.0, 0.0):
        now[0] += 6
        pool.avoid(frozenset({"x"}))
        assert pool.slots == [running], "what has not started may be on the node, or waits for one that has ended"
        pool.grow(2)
        assert pool.slots[-1].avoids == (frozenset({"x"}) if cpus["y"] else frozenset())
        assert [*pool.loading.values()] == pool.slots[1:]


def test_workers_on_a_drained_node_get_no_further_leases_and_others_are_started_in_their_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drained, other, late = started(), started("other"), Slot(Actor())
    pool = pool_of(monkeypatch, [drained, other], max=2, cpus=1)
    pool.lease(drained, SHARD)
    pool.drain(frozenset({"node"}))
    assert (drained.free, other.free, [*pool.free]) == (0, 2, [other])
    assert list(drained.leases.values()) == [SHARD], "what is in flight goes on"
    pool.grow(10)
    assert len(pool.slots) == 3
    pool.shrink(2, {})
    pool.grow(2)
    assert len(pool.slots) == 3, "a worker that leaves is not counted"
    pool.end_lease(next(iter(drained.leases)))
    assert [*pool.free] == [other]
    pool.record_start(late, drained.info)
    assert (late.free, [*pool.free]) == (0, [other]), "it has started on the drained node"
    pool.remove(drained)
    assert list(pool.leaving) == [late]


def test_a_drained_node_has_no_places_for_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [{"NodeID": name, "Alive": True, "Resources": {"CPU": 4.0}} for name in ("node", "other")]
    monkeypatch.setattr("reinforce.processes.cluster.ray.nodes", lambda: nodes)
    pool = pool_of(monkeypatch, [], cpus=1)
    pool.grow(100)
    assert len(pool.slots) == 8
    pool.close()
    pool.drain(frozenset({"node"}))
    pool.grow(100)
    assert len(pool.slots) == 4


def test_a_worker_is_shown_with_the_times_of_its_shards_and_stages() -> None:
    now, clock = time.time(), time.monotonic()
    slot = Slot(None, WorkerInfo(WorkerId("n" * 20, 7, "host"), "cpu", {}, log="/tmp/w.err"), index=4)
    slot.leased_at = {"a": clock - 90, "b": clock - 3}
    slot.pulse, slot.pulse_at = Pulse(50, leases=(LeasePulse("a", "decoding", 20.0, "key 'k'"),)), clock - 5
    found = worker_progress(slot)
    assert (found.worker, found.host, found.pid, found.log, found.samples) == (4, "host", 7, "/tmp/w.err", 50)
    a, b = found.shards
    assert (a.shard, a.stage, a.what) == ("a", "decoding", "key 'k'")
    assert a.leased == pytest.approx(now - 90, abs=20)
    assert a.since == pytest.approx(now - 25, abs=20)
    assert (b.shard, b.stage, b.since) == ("b", "", 0.0), "it was leased after the worker's last answer"


def test_the_job_is_that_of_ray_job_submit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert job_id() == ""
    for text, name in (('{"metadata": {"job_submission_id": "raysubmit_x"}}', "raysubmit_x"), ("[]", ""), ("{", "")):
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", text)
        assert job_id() == name


SHARDS = [shard(name) for name in "abcdefgh"]
TRIED = frozenset({WorkerId("x", 1)})


def lease(slot: Slot, leased: PendingShard, alone: bool = False) -> None:
    slot.alone, slot.draining = alone, False
    slot.leases[object()] = leased


def hand_out(queue: ShardQueue, *slots: Slot, now: float = 0.0) -> list[str]:
    """Hand out shards as the driver does -> the names of the shards that each worker has."""
    queue.hand_out(slots if queue.needs_all_slots else [slot for slot in slots if slot.free], lease, now)
    return ["".join(leased.name for leased in slot.leases.values()) for slot in slots]


def end(slot: Slot, name: str) -> None:
    slot.alone = False
    slot.leases = {ref: leased for ref, leased in slot.leases.items() if leased.name != name}


def test_each_worker_gets_two_shards_in_turns_and_one_added_first_is_leased_first() -> None:
    queue = ShardQueue(SHARDS[:5])
    queue.put_back(Requeue(SHARDS[5]))
    queue.put_back(Quarantine(SHARDS[7], "samples", Reason.SHARD_FAILED, "", SHARDS[6], 1))
    assert hand_out(queue, started(), started()) == ["fb", "ac"]
    assert len(queue) == 3


def test_a_delayed_shard_is_leased_at_its_time() -> None:
    queue, slot = ShardQueue([]), started()
    queue.put_back(Retry(SHARDS[0], 10.0, 1))
    queue.put_back(Retry(SHARDS[1], 5.0, 1))
    found = [(*hand_out(queue, slot, now=now), len(queue)) for now in (4.9, 5.0, 10.0)]
    assert found == [("", 2), ("b", 1), ("ba", 0)]


def test_a_suspect_runs_alone_in_an_idle_worker() -> None:
    queue, slots = ShardQueue(SHARDS[:4]), [started(), started()]
    queue.put_back(RunAlone(SHARDS[7]))
    for _ in range(2):
        assert hand_out(queue, *slots) == ["h", "ab"]
        assert [slot.alone for slot in slots] == [True, False]


def test_a_busy_worker_is_drained_for_each_suspect_until_it_runs_it_alone_or_another_worker_takes_it() -> None:
    queue, slots = ShardQueue(SHARDS), [started(), started(pid=2)]
    hand_out(queue, *slots)
    queue.put_back(RunAlone(shard("s")))
    end(slots[0], "a")
    end(slots[1], "b")
    assert hand_out(queue, *slots) == ["c", "de"], "the first is drained, the second continues"
    end(slots[0], "c")
    assert hand_out(queue, *slots) == ["s", "de"]
    assert [slot.alone for slot in slots] == [True, False]
    end(slots[0], "s")
    assert hand_out(queue, *slots) == ["fg", "de"]
    queue.put_back(RunAlone(shard("t")))
    queue.paused[slots[0].id] = 5.0
    hand_out(queue, *slots)
    assert [slot.draining for slot in slots] == [False, True], "a worker that is paused is not drained"
    queue.paused[slots[1].id] = 5.0
    slots.append(started(pid=3))
    assert hand_out(queue, *slots)[2] == "t"
    assert not slots[1].draining, "its pause does not keep it draining"


def test_a_retry_waits_for_another_node_else_goes_to_another_worker_and_to_the_same_if_there_is_no_other() -> None:
    queue, slots = ShardQueue(SHARDS[:1]), [started("x", 1), started("x", 2), started("y", 3)]
    slots[2].leases = {1: SHARDS[5], 2: SHARDS[6]}
    queue.put_back(Retry(SHARDS[7], 0.0, 1), TRIED)
    assert hand_out(queue, *slots, now=1.0) == ["a", "", "fg"]
    assert len(queue) == 1
    end(slots[2], "f")
    assert hand_out(queue, *slots, now=1.0) == ["a", "", "gh"]
    queue.put_back(Retry(SHARDS[1], 0.0, 1), TRIED)
    assert hand_out(queue, *slots[:2], now=1.0) == ["a", "b"], "there is one node"
    queue.put_back(Retry(SHARDS[2], 0.0, 1), TRIED)
    assert hand_out(queue, slots[0], now=1.0) == ["ac"]


def test_a_retry_goes_to_no_worker_at_which_the_last_lease_failed_while_there_are_others() -> None:
    queue, slots = ShardQueue([]), [started("y", 2), started("z", 3)]
    queue.put_back(Retry(SHARDS[0], 0.0, 1), TRIED)
    queue.hand_out(slots, lease, 1.0, failing={slots[0].id})
    assert [len(slot.leases) for slot in slots] == [0, 1]
    queue.put_back(Retry(SHARDS[1], 0.0, 1), TRIED)
    queue.hand_out(slots, lease, 1.0, failing={slot.id for slot in slots})
    assert [len(slot.leases) for slot in slots] == [1, 1]


def test_a_suspect_prefers_another_node_and_does_not_wait_for_it() -> None:
    queue = ShardQueue([])
    for number in range(2):
        queue.put_back(RunAlone(SHARDS[number]), TRIED)
    assert hand_out(queue, started("y", 3), started("x", 1), now=1.0) == ["a", "b"]


def test_a_worker_gets_no_lease_during_a_pause_or_once_it_must_be_restarted() -> None:
    queue, slot = ShardQueue(SHARDS[:2]), started()
    queue.paused[slot.id] = 5.0
    assert hand_out(queue, slot, now=4.9) == [""]
    slot.exhausted = True
    assert hand_out(queue, slot, now=5.0) == [""]
    slot.exhausted = False
    assert hand_out(queue, slot, now=5.0) == ["ab"]


def test_a_worker_on_a_drained_node_is_no_place_for_retries_or_suspects() -> None:
    leaving, here, queue = started("y", leaving=True), started("x"), ShardQueue([])
    queue.put_back(Retry(SHARDS[0], 0.0, 1), frozenset({WorkerId("x", 2)}))
    queue.put_back(RunAlone(SHARDS[1]), TRIED)
    assert hand_out(queue, leaving, here, now=1.0) == ["", "b"]
    end(here, "b")
    assert hand_out(queue, leaving, here, now=1.0) == ["", "a"]
