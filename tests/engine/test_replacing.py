"""Which results count as a success of a worker, and so as a proof against others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from reinforce.config import Failures, parse_config
from reinforce.engine.driver.policy.drains import Drains
from reinforce.engine.driver.policy.failures import FailurePolicy
from reinforce.engine.driver.pool import Pool, Slot
from reinforce.engine.driver.worker_lifecycle import WorkerHandling
from reinforce.engine.messages.results import ShardResult, WorkerInfo
from reinforce.engine.messages.task import PendingShard
from schemas import Reason


class Handling(WorkerHandling):
    """Two workers on two nodes; what is replaced is recorded."""

    def __init__(self) -> None:
        self.here, self.there = (Slot(None, WorkerInfo(node, 1, "cpu", {})) for node in "xy")
        self.policy = FailurePolicy(Failures(), {}, 10, 0)
        self.replaced: list[Slot] = []
        pool: Any = SimpleNamespace(slots=[self.here, self.there], started=[self.here, self.there])
        self.pool = pool

    def _replace(self, slot: Slot, reason: str) -> None:
        self.replaced.append(slot)

    def finish(self, slot: Slot, shard: str, refused: Reason | None) -> None:
        reason = refused.value if refused else None
        self._count_success(slot, ShardResult(shard=shard, quarantine_reason=reason, seconds=1.0, busy=0.5))


def unread(handling: Handling, *names: str) -> None:
    assert handling.here.info is not None
    for name in names:
        shard = PendingShard(name, f"{name}.tar", ("samples",))
        assert handling.policy.shard_unread(shard, Reason.SHARD_MISSING.value, handling.here.info.id, 2, 0.0)


def test_shards_that_are_missing_on_both_nodes_replace_no_worker() -> None:
    handling = Handling()
    unread(handling, *"abcde")
    for name in "abcde":
        handling.finish(handling.there, name, Reason.SHARD_MISSING)
    assert handling.replaced == []


def test_shards_that_are_missing_on_one_node_only_replace_its_worker() -> None:
    handling = Handling()
    unread(handling, *"ab")
    for name in "ab":
        handling.finish(handling.there, name, None)
    assert handling.replaced == [handling.here]


class Draining(WorkerHandling):
    """Two workers on two nodes, of which Ray may drain one or both; events and messages are recorded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("reinforce.engine.driver.pool.ray.put", lambda value: value)
        monkeypatch.setattr("reinforce.engine.driver.pool.ray.kill", lambda actor: None)
        self.pool, self.drains = (
            Pool(parse_config({"source": "a.tar", "output": "/tmp/out"}), {}, frozenset()),
            Drains(),
        )
        for node in "xy":
            self.pool.slots.append(slot := Slot(None))
            self.pool.record_start(slot, WorkerInfo(node, 1, "cpu", {}))
        self.slots = list(self.pool.slots)
        self.recorded: list[tuple[str, Any]] = []
        events: Any = SimpleNamespace(add=lambda event, **values: self.recorded.append((event, values["node"])))
        self.events = events
        self.lines: list[str] = []

    def _log(self, text: str) -> None:
        self.lines.append(text)

    def follow(self, **deadlines: int) -> None:
        self._follow_drains(deadlines)


def test_a_worker_on_a_drained_node_is_ended_once_its_leases_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    handling = Draining(monkeypatch)
    here, there = handling.slots
    shard = PendingShard("a", "a.tar", ("samples",))
    here.leases[0] = shard
    handling.pool.leases[0] = here
    handling.follow(x=0)
    handling.follow(x=0)
    assert handling.recorded == [("node_drained", "x")]
    assert len(handling.lines) == 1
    handling.pool.end_lease(0)
    handling.follow(x=0)
    assert handling.recorded[1:] == [("worker_drained", "x")]
    assert handling.pool.slots == [there]
    handling.follow(x=0, y=0)
    assert handling.pool.slots == []
    assert handling.lines[-1] == "no worker is left, because the nodes are drained; the run waits for other nodes"
