"""The failure policy: each sentence of failures.py."""

from __future__ import annotations

from typing import Any

import pytest

from reinforce.config import Failures
from reinforce.dataset.layers import Layer
from reinforce.engine.driver.failures import NODE_VERDICT_SECONDS, FailurePolicy, Hang, LoadLimit, error_text
from reinforce.engine.driver.faults import (
    Death,
    Decision,
    EndedWorker,
    Quarantine,
    ReplaceWorker,
    Requeue,
    Retry,
    RunAlone,
)
from reinforce.engine.messages import LayerFailure, LoadFailure, PendingShard, ShardFailure, WorkerId
from reinforce.errors import StorageError, TooManyQuarantined, UserError
from reinforce.processes.attempts import pause_seconds
from schemas import Reason

LAYERS = {
    "samples": Layer("samples", "samples", "0"),
    "captions/c": Layer("captions/c", "captions", "1", needs=("samples",)),
    "embeddings/t/images": Layer("embeddings/t/images", "images", "2", needs=("samples",)),
    "embeddings/t/c": Layer("embeddings/t/c", "texts", "3", needs=("samples", "captions/c")),
}
A = PendingShard("a", "s3://bucket/a.tar", tuple(LAYERS))
B = PendingShard("b", "s3://bucket/b.tar", tuple(LAYERS))
WORKER, OTHER, THIRD = WorkerId("node", 1), WorkerId("other", 2), WorkerId("other", 3)
RAISED = ShardFailure("ValueError: odd", False)
MODEL = LayerFailure("captions/c", "device-side assert")


def policy(shards: int = 1000, quarantined_before: int = 0, **settings: Any) -> FailurePolicy:
    return FailurePolicy(Failures(**settings), LAYERS, shards, quarantined_before)


def die(failures: FailurePolicy, *shards: PendingShard, alone: bool = False, hung: bool = False) -> list[Decision]:
    """The decisions after a worker died (or hung) on a node that is alive."""
    worker = EndedWorker(WORKER, shards, alone)
    if hung:
        failures.worker_hung(worker, Hang("no progress"), 0.0)
    else:
        failures.worker_died(worker, "killed", 0.0, process_dead=True)
    [verdict] = failures.judge_deaths(0.0, lambda: {"node"})
    assert not verdict.node_lost
    return list(verdict.decisions)


# -- leases that raise


def test_a_lease_that_raises_is_retried_and_quarantined_after_the_last_attempt_of_its_shard() -> None:
    failures = policy(attempts=3)
    for attempt in (1, 2):
        for shard in (A, B):
            decision = failures.lease_raised(shard, RAISED, now=100.0)
            assert (decision.shard, decision.attempt) == (shard, attempt)
            assert 100.0 < decision.at <= 160.0
    failed = Quarantine(A, "samples", Reason.SHARD_FAILED, "ValueError: odd", None, 3)
    assert failures.lease_raised(A, RAISED, 100.0) == failed


@pytest.mark.parametrize(("attempt", "most"), [(1, 1.0), (2, 2.0), (3, 4.0), (7, 60.0), (1000, 60.0)])
def test_pauses_double_up_to_a_minute_with_bounded_jitter(attempt: int, most: float) -> None:
    pauses = [pause_seconds(attempt) for _ in range(200)]
    assert most / 2 <= min(pauses) < max(pauses) <= most


@pytest.mark.parametrize(
    ("missing", "error", "layer", "rest"),
    [
        (A.layers, LayerFailure("captions/c", "ValueError: odd"), "captions/c", ("samples", "embeddings/t/images")),
        (("embeddings/t/images", "embeddings/t/c"), RAISED, "embeddings/t/images", ("embeddings/t/c",)),
    ],
)
def test_the_layer_whose_model_raised_or_the_first_missing_one_is_quarantined_with_those_that_need_it_and_no_others(
    missing: tuple[str, ...], error: Exception, layer: str, rest: tuple[str, ...]
) -> None:
    shard, left = (PendingShard("a", A.url, layers) for layers in (missing, rest))
    decision = policy(attempts=1).lease_raised(shard, error, 0.0)
    assert decision == Quarantine(shard, layer, Reason.SHARD_FAILED, error_text(error), left, 1)


def test_the_layers_that_remain_have_all_their_attempts_again() -> None:
    failures = policy(attempts=2, solo_attempts=2)
    die(failures, A, alone=True)
    failures.lease_raised(A, RAISED, 0.0)
    decision = failures.lease_raised(A, LayerFailure("captions/c", "odd"), 0.0)
    assert isinstance(failures.lease_raised(decision.rest, RAISED, 0.0), Retry)
    assert die(failures, decision.rest, alone=True) == [RunAlone(decision.rest)]


