"""Which results count as a success of a worker, and so as a proof against others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from reinforce.config import Failures
from reinforce.engine.failures import FailurePolicy
from reinforce.engine.outcome import ShardResult, WorkerInfo
from reinforce.engine.plan import PendingShard
from reinforce.engine.pool import Slot
from reinforce.engine.replacing import WorkerHandling
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

    def finish(self, slot: Slot, shard: str, given_up: Reason | None) -> None:
        reason = given_up.value if given_up else None
        self._count_success(slot, ShardResult(shard, (), 0, {}, reason, 1.0, 0.5, 0, {}))


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
