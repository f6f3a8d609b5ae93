"""Storages that fail: each sentence of policy/outages.py."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest

from reinforce.config import Failures
from reinforce.engine.driver.policy.decisions import LeaveShard, Quarantine, Retry
from reinforce.engine.driver.policy.failures import FailurePolicy
from reinforce.engine.messages.results import StorageFailure, WorkerId
from reinforce.engine.messages.task import PendingShard
from reinforce.errors import StorageError
from schemas import Reason
from tests.helpers.driver import SAMPLES_ONLY, shard
from tests.helpers.simulated_run import Outcome, SimulatedRun

WORKER = WorkerId("node", 1)
SLOW_DOWN = StorageFailure("OSError: Please reduce your request rate.", False, None, False)
EXPIRED = StorageFailure("The provided token has expired.", False, Reason.SHARD_UNREADABLE.value, False)
NO_SUCH_KEY = StorageFailure("The specified key does not exist.", False, Reason.SHARD_MISSING.value, True)
WORKERS = [(1, 1), (2, 1), (4, 8)]


def policy(**settings: Any) -> FailurePolicy:
    return FailurePolicy(Failures(**settings), SAMPLES_ONLY, 1000, 0)


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
    failures, one, other = policy(), shard("one"), shard("other")
    for count in (1, 2):
        decision = failures.lease_raised(one, NO_SUCH_KEY, 10.0)
        assert isinstance(decision, Retry)
        assert decision.attempt == count
        assert isinstance(failures.lease_raised(other, EXPIRED, 10.0), Retry)
    detail = "The specified key does not exist."
    assert failures.lease_raised(one, NO_SUCH_KEY, 11.0) == Quarantine(
        one, "samples", Reason.SHARD_MISSING, detail, None, 3
    )
    assert isinstance(failures.lease_raised(other, EXPIRED, 12.0), Retry), "the token may have expired"
    failures.lease_returned("third", WORKER, False, 13.0, 1, ("samples",))
    decision = failures.lease_raised(other, EXPIRED, 14.0)
    assert isinstance(decision, Quarantine)
    assert decision.reason == Reason.SHARD_UNREADABLE


def test_a_storage_error_is_neither_an_attempt_nor_the_workers_fault() -> None:
    failures, one = policy(attempts=1, outage_seconds=100.0), shard("one")
    for number in range(20):
        assert isinstance(failures.lease_raised(one, SLOW_DOWN, float(number)), Retry)
        assert failures.worker_failed(WORKER, str(number), SLOW_DOWN, "odd", float(number), 1) is None
    assert failures.lease_raised(one, SLOW_DOWN, 100.0) == LeaveShard(one, 21)