def test_layers_that_pass_without_the_one_that_failed_prove_nothing_about_a_worker() -> None:
    failures = policy(attempts=1)
    for shard in (A, B):
        failures.worker_failed(WORKER, shard.name, MODEL, "odd", 0.0, 2)
        rest = failures.lease_raised(shard, MODEL, 0.0).rest
        assert failures.lease_returned(rest.name, OTHER, False, 1.0, 2, rest.layers) == []


def test_the_last_attempt_of_a_shard_that_failed_at_a_replaced_worker_runs_alone_and_its_failure_replaces_one() -> None:
    failures = policy(attempts=3)
    assert failures.worker_failed(WORKER, "a", MODEL, "odd", 0.0, 3) is None
    failures.faults.record_replacement(WORKER, 0.0)
    assert isinstance(failures.lease_raised(A, MODEL, 0.0), Retry)
    assert failures.worker_failed(OTHER, "a", MODEL, "odd", 0.0, 3) is None
    assert failures.lease_raised(A, MODEL, 0.0) == RunAlone(A, 2)
    reason = "a failed there for the last time and may have broken it: odd"
    assert failures.worker_failed(THIRD, "a", MODEL, "odd", 0.0, 3) == ReplaceWorker(THIRD, reason)


@pytest.mark.parametrize("before", [False, True])
def test_failures_at_a_replaced_worker_are_no_attempts_once_its_shards_have_passed_elsewhere(before: bool) -> None:
    failures = policy(attempts=2)
    for shard in "abc":
        failures.worker_failed(WORKER, shard, RAISED, "odd", 0.0, 2)
    failures.lease_raised(A, RAISED, 0.0)
    if before:
        failures.faults.record_replacement(WORKER, 1.0)
    replaced = [failures.lease_returned(shard, OTHER, False, 2.0, 2) for shard in "bc"]
    if not before:
        failures.faults.record_replacement(replaced[1][0].worker, 3.0)
    assert isinstance(failures.lease_raised(A, RAISED, 4.0), Retry)


def test_an_error_that_the_user_must_fix_stops_the_run_at_once_and_a_workers_storage_error_costs_an_attempt() -> None:
    for error in (UserError("fingerprint differs"), StorageError("bucket is unreachable")):
        with pytest.raises(type(error), match=str(error)):
            policy(attempts=9).lease_raised(A, error, 0.0)
    assert isinstance(policy().lease_raised(A, ShardFailure("bucket is unreachable", False), 0.0), Retry)


def test_a_shard_that_cannot_be_read_is_tried_on_another_node_once() -> None:
    failures, here, there = policy(), WorkerId("x", 1), WorkerId("y", 2)
    assert isinstance(failures.read_failed(A, "shard_missing", here, 2, 0.0), Retry)
    assert failures.read_failed(A, "shard_missing", there, 2, 0.0) is None
    assert failures.consecutive_failures.keys() == {here}
    assert failures.read_failed(B, "shard_missing", here, 1, 0.0) is None, "there is no other node"
    c = PendingShard("c", "c.tar", ("samples",))
    assert failures.read_failed(c, "shard_damaged", here, 2, 0.0) is None, "it has been read"


# -- workers that die or hang


@pytest.mark.parametrize(
    ("hung", "reason", "detail"),
    [
        (False, Reason.SHARD_CRASHED, "its worker died each time that it ran this shard alone, 2 times: killed"),
        (True, Reason.SHARD_HUNG, "no progress"),
    ],
)
def test_a_shard_that_ends_its_worker_alone_again_is_quarantined(hung: bool, reason: Reason, detail: str) -> None:
    failures = policy(solo_attempts=2)
    assert die(failures, A, alone=True, hung=hung) == [RunAlone(A)]
    assert die(failures, B, alone=True, hung=hung) == [RunAlone(B)], "each shard has its own count"
    assert die(failures, A, alone=True, hung=hung) == [Quarantine(A, "samples", reason, detail, None, 2)]
    for _ in range(2):
        die(failures, B, hung=hung)
        failures.lease_returned("b", OTHER, False, 1.0, 2)
    assert failures.faults.avoided(1.0) == {"node"}, "its workers died of what passed on another node"


def test_a_shard_beside_one_that_hung_is_leased_again_and_is_a_suspect_the_second_time() -> None:
    failures, worker = policy(solo_attempts=1), EndedWorker(WORKER, (A, B), alone=False)
    for expected in ((RunAlone(A), Requeue(B)), (RunAlone(A), RunAlone(B))):
        failures.worker_hung(worker, Hang("a has made no progress", frozenset({"a"})), 0.0)
        [verdict] = failures.judge_deaths(0.0, lambda: {"node"})
        assert verdict.decisions == expected


