"""The failure policy: each sentence of reinforce/engine/driver/policy/failures.py."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest

from reinforce.config import Failures
from reinforce.dataset.kinds.registry import KINDS
from reinforce.dataset.layers import Layer
from reinforce.engine.driver.policy.decisions import (
    Death,
    Decision,
    EndedWorker,
    PauseWorker,
    Quarantine,
    ReplaceWorker,
    Requeue,
    Retry,
    RunAlone,
    StopRun,
)
from reinforce.engine.driver.policy.failures import NODE_VERDICT_SECONDS, FailurePolicy, error_text, pause_seconds
from reinforce.engine.driver.policy.hangs import Hang
from reinforce.engine.messages.results import LayerFailure, LoadFailure, ShardFailure, WorkerId
from reinforce.engine.messages.task import PendingShard
from reinforce.errors import StorageError, UserError
from schemas import Reason

LAYERS = {
    "samples": Layer("samples", KINDS["samples"], "0"),
    "captions/c": Layer("captions/c", KINDS["captions"], "1", needs=("samples",)),
    "embeddings/t/images": Layer("embeddings/t/images", KINDS["images"], "2", needs=("samples",)),
    "embeddings/t/c": Layer("embeddings/t/c", KINDS["texts"], "3", needs=("samples", "captions/c")),
}
A = PendingShard("a", "s3://bucket/a.tar", tuple(LAYERS))
B = PendingShard("b", "s3://bucket/b.tar", tuple(LAYERS))
WORKER = WorkerId("node", 1)
RAISED = ShardFailure("ValueError: odd", False)


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


def test_a_lease_that_raises_is_retried_and_quarantined_after_the_last_attempt() -> None:
    failures = policy(attempts=3)
    for attempt in (1, 2):
        decision = failures.lease_raised(A, RAISED, now=100.0)
        assert isinstance(decision, Retry)
        assert (decision.shard, decision.attempt) == (A, attempt)
        assert 100.0 < decision.at <= 160.0
    assert failures.lease_raised(A, RAISED, 100.0) == Quarantine(
        A, "samples", Reason.SHARD_FAILED, "ValueError: odd", None, 3
    )


def test_a_message_of_several_workers_is_noted_once() -> None:
    failures = policy()
    for notes in (("8 images do not fit", "4 images do not fit"), ("8 images do not fit",), ()):
        failures.add_notes(notes)
    assert failures.notes == ["8 images do not fit", "4 images do not fit"]


def test_attempts_are_counted_for_each_shard() -> None:
    failures = policy(attempts=2)
    assert isinstance(failures.lease_raised(A, RAISED, 0.0), Retry)
    assert isinstance(failures.lease_raised(B, RAISED, 0.0), Retry)
    assert isinstance(failures.lease_raised(A, RAISED, 0.0), Quarantine)


@pytest.mark.parametrize(("attempt", "most"), [(1, 1.0), (2, 2.0), (3, 4.0), (7, 60.0), (1000, 60.0)])
def test_pauses_double_up_to_a_minute_with_bounded_jitter(attempt: int, most: float) -> None:
    pauses = [pause_seconds(attempt) for _ in range(200)]
    assert most / 2 <= min(pauses) < max(pauses) <= most


def test_the_layer_whose_model_raised_is_quarantined_with_those_that_need_it_and_no_others() -> None:
    failures = policy(attempts=1)
    decision = failures.lease_raised(A, LayerFailure("captions/c", "ValueError: odd"), 0.0)
    rest = PendingShard("a", A.url, ("samples", "embeddings/t/images"))
    detail = "LayerFailure: captions/c: ValueError: odd"
    assert decision == Quarantine(A, "captions/c", Reason.SHARD_FAILED, detail, rest, 1)


def test_the_first_missing_layer_is_quarantined_where_no_model_raised() -> None:
    later = PendingShard("a", A.url, ("embeddings/t/images", "embeddings/t/c"))
    decision = policy(attempts=1).lease_raised(later, RAISED, 0.0)
    assert isinstance(decision, Quarantine)
    assert decision.layer == "embeddings/t/images"
    assert decision.rest == PendingShard("a", A.url, ("embeddings/t/c",))


def test_the_layers_that_remain_have_all_their_attempts_again() -> None:
    failures = policy(attempts=2, solo_attempts=2)
    die(failures, A, alone=True)
    failures.lease_raised(A, RAISED, 0.0)
    decision = failures.lease_raised(A, LayerFailure("captions/c", "odd"), 0.0)
    assert isinstance(decision, Quarantine)
    assert decision.rest is not None
    assert isinstance(failures.lease_raised(decision.rest, RAISED, 0.0), Retry)
    assert die(failures, decision.rest, alone=True) == [RunAlone(decision.rest)]


@pytest.mark.parametrize(
    "error",
    [UserError("fingerprint differs"), UserError("disk is full; make room in /data")],
    ids=["fingerprint", "full disk"],
)
def test_an_error_that_the_user_must_fix_stops_the_run_at_once(error: UserError) -> None:
    assert policy(attempts=9).lease_raised(A, error, 0.0) == StopRun(error)


# -- workers that die or hang


def test_every_shard_in_flight_in_a_worker_that_dies_runs_alone_next() -> None:
    assert die(policy(solo_attempts=1), A, B) == [RunAlone(A), RunAlone(B)]


def test_dying_together_with_others_never_quarantines_a_shard() -> None:
    failures = policy(solo_attempts=1)
    for _ in range(20):
        assert die(failures, A, B) == [RunAlone(A), RunAlone(B)]


def test_a_shard_that_kills_its_worker_alone_again_is_quarantined() -> None:
    failures = policy(solo_attempts=2)
    assert die(failures, A, alone=True) == [RunAlone(A)]
    assert die(failures, B, alone=True) == [RunAlone(B)], "each shard has its own count"
    detail = "its worker died each time that it ran this shard alone, 2 times: killed"
    assert die(failures, A, alone=True) == [Quarantine(A, "samples", Reason.SHARD_CRASHED, detail, None, 2)]


def test_the_shards_of_a_worker_that_hangs_are_suspects_too() -> None:
    failures = policy(solo_attempts=1)
    assert die(failures, A, B, hung=True) == [RunAlone(A), RunAlone(B)]
    assert die(failures, B, alone=True, hung=True) == [
        Quarantine(B, "samples", Reason.SHARD_HUNG, "no progress", None, 1)
    ]


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
    start = time.thread_time()
    verdicts = failures.judge_deaths(0.5, live_nodes)
    assert (len(verdicts), asked, failures.undecided_shards) == (800, 1, 0)
    assert time.thread_time() - start < 0.5


def test_a_lost_node_counts_against_no_shard() -> None:
    failures = policy(solo_attempts=1)
    for _ in range(20):
        failures.worker_died(EndedWorker(WORKER, (A,), alone=True), "unreachable", 0.0, process_dead=True)
        [verdict] = failures.judge_deaths(0.0, set[str])
        assert verdict.node_lost
        assert verdict.decisions == (Requeue(A),)


def test_shards_of_an_unreachable_worker_wait_until_its_node_is_lost_or_the_deadline() -> None:
    failures, worker = policy(), EndedWorker(WORKER, (A, B), alone=False)
    failures.worker_died(worker, "unreachable", 10.0, process_dead=False)
    assert failures.undecided_shards == 2
    assert failures.judge_deaths(10.0 + NODE_VERDICT_SECONDS - 0.1, lambda: {"node"}) == []
    [verdict] = failures.judge_deaths(10.0 + NODE_VERDICT_SECONDS, lambda: {"node"})
    assert verdict.death == Death(worker, "unreachable", 10.0 + NODE_VERDICT_SECONDS)
    assert verdict.decisions == (RunAlone(A), RunAlone(B))
    assert failures.undecided_shards == 0
    failures.worker_died(EndedWorker(WORKER, (A,), alone=False), "unreachable", 10.0, process_dead=False)
    [verdict] = failures.judge_deaths(10.5, set[str])
    assert verdict.decisions == (Requeue(A),)


# -- workers that are replaced or do not start


def test_a_worker_is_replaced_after_three_failures_in_a_row_storage_errors_aside() -> None:
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
    assert failures.consecutive_failures(WORKER) == 5


def test_a_worker_at_which_leases_fail_in_a_row_is_paused_where_there_are_others_until_it_succeeds() -> None:
    failures = policy()

    def fail(shard: str, workers: int = 2) -> object:
        return failures.worker_failed(WORKER, shard, RAISED, "odd", 10.0, workers)

    assert [fail("1"), fail("2"), fail("3", workers=1)] == [None] * 3
    decision = fail("4")
    assert isinstance(decision, PauseWorker)
    assert (decision.worker, decision.until) == (WORKER, pytest.approx(11.5, abs=0.5))
    assert failures.failing_workers == {WORKER}
    failures.lease_returned("5", WORKER, False, 11.0, 2)
    assert failures.failing_workers == set()
    assert fail("6") is None


def test_models_that_cannot_be_loaded_stop_the_run_at_once() -> None:
    error = UserError("weights are missing")
    assert policy().load_raised(error) == StopRun(error)
    assert str(policy().load_raised(KeyError("x")).error) == "a worker could not load its models: KeyError: 'x'"


def test_workers_that_die_in_a_row_while_they_load_stop_the_run_unless_one_runs() -> None:
    failures = policy()
    assert [failures.load_died("killed\nstack", False, running, 1) for running in (0, 0, 1)] == [None] * 3
    stop = failures.load_died("killed\nstack", False, 0, 1)
    assert stop is not None
    assert "workers die while they load their models (killed). Check the memory" in str(stop.error)


def test_with_many_workers_each_may_die_twice_while_it_loads() -> None:
    failures = policy()
    stops = [failures.load_died("killed", False, 0, 8) for _ in range(16)]
    assert [stop is not None for stop in stops] == [False] * 15 + [True]


def test_deaths_before_a_worker_has_loaded_and_those_of_lost_nodes_do_not_count() -> None:
    failures = policy()
    for _ in range(3):
        assert [failures.load_died("killed", False, 0, 1) for _ in range(2)] == [None, None]
        failures.load_passed()
    assert [failures.load_died("its node has died", True, 0, 1) for _ in range(10)] == [None] * 10


def test_models_that_one_node_cannot_load_do_not_stop_a_run_whose_other_nodes_finish_shards() -> None:
    failures, error = policy(), LoadFailure(("bad", 1, "host"), "no space left", True)
    stop = failures.load_raised(error)
    assert stop is not None
    assert str(stop.error) == "no space left"
    failures.lease_returned("a", WorkerId("good", 2), False, 0.0, 2)
    assert failures.load_raised(error) is None
    other = failures.load_raised(LoadFailure(("good", 2, "host"), "KeyError: 'x'", False))
    assert other is not None
    assert str(other.error) == "a worker could not load its models: KeyError: 'x'"


def test_a_shard_that_cannot_be_read_is_tried_on_another_node_once() -> None:
    failures, here, there = policy(), WorkerId("x", 1), WorkerId("y", 2)
    assert isinstance(failures.read_failed(A, "shard_missing", here, 2, 0.0), Retry)
    assert failures.read_failed(A, "shard_missing", there, 2, 0.0) is None
    assert failures.read_failed(B, "shard_missing", here, 1, 0.0) is None, "there is no other node"
    c = PendingShard("c", "c.tar", ("samples",))
    assert failures.read_failed(c, "shard_damaged", here, 2, 0.0) is None, "it has been read"


# -- too many quarantined shards


def test_ten_quarantined_shards_are_tolerated_and_more_than_the_allowed_share_stop_the_run() -> None:
    failures = policy(shards=200, allowed_share=0.01)
    assert [failures.shard_quarantined(str(number), "x") for number in range(10)] == [None] * 10
    assert failures.shard_quarantined("0", "x") is None, "a shard counts once"
    stop = failures.shard_quarantined("10", "shard_missing: no such file")
    assert stop is not None
    assert "stopped: 11 of 200 shards are quarantined, more than failures.allowed_share = 0.01" in str(stop.error)
    assert "share the cause of the last one, 10: shard_missing: no such file. Fix it and run" in str(stop.error)
    assert "--retry-quarantined" in str(stop.error)


def test_the_allowed_share_counts_shards_that_earlier_runs_quarantined() -> None:
    failures = policy(shards=1000, quarantined_before=49, allowed_share=0.05)
    assert failures.shard_quarantined("a", "x") is None
    assert failures.quarantined_shards == 50
    assert failures.shard_quarantined("b", "x") is not None


def test_error_texts_name_the_error_once() -> None:
    assert error_text(RAISED) == "ValueError: odd"
    assert error_text(LayerFailure("captions/c", "odd")) == "LayerFailure: captions/c: odd"


def test_storage_errors_of_a_worker_cost_an_attempt_and_of_the_driver_stop_the_run() -> None:
    error = StorageError("bucket is unreachable")
    assert policy().lease_raised(A, error, 0.0) == StopRun(error)
    assert isinstance(policy().lease_raised(A, ShardFailure(str(error), False), 0.0), Retry)


def test_no_sequence_of_failures_quarantines_a_shard_that_never_fails_alone() -> None:
    rng = random.Random(0)
    failures = policy(attempts=1000, solo_attempts=1)
    for _ in range(500):
        shards = (A, B) if rng.random() < 0.5 else (B, A)
        decisions = die(failures, *shards, hung=rng.random() < 0.5)
        assert decisions == [RunAlone(shard) for shard in shards]
