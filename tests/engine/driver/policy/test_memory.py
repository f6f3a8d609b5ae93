"""Workers that are killed for their memory: each sentence of policy/memory.py."""

from __future__ import annotations

import random

import pytest

from reinforce.config import Failures
from reinforce.engine.driver.policy.decisions import Decision, EndedWorker, Quarantine, Requeue, RunAlone
from reinforce.engine.driver.policy.failures import FailurePolicy
from reinforce.engine.driver.policy.memory import MemoryDeaths, MemoryUse
from reinforce.engine.messages.results import WorkerId
from reinforce.engine.messages.task import PendingShard
from reinforce.errors import UserError
from schemas import Reason
from tests.helpers.driver import SAMPLES_ONLY, shard

A, B = map(shard, "ab")
LEAK = MemoryUse(1_200_000_000, 9_870_000_000, 17)
FRESH = MemoryUse(1_200_000_000, 1_200_000_000, 0)
WORKER = WorkerId("node", 12, "host-a")


@pytest.fixture
def policy() -> FailurePolicy:
    return FailurePolicy(Failures(solo_attempts=1), SAMPLES_ONLY, 30, 0)


def kill(
    policy: FailurePolicy, *shards: PendingShard, use: MemoryUse = LEAK, alone: bool = False, neighbours: int = 0
) -> list[Decision]:
    worker = EndedWorker(WORKER, shards, alone, use, neighbours)
    policy.worker_died(worker, "Memory on the node was low", 0.0, process_dead=True, memory=True)
    [verdict] = policy.judge_deaths(0.0, lambda: {"node"})
    return list(verdict.decisions)


def test_a_leaking_worker_costs_no_shard_however_often_it_is_killed(policy: FailurePolicy) -> None:
    rng = random.Random(0)
    for _ in range(100):
        policy.lease_returned("x", WORKER, False, 0.0, 2)
        if rng.random() < 0.5:
            assert kill(policy, A, B) == [Requeue(A), Requeue(B)]
        else:
            assert kill(policy, A, alone=True) == [RunAlone(A)]
    policy.memory.check(2)


@pytest.mark.parametrize(("neighbours", "deaths"), [(0, 3), (3, 9)])
def test_a_shard_that_kills_new_workers_alone_three_times_is_quarantined_and_beside_others_after_nine(
    policy: FailurePolicy, neighbours: int, deaths: int
) -> None:
    assert kill(policy, A, B, use=FRESH) == [RunAlone(A), RunAlone(B)]
    decisions = [kill(policy, A, use=FRESH, alone=True, neighbours=neighbours)[0] for _ in range(deaths)]
    assert decisions[:-1] == [RunAlone(A)] * (deaths - 1)
    assert isinstance(decisions[-1], Quarantine)
    assert decisions[-1].reason == Reason.SHARD_CRASHED
    assert "it needs more memory than there is: Memory on the node was low" in decisions[-1].detail


def test_the_message_names_the_worker_its_growth_per_shard_and_the_fix(policy: FailurePolicy) -> None:
    for _ in range(2):
        kill(policy, A, B)
    assert policy.notes == []
    kill(policy, A, B)
    assert policy.notes == [
        "3 workers killed because the memory of a node ran out, which counts against no shard. The last one is pid 12 "
        "on host-a: it grew by 510 MB per shard, from 1,200 MB with its models loaded to 9,870 MB after 17 shards. Its "
        "models or their libraries keep memory. Correct them, or restart workers before that by workers.recycle: 8"
    ]


def test_the_message_of_workers_that_do_not_grow_asks_for_smaller_batches() -> None:
    deaths = MemoryDeaths(2)
    deaths.record_death(WORKER, MemoryUse(5_000_000_000, 5_100_000_000, 40), None)
    assert str(deaths.note).endswith(
        "with 5,100 MB after 40 shards. Lower workers.batch, or give each worker more of its node by workers.cpus"
    )


def test_the_advice_is_below_a_number_of_shards_that_did_not_suffice() -> None:
    deaths = MemoryDeaths(2)
    deaths.record_death(WORKER, LEAK, 6)
    assert str(deaths.note).endswith("workers.recycle: 5")


def test_there_is_a_message_after_three_deaths_and_whenever_their_number_has_doubled() -> None:
    deaths = MemoryDeaths(2)
    assert [n for n in range(1, 50) if deaths.record_death(WORKER, LEAK, None)] == [3, 6, 12, 24, 48]


@pytest.mark.parametrize(("workers", "most"), [(1, 10), (2, 10), (1000, 2000)])
def test_a_run_in_which_no_shard_can_be_finished_ends_with_one_error(workers: int, most: int) -> None:
    deaths = MemoryDeaths(2)
    for _ in range(most - 1):
        deaths.record_death(WORKER, LEAK, None)
    deaths.record_success()
    for _ in range(most):
        deaths.check(workers)
        deaths.record_death(WORKER, LEAK, None)
    with pytest.raises(UserError, match=r"^no shard can be finished: "):
        deaths.check(workers)