def test_the_nodes_are_asked_for_once_however_many_workers_died_and_not_at_all_without_deaths() -> None:
    failures, asked = policy(), 0

    def live_nodes() -> set[str]:
        nonlocal asked
        asked += 1
        return {"other"}

    assert failures.judge_deaths(0.0, live_nodes) == []
    assert asked == 0
    for number in range(800):
        worker = EndedWorker(WorkerId(f"node {number % 40}", number), (A,), alone=False)
        failures.worker_died(worker, "unreachable", 0.0, process_dead=False)
    verdicts = failures.judge_deaths(0.5, live_nodes)
    assert (len(verdicts), asked, failures.undecided_shards) == (800, 1, 0)


@pytest.mark.parametrize("drained", [False, True])
def test_a_lost_or_drained_node_counts_against_no_shard(drained: bool) -> None:
    failures = policy(solo_attempts=1)
    if drained:
        failures.record_drains({"node": 0}, 0.0)
    for number in range(20):
        failures.worker_died(EndedWorker(WORKER, (A,), alone=True), "unreachable", 0.0, True, memory=number % 2 == 0)
        [verdict] = failures.judge_deaths(0.0, lambda: {"node"} if drained else set())
        assert verdict.node_lost
        assert verdict.decisions == (Requeue(A),)
    failures.memory.check(1)


def test_shards_of_an_unreachable_worker_wait_until_its_node_is_lost_or_the_deadline() -> None:
    failures, worker = policy(), EndedWorker(WORKER, (A, B), alone=False)
    failures.worker_died(worker, "unreachable", 10.0, process_dead=False)
    assert failures.undecided_shards == 2
    assert failures.judge_deaths(10.0 + NODE_VERDICT_SECONDS - 0.1, lambda: {"node"}) == []
    [verdict] = failures.judge_deaths(10.0 + NODE_VERDICT_SECONDS, lambda: {"node"})
    assert verdict.death == Death(worker, "unreachable", 10.0 + NODE_VERDICT_SECONDS)
    assert verdict.decisions == (RunAlone(A), RunAlone(B))
    assert failures.undecided_shards == 0
    failures.worker_died(worker, "unreachable", 10.0, process_dead=False)
    [verdict] = failures.judge_deaths(10.5, set[str])
    assert verdict.decisions == (Requeue(A), Requeue(B))


# -- workers that are replaced or paused, or do not start


def test_a_worker_is_replaced_after_three_failures_in_a_row_not_counting_storage_errors() -> None:
    errors = [
        LayerFailure("captions/c", "device-side assert"),
        ShardFailure("PermissionError: no", False),
        ShardFailure("RuntimeError: device-side assert", True),
        ShardFailure("StorageError: no", False),
        ShardFailure("MemoryError: ", True),
    ]
    failures, decisions = policy(), []
    for number, error in enumerate(errors):
        decisions.append(failures.worker_failed(WORKER, str(number), error, "odd", 0.0, workers=1))
    assert decisions[:-1] == [None] * 4
    reason = "3 leases in a row have failed at it; the last error: odd"
    assert decisions[-1] == ReplaceWorker(WORKER, reason)
    assert failures.consecutive_failures[WORKER] == 5
    failures.forget_worker(WORKER)  # it has succeeded
    assert failures.worker_failed(WORKER, "x", errors[0], "odd", 0.0, workers=1) is None


def test_a_model_that_fails_at_more_than_three_workers_replaces_no_further_worker_until_it_passes_somewhere() -> None:
    failures = policy()

    for pid, replaced in enumerate((True, True, True, False, False, True)):
        if pid == 5:
            failures.lease_returned("a", OTHER, False, 1.0, 9, ("captions/c",))
        found = [failures.worker_failed(WorkerId("x", pid), f"{n}", MODEL, "odd", 0.0, 9) for n in range(3)]
        assert isinstance(found[-1], ReplaceWorker) == replaced


def test_a_worker_at_which_leases_fail_in_a_row_is_paused_where_there_are_others_until_it_succeeds() -> None:
    failures = policy()

    def fail(shard: str, workers: int = 2) -> object:
        return failures.worker_failed(WORKER, shard, RAISED, "odd", 10.0, workers)

    assert [fail("1"), fail("2"), fail("3", workers=1)] == [None] * 3
    decision = fail("4")
    assert (decision.worker, decision.until) == (WORKER, pytest.approx(11.5, abs=0.5))
    assert failures.consecutive_failures == {WORKER: 4}
    failures.lease_returned("5", WORKER, False, 11.0, 2)
    assert not failures.consecutive_failures
    assert fail("6") is None


