"""Which workers are ended: those that results prove to be at fault, and those of drained nodes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorUnavailableError

from reinforce.config import parse_config
from reinforce.dataset.store import Store
from reinforce.engine.driver.driver import Driver
from reinforce.engine.driver.worker_pool import Slot
from reinforce.engine.messages import ShardFailure, ShardResult, WorkerId, WorkerInfo
from reinforce.engine.plan.plan import LayerState, Plan
from reinforce.engine.preflight.check_machines import heic_note
from reinforce.engine.record import ProgressScreen
from reinforce.processes.imports import reads_heic
from schemas import Reason
from tests.helpers.driver import Actor, pool_of, shard, started

MISSING = Reason.SHARD_MISSING.value


class Workers:
    """A driver with one worker on each of the nodes x and y. Nothing runs in them."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        config = parse_config({"source": "a.tar", "output": str(folder)})
        self.lines: list[str] = []
        progress = ProgressScreen()
        monkeypatch.setattr(progress, "log", self.lines.append)
        monkeypatch.setattr("reinforce.engine.driver.driver.live_resources", list)
        self.here, self.there = started("x"), started("y")
        self.pool = pool_of(monkeypatch, [self.here, self.there])
        plan = Plan(config, {}, 10, {"samples": LayerState(0, 0, 0, 10)}, [])
        self.driver = Driver(plan, Store(config.output), progress)
        self.driver.pool = self.pool

    def lease(self, slot: Slot, name: str) -> Any:
        self.pool.lease(slot, shard(name))
        return next(reversed(slot.leases))

    def events(self, kind: str) -> int:
        return self.driver.events.digest.counts[kind]


@pytest.fixture
def workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workers:
    return Workers(tmp_path, monkeypatch)


@pytest.mark.parametrize(("reason", "replaced"), [(MISSING, 0), (None, 1)])
def test_shards_that_are_missing_on_one_node_replace_its_worker_unless_they_are_missing_on_the_other_as_well(
    workers: Workers, reason: str | None, replaced: int
) -> None:
    for name in "abcde":
        assert workers.driver.policy.read_failed(shard(name), MISSING, workers.here.id, 2, 0.0)
    for name in "abcde":
        result = ShardResult(shard=name, quarantine_reason=reason, seconds=1.0)
        workers.driver.record_success(workers.there, result)
    assert workers.events("worker_replaced") == replaced
    assert workers.pool.slots == ([workers.there] if replaced else [workers.here, workers.there])


def test_workers_that_lack_a_decoder_of_the_driver_are_named_once_before_they_get_a_shard(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    for pid, (node, reads) in enumerate((("x", reads_heic()), ("y", not reads_heic()), ("z", not reads_heic()))):
        info = WorkerInfo(WorkerId(node, pid, f"host-{node}"), "cpu", {}, reads_heic=reads)
        monkeypatch.setattr("reinforce.engine.driver.driver.ray.get", lambda _, info=info: info)
        workers.pool.loading["start"] = Slot(Actor())
        assert workers.driver.finish_start("start") == info
    assert workers.driver.policy.notes == [heic_note("workers, the first on host-y")]


def test_the_shards_of_a_worker_that_is_replaced_are_leased_again_first(workers: Workers) -> None:
    workers.lease(workers.here, "beside")
    for name in "abc":
        error = ShardFailure("RuntimeError: device-side assert", True)
        workers.driver.record_failure(workers.here, shard(name), error)
    assert workers.pool.slots == [workers.there]
    assert (len(workers.driver.queue), dict(workers.driver.totals.retries)) == (1, {"worker lost": 1})
    assert workers.lines == [
        "a worker is replaced, pid 1 on x: 3 leases in a row have failed at it; the last error: RuntimeError: "
        "device-side assert"
    ]


def test_a_worker_on_a_drained_node_is_ended_once_its_leases_have_ended(workers: Workers) -> None:
    ref = workers.lease(workers.here, "a")
    for _ in range(2):
        workers.driver.follow_drains({"x": 0})
    assert workers.events("node_drained") == 1
    assert workers.lines == [
        "node x is drained (1 worker, 1 shard in flight): its workers finish these and get no others"
    ]
    workers.pool.end_lease(ref)
    workers.driver.follow_drains({"x": 0})
    assert workers.events("worker_drained") == 1
    assert workers.pool.slots == [workers.there]
    workers.driver.follow_drains({"x": 0, "y": 0})
    assert workers.pool.slots == []
    assert workers.lines[-1] == "no worker is left, because the nodes are drained; the run waits for other nodes"


def test_a_host_whose_workers_do_not_answer_is_silent_until_they_do_or_it_is_known_to_be_lost(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [time.monotonic()]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    for name in "ab":
        workers.lease(workers.there, name)

    def silent(seconds: float) -> dict[str, int]:
        now[0] += seconds
        workers.driver.poll()
        return dict(workers.driver.snapshot(now[0]).silent)

    assert silent(6) == {}, "both are asked"
    assert silent(14) == {}, "a worker may be slow"
    assert silent(2) == {"y": 2}, "x has no shard"
    workers.pool.polls.answered(workers.there)
    assert silent(6) == {}, "it is asked again"
    assert silent(16) == {"y": 2}
    workers.driver.record_death(workers.there, ActorUnavailableError("cannot be reached", b"0" * 16))
    assert silent(1) == {"y": 2}, "Ray has not reported the node yet"
    workers.driver.policy.judge_deaths(now[0], lambda: ["x"])
    assert silent(1) == {}
