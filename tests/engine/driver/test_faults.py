"""Which failures are the fault of a worker or a node: each sentence of faults.py, and simulated clusters."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest

from reinforce.engine.driver.faults import AVOID_SECONDS, Faults, ReplaceWorker
from reinforce.engine.messages import PendingShard, ShardFailure, WorkerId
from tests.helpers.simulated_run import Outcome, SimulatedRun

A, B, C = (WorkerId(f"node {name}", number, f"host-{name}") for number, name in enumerate("abc"))
A2 = WorkerId(A.node, 9, A.host)
FULL = "OSError: No space left on device"


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def attempts() -> Counter[str]:
    return Counter()


@pytest.fixture
def faults(notes: list[str], attempts: Counter[str]) -> Faults:
    return Faults(notes, attempts)


def fail(faults: Faults, worker: WorkerId, *shards: str, now: float = 1.0) -> str | None:
    """Record failures -> the reason for which the worker is at fault after the last of them."""
    found = [faults.record_failure(shard, worker, FULL, now, 2) for shard in shards]
    return found[-1].reason if found[-1] else None


def test_a_worker_at_which_two_shards_failed_that_passed_elsewhere_is_at_fault_unless_it_succeeds(
    faults: Faults,
) -> None:
    assert fail(faults, A, "1", "2") is None
    assert faults.tried("1") == {A}
    assert faults.record_success("1", B, 2.0, 2) == []
    reason = f"2 shards that failed there passed elsewhere; the last error: {FULL}"
    assert faults.record_success("2", B, 3.0, 2) == [ReplaceWorker(A, reason)]
    fail(faults, C, "3", "4")
    for shard in "56":
        faults.record_read_failure(shard, C, FULL)
    faults.record_success("7", C, 3.5, 2)
    assert [faults.record_success(shard, B, 4.0, 2) for shard in "3456"] == [[]] * 4


def test_three_shards_in_a_row_that_fail_while_others_pass_elsewhere_are_the_workers_fault_and_one_is_not(
    faults: Faults,
) -> None:
    faults.record_success("8", B, 1.0, 2)
    assert fail(faults, A, "1", "2", "3", now=1.0) is None, "nothing has passed elsewhere since"
    faults.record_success("9", B, 2.0, 2)
    assert fail(faults, C, "5", "5", "5", "5", now=1.5) is None
    assert "4 shards in a row failed there while shards passed elsewhere" in str(fail(faults, A, "4", now=3.0))


@pytest.mark.parametrize("others", [[B], [A2, WorkerId(A.node, 10, A.host)]])
def test_a_shard_that_fails_on_two_nodes_or_at_three_workers_is_itself_the_cause(
    faults: Faults, others: list[WorkerId]
) -> None:
    for worker in (A, *others):
        fail(faults, worker, "1")
    faults.record_success("9", C, 2.0, 3)
    assert fail(faults, A, "2", "3", now=3.0) is None
    assert fail(faults, A, "4", now=1.0) is not None


def test_a_node_whose_workers_are_replaced_twice_in_an_hour_gets_no_workers_for_a_while_and_longer_each_time(
    faults: Faults, notes: list[str]
) -> None:
    fail(faults, A, "1")
    fail(faults, A2, "2")
    for worker in (A, A2):
        faults.record_replacement(worker, 100.0)
    assert faults.avoided(100.0) == frozenset(), "nothing that failed there has passed elsewhere"
    faults.record_success("1", B, 100.0, 2)
    assert faults.avoided(100.0) == frozenset()
    faults.record_success("2", B, 200.0, 2)
    assert faults.avoided(200.0 + AVOID_SECONDS - 1) == {A.node}
    assert faults.avoided(200.0 + AVOID_SECONDS + 1) == frozenset()
    [note] = notes
    assert note.startswith("node host-a gets no new workers for 10 minutes, because what failed at 2 of its workers")
    assert note.endswith(f"The last error: {FULL}")
    fail(faults, A, "3")
    faults.record_replacement(A, 1000.0)
    faults.record_success("3", B, 1000.0, 2)
    assert faults.avoided(1000.0 + 2 * AVOID_SECONDS - 1) == {A.node}
    assert faults.avoided(9000.0) == frozenset()


def test_failures_at_a_replaced_worker_are_given_back_once_one_of_its_shards_passes_elsewhere(
    faults: Faults, attempts: Counter[str]
) -> None:
    attempts.update(["0", "1", "2", "2", "2", *["own"] * 3])
    for worker in (B, C):
        fail(faults, worker, "own")
    fail(faults, A, "0", "1", "2", "2", "own")
    faults.record_replacement(A, 1.0)
    assert attempts == {"0": 1, "1": 1, "2": 3, "own": 3}, "the shards may be the cause"
    faults.record_success("0", B, 2.0, 3)
    assert attempts == {"0": 1, "1": 0, "2": 1, "own": 3}, "a shard that failed at three workers is the cause"
    faults.record_success("1", B, 2.0, 3)
    assert attempts == {"0": 1, "1": 0, "2": 1, "own": 3}, "once"


def test_a_node_where_models_cannot_be_loaded_is_avoided_while_other_nodes_finish_shards(
    faults: Faults, notes: list[str]
) -> None:
    assert not faults.record_failed_start(A, FULL, 1.0), "no worker has finished a shard: the cause may be the config"
    faults.record_success("1", B, 1.0, 2)
    assert not faults.record_failed_start(B, FULL, 1.0), "its own node has finished shards"
    for shard in "23":
        faults.record_success(shard, A2, 1.0, 2)
    assert faults.record_failed_start(A, FULL, 1.0), "workers of another node finish shards as well"
    assert faults.avoided(2400.0) == {A.node}
    assert "no new workers for 40 minutes, because models cannot be loaded there" in notes[0], "the third in a row"
    for _ in range(20):
        stopped = not faults.record_failed_start(A, FULL, 1.0)
    assert stopped, "not without end"
    faults.failed_starts = 0
    assert faults.record_failed_start(A, FULL, 1.0)
    assert "for 10 minutes" in notes[-1]


def test_workers_that_die_of_shards_that_pass_on_another_node_count_against_their_node(faults: Faults) -> None:
    for number in range(2):
        worker = WorkerId(A.node, number, A.host)
        faults.record_death((f"{number}a", f"{number}b"), worker, "segfault")
        faults.record_success(f"{number}a", WorkerId(A.node, 7), 1.0, 2)
        assert faults.avoided(1.0) == frozenset(), "it passed on the same node"
        faults.record_success(f"{number}b", B, 1.0, 2)
    assert faults.avoided(1.0) == {A.node}


def test_where_most_workers_fail_none_of_them_is_at_fault_and_few_are_replaced_at_a_time(faults: Faults) -> None:
    workers = [WorkerId(f"node {number}", number) for number in range(1000)]
    for number, worker in enumerate(workers[1:]):
        for shard in range(4):
            faults.record_failure(f"{number}/{shard}", worker, "timeout", 1.0, len(workers))
    for shard in range(4):
        assert faults.record_success(f"5/{shard}", workers[0], 2.0, len(workers)) == []
    for number, worker in enumerate(workers[1:]):
        assert faults.record_failure(f"{number}/4", worker, "timeout", 3.0, len(workers)) is None
    for number, worker in enumerate(workers[1:]):
        faults.record_success(f"{number}/0", worker, 4.0, len(workers))
    replaced = 0
    for number, worker in enumerate(workers[1:401]):  # now four in ten fail
        for shard in range(4):
            faults.record_success("x", workers[-1], 100.5 + shard, len(workers))
            if faults.record_failure(f"late {number}/{shard}", worker, "timeout", 100.0 + shard, len(workers)):
                faults.record_replacement(worker, 100.0)
                replaced += 1
                break
    assert replaced == 20, "2% of the workers in a minute"


# -- simulated runs


def full_where(fails: Callable[[str, WorkerId], bool]) -> Callable[[PendingShard, WorkerId], Outcome]:
    """Leases that raise where ``fails(shard, worker)``."""
    return lambda shard, worker: ShardFailure(FULL, False) if fails(shard.name, worker) else None


def test_a_full_temporary_folder_of_one_of_two_nodes_quarantines_nothing_and_the_node_is_avoided() -> None:
    run = SimulatedRun(2, 1, 30, full_where(lambda shard, worker: worker.node == "node 0"), seconds=2.0).run()
    assert run.quarantined == []
    assert len(run.passed) == 30
    assert run.failures.total() <= 20
    assert {worker.node for worker in run.replaced} == {"node 0"}
    assert len(run.replaced) <= 3
    assert "node node 0 gets no new workers" in run.policy.notes[0]


@pytest.mark.parametrize(("nodes", "per_node"), [(3, 2), (1, 1)])
def test_shards_that_fail_everywhere_are_quarantined_and_replace_no_worker(nodes: int, per_node: int) -> None:
    bad = {"00003", "00004", "00005", "00017", "00040", "00041"} if nodes > 1 else {"00002"}
    run = SimulatedRun(nodes, per_node, 60, full_where(lambda shard, worker: shard in bad)).run()
    assert set(run.quarantined) == bad
    assert all(run.failures[shard] == 3 for shard in bad)
    assert len(run.passed) == 60 - len(bad)
    assert run.replaced == []


def test_a_bad_rack_of_a_cluster_of_2000_workers_quarantines_nothing() -> None:
    rng, nodes = random.Random(0), 250
    rack = {f"node {number}" for number in range(10)}
    flaky = {(f"{rng.randrange(6000):05d}", rng.randrange(nodes)) for _ in range(50)}

    def fails(shard: str, worker: WorkerId) -> bool:
        return worker.node in rack or (shard, int(worker.node.split()[1])) in flaky

    run = SimulatedRun(nodes, 8, 6000, full_where(fails), seconds=20.0).run()
    assert run.quarantined == []
    assert len(run.passed) == 6000
    assert {worker.node for worker in run.replaced} <= rack