def test_models_that_one_node_cannot_load_do_not_stop_a_run_whose_other_nodes_finish_shards() -> None:
    failures, error = policy(), LoadFailure(("bad", 1, "host"), "no space left", True)
    with pytest.raises(UserError, match=r"^no space left$"):
        failures.load_raised(error, 0.0)
    failures.lease_returned("a", WorkerId("good", 2), False, 0.0, 2)
    for _ in range(20):  # not in a row
        failures.load_raised(error, 0.0)
        failures.load_passed()
    for other in (LoadFailure(("good", 2, "host"), "KeyError: 'x'", False), KeyError("x")):
        with pytest.raises(UserError, match=r"^a worker could not load its models: KeyError: 'x'$"):
            failures.load_raised(other, 0.0)


@pytest.mark.parametrize(("workers", "most"), [(1, 3), (8, 16)])
def test_workers_that_die_in_a_row_while_they_load_stop_the_run_unless_one_runs(workers: int, most: int) -> None:
    failures = policy()
    for _ in range(most):
        failures.load_died("killed", False, 1, workers)
    for _ in range(3):
        failures.load_passed()
        for _ in range(most - 1):
            failures.load_died("killed", False, 0, workers)
    for _ in range(20):
        failures.load_died("its node has died", True, 0, workers)
    with pytest.raises(UserError, match=r"workers die while they load their models \(killed\). Check the memory"):
        failures.load_died("killed\nstack", False, 0, workers)


def test_workers_that_hang_in_a_row_while_they_load_stop_the_run_unless_one_runs() -> None:
    failures, limit = policy(), "600 s, workers.start_timeout"
    for _ in range(20):
        failures.load_hung(WORKER, limit, 0.0, running=1)
    for _ in range(3):
        failures.load_passed()
        failures.load_hung(WORKER, limit, 0.0, running=0)
        failures.load_died("killed", False, 0, 1)
    message = rf"workers hang while they load .*: 3 in a row were killed, the last one {WORKER} \(limit: {limit}\)\. "
    with pytest.raises(UserError, match=message):
        failures.load_hung(WORKER, limit, 0.0, running=0)


def test_a_node_at_which_loads_hang_gets_no_new_workers_while_shards_pass_on_others() -> None:
    failures = policy()
    failures.lease_returned("a", WorkerId("good", 2), False, 0.0, 2)
    failures.load_hung(WorkerId("bad", 1, "host"), "600 s", 1.0, running=1)
    assert failures.faults.avoided(2.0) == {"bad"}


def test_a_load_may_take_three_times_as_long_as_the_slowest_that_has_passed() -> None:
    limit = LoadLimit(600.0)
    assert limit.origin == "600 s, workers.start_timeout"
    for seconds in (100.0, 250.0, 7.0):
        limit.slowest = max(limit.slowest, seconds)
    assert (limit.seconds, limit.origin) == (750.0, "750 s, three times the slowest load that has passed")


def test_a_message_of_several_workers_is_noted_once() -> None:
    failures = policy()
    for notes in (("8 images do not fit", "4 images do not fit"), ("8 images do not fit",), ()):
        failures.add_notes(notes)
    assert failures.notes == ["8 images do not fit", "4 images do not fit"]


# -- too many quarantined shards


def test_ten_quarantined_shards_are_tolerated_and_more_than_the_allowed_share_stop_the_run() -> None:
    failures = policy(shards=200, allowed_share=0.01)
    for number in [*range(10), 0]:  # a shard counts once
        failures.shard_quarantined(str(number), "x")
    with pytest.raises(TooManyQuarantined) as error:
        failures.shard_quarantined("10", "shard_missing: no such file")
    assert str(error.value) == (
        "stopped: 11 of 200 shards are quarantined, more than failures.allowed_share = 0.01. They probably share the "
        "cause of the last one, 10: shard_missing: no such file. Fix it and run with --retry-quarantined."
    )
    failures = policy(shards=1000, quarantined_before=49, allowed_share=0.05)  # by earlier runs
    failures.shard_quarantined("a", "x")
    assert failures.quarantined_shards == 50
    with pytest.raises(TooManyQuarantined):
        failures.shard_quarantined("b", "x")


# -- drained nodes


def test_each_drain_is_found_once_with_the_seconds_that_are_left_and_stays() -> None:
    failures = policy()
    assert failures.record_drains({}, 100.0) == {}
    assert failures.record_drains({"b": 130_000, "a": 0}, 100.0) == {"a": None, "b": 30.0}
    assert failures.record_drains({"b": 130_000, "a": 0}, 110.0) == {}
    assert failures.record_drains({"c": 90_000}, 110.0) == {"c": 0.0}
    failures.record_drains({}, 200.0)  # the nodes have ended
    assert failures.drained == {"a", "b", "c"}
