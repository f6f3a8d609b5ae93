"""Failures that count against no shard: each sentence of faults.py."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest

from reinforce.config import Failures
from reinforce.engine.driver.failures import FailurePolicy
from reinforce.engine.driver.faults import (
    Decision,
    EndedWorker,
    LeaveShard,
    MemoryDeaths,
    MemoryUse,
    Quarantine,
    Requeue,
    Retry,
    RunAlone,
)
from reinforce.engine.messages import PendingShard, StorageFailure, WorkerId
from reinforce.errors import StorageError, UserError
from schemas import Reason
from tests.helpers.driver import SAMPLES_ONLY, shard
from tests.helpers.simulated_run import Outcome, SimulatedRun

A, B = map(shard, "ab")
LEAK = MemoryUse(1_200_000_000, 9_870_000_000, 17)
FRESH = MemoryUse(1_200_000_000, 1_200_000_000, 0)
WORKER = WorkerId("node", 12, "host-a")


def policy_of(**settings: Any) -> FailurePolicy:
    return FailurePolicy(Failures(**settings), SAMPLES_ONLY, 1000, 0)


@pytest.fixture
def policy() -> FailurePolicy:
    return policy_of(solo_attempts=1)


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


def test_the_message_of_workers_that_do_not_grow_asks_for_smaller_batches_and_of_others_for_fewer_shards() -> None:
    deaths = MemoryDeaths(2)
    for use in (MemoryUse(5_000_000_000, 9_000_000_000, 40), MemoryUse(5_000_000_000, 9_000_000_000, 0)):
        deaths.record_death(WORKER, use, None)
        assert str(deaths.note).endswith(
            f"with 9,000 MB after {use.shards} shards. Lower workers.batch, or give each worker more of its node by "
            "workers.cpus"
        )
    deaths.record_death(WORKER, LEAK, 6)
    assert str(deaths.note).endswith("workers.recycle: 5"), "below a number that did not suffice"


def test_there_is_a_message_after_three_deaths_and_whenever_their_number_has_doubled() -> None:
    deaths = MemoryDeaths(2)
    assert [n for n in range(1, 50) if deaths.record_death(WORKER, LEAK, None)] == [3, 6, 12, 24, 48]


@pytest.mark.parametrize(("workers", "most"), [(1, 10), (2, 10), (1000, 2000)])
def test_a_run_in_which_no_shard_can_be_finished_ends_with_one_error(workers: int, most: int) -> None:
    deaths = MemoryDeaths(2)
    for _ in range(most - 1):
        deaths.record_death(WORKER, LEAK, None)
    deaths.in_a_row = 0
    for _ in range(most):
        deaths.check(workers)
        deaths.record_death(WORKER, LEAK, None)
    with pytest.raises(UserError, match=r"^no shard can be finished: "):
        deaths.check(workers)


SLOW_DOWN = StorageFailure("OSError: Please reduce your request rate.", False, None, False)
EXPIRED = StorageFailure("The provided token has expired.", False, Reason.SHARD_UNREADABLE.value, False)
NO_SUCH_KEY = StorageFailure("The specified key does not exist.", False, Reason.SHARD_MISSING.value, True)
WORKERS = [(1, 1), (2, 1), (4, 8)]


@pytest.mark.parametrize(("nodes", "per_node"), WORKERS)
@pytest.mark.parametrize(("error", "seconds"), [(EXPIRED, 20.0), (SLOW_DOWN, 90.0), (NO_SUCH_KEY, 0.6)])
def test_an_outage_quarantines_nothing_and_the_run_waits_with_few_leases(
    nodes: int, per_node: int, error: StorageFailure, seconds: float
) -> None:
    random.seed(0)

    def outcome(shard: PendingShard, worker: WorkerId) -> Outcome:
        return error if 10.0 < run.now < 10.0 + seconds else None

    run = SimulatedRun(nodes, per_node, 300, outcome, seconds=4.0)
    run.run()
    assert (run.quarantined, len(run.passed)) == ([], 300)
    run.policy.outages.check()
    in_flight = 2 * nodes * per_node
    assert run.failures.total() <= 9 * in_flight, "the pauses double"
    assert (len(run.policy.notes) == 1) == (seconds > 10.0)


def test_a_storage_that_does_not_come_back_ends_the_run_with_one_error_and_no_quarantine() -> None:
    random.seed(0)
    run = SimulatedRun(2, 2, 20, lambda shard, worker: None if run.now < 5.0 else SLOW_DOWN, seconds=4.0)
    run.run()
    assert (run.quarantined, run.replaced, len(run.passed)) == ([], [], 16)
    assert run.now < 1500.0
    failed = "OSError: Please reduce your request rate. So the storage failed for 4 shards, such as 000"
    with pytest.raises(StorageError, match=re.escape(failed)) as error:
        run.policy.outages.check()
    assert error.value.exit_status == 1


def test_a_shard_that_always_fails_costs_no_other_shard_and_is_left_when_they_are_finished() -> None:
    random.seed(0)
    run = SimulatedRun(2, 2, 60, lambda shard, worker: SLOW_DOWN if shard.name == "00003" else None)
    run.run()
    assert (run.quarantined, len(run.passed), [*run.policy.outages.left]) == ([], 59, ["00003"])


def test_a_missing_file_is_believed_after_the_attempts_and_a_refused_one_when_another_shard_has_passed() -> None:
    failures, one, other = policy_of(), shard("one"), shard("other")
    for count in (1, 2):
        decision = failures.lease_raised(one, NO_SUCH_KEY, 10.0)
        assert isinstance(decision, Retry)
        assert decision.attempt == count
        assert isinstance(failures.lease_raised(other, EXPIRED, 10.0), Retry)
    assert failures.outages.held_until > 10.0, "two shards fail and none passes"
    detail = "The specified key does not exist."
    assert failures.lease_raised(one, NO_SUCH_KEY, 11.0) == Quarantine(
        one, "samples", Reason.SHARD_MISSING, detail, None, 3
    )
    assert isinstance(failures.lease_raised(one, NO_SUCH_KEY, 11.0), Retry), "the layers that remain start anew"
    assert isinstance(failures.lease_raised(other, EXPIRED, 12.0), Retry), "the token may have expired"
    failures.lease_returned("third", WORKER, False, 13.0, 1, ("samples",))
    decision = failures.lease_raised(other, EXPIRED, 14.0)
    assert decision.reason == Reason.SHARD_UNREADABLE
    assert failures.outages.held_until == 13.0, "one shard that fails after a success holds back no other"


def test_a_storage_error_is_neither_an_attempt_nor_the_workers_fault() -> None:
    failures, one = policy_of(attempts=1, outage_seconds=100.0), shard("one")
    for number in range(20):
        assert isinstance(failures.lease_raised(one, SLOW_DOWN, float(number)), Retry)
        assert failures.worker_failed(WORKER, str(number), SLOW_DOWN, "odd", float(number), 1) is None
    assert failures.lease_raised(one, SLOW_DOWN, 100.0) == LeaveShard(one, 21)
    failures.lease_returned("one", WORKER, False, 150.0, 1)
    assert isinstance(failures.lease_raised(one, SLOW_DOWN, 200.0), Retry), "it has passed since"
    failures = policy_of(outage_seconds=0)
    found = [failures.lease_raised(one, SLOW_DOWN, 0.0) for _ in range(2)]
    assert (type(found[0]), found[1]) == (Retry, LeaveShard(one, 2)), "each shard is tried again once"
