"""Which workers are asked for their pulse, also in clusters of 10,000 workers, and when one counts as hung: each
sentence of failures.py."""

from __future__ import annotations

import heapq
import random
import time

import pytest

from reinforce.config import Failures
from reinforce.engine.driver.failures import (
    CEILING,
    MODEL_FLOOR,
    STORAGE_FLOOR,
    StallLimits,
    find_hang,
    find_silence,
)
from reinforce.engine.driver.worker_pool import Polls, poll_interval
from reinforce.engine.pulse import (
    DECODING,
    READING,
    SERVER,
    WAITING,
    WRITING,
    LeasePulse,
    Pulse,
)


def test_few_workers_are_asked_every_five_seconds_and_many_in_turns_within_a_quarter_of_the_limit() -> None:
    asked = [(1, 300.0), (2_000, 300.0), (10_000, 300.0), (10_000, 30.0)]
    assert [poll_interval(workers, least) for workers, least in asked] == [5.0, 20.0, 75.0, 7.5]


def test_a_worker_is_asked_again_only_after_its_answer_and_time_in_which_the_driver_was_stopped_is_no_silence() -> None:
    polls: Polls[str] = Polls()
    polls.add("a", 0.0)
    assert polls.due(5.0, 300.0) == ["a"]
    assert [polls.unanswered(now) for now in (6.0, 5000.0, 5001.0)] == [[("a", 1.0)], [("a", 0.0)], [("a", 1.0)]]
    assert polls.due(5050.0, 300.0) == []
    polls.answered("a")
    assert polls.due(5054.0, 300.0) == [], "each turn is five seconds after the last"
    assert polls.due(5060.0, 300.0) == ["a"]
    polls.remove("a")
    assert polls.due(5070.0, 300.0) == []
    assert polls.unanswered(5070.0) == []


def test_no_healthy_worker_is_killed_and_every_hang_is_found_in_time_in_a_large_cluster() -> None:
    """Answers take up to two seconds, batches up to 20 s; 20 workers hang at one moment, 20 others stop answering."""
    rng, limit, workers = random.Random(0), 30.0, 10_000
    limits, polls = StallLimits(Failures(stall_seconds=limit)), Polls[int]()
    hung, silent = set(range(0, 200, 10)), set(range(5, 205, 10))
    began = [rng.uniform(-20.0, 0.0) for _ in range(workers)]  # of the batch in work
    answers: list[tuple[float, int]] = []
    killed: dict[int, float] = {}
    for worker in range(workers):
        polls.add(worker, 0.0)
    start = time.process_time()
    for tick in range(241):
        now = tick / 2
        while answers and answers[0][0] <= now:
            _, worker = heapq.heappop(answers)
            polls.answered(worker)
            while worker not in hung and now - began[worker] > 20.0:
                began[worker] += rng.uniform(1.0, 20.0)
            pulse = Pulse(leases=(LeasePulse("a", "model", now - began[worker]),))
            if worker not in killed and find_hang(pulse, {"a"}, limits):
                killed[worker] = now
                polls.remove(worker)
        for worker, seconds in polls.unanswered(now):
            if seconds > limit:
                killed[worker] = now
                polls.remove(worker)
        for worker in polls.due(now, limits.least):
            if worker not in silent:
                heapq.heappush(answers, (now + rng.uniform(0.0, 2.0), worker))
    assert killed.keys() == hung | silent
    assert max(killed.values()) < 60.0, "the limit, one round of requests, and the answers"
    assert time.process_time() - start < 20.0


LAYER = "embeddings/red/images"
SIX = StallLimits(Failures(stall_seconds=6.0))


def pulse(stage: str, seconds: float, what: str = "", key: str | None = None) -> Pulse:
    return Pulse(leases=(LeasePulse("a", stage, seconds, what),), key=key)


def hangs(stage: str, seconds: float, limits: StallLimits) -> bool:
    return find_hang(pulse(stage, seconds), {"a"}, limits) is not None


# -- limits


def test_a_given_limit_is_that_of_every_stage() -> None:
    limits = StallLimits(Failures(stall_seconds=6.0))
    limits.record({LAYER: 1000.0})
    for stage in (LAYER, READING, DECODING, WRITING):
        assert not hangs(stage, 6.0, limits)
        assert hangs(stage, 6.1, limits)


@pytest.mark.parametrize(
    ("slowest", "limit"),
    [(None, CEILING), (0.1, MODEL_FLOOR), (15.0, 300.0), (60.0, 1200.0), (900.0, CEILING), (2000.0, 6000.0)],
)
def test_the_limit_of_a_batch_follows_from_the_slowest_batch_of_its_layer(slowest: float | None, limit: float) -> None:
    limits = StallLimits(Failures())
    limits.record({} if slowest is None else {LAYER: slowest})
    limits.record({LAYER: 0.05, "another": 7000.0} if slowest else {})
    assert limits.seconds(LAYER) == limit
    assert not hangs(LAYER, limit, limits)
    assert hangs(LAYER, limit + 1, limits)


def test_a_first_batch_that_hung_for_an_hour_gets_a_quarter_of_it_and_other_stages_have_limits_of_their_own() -> None:
    limits = StallLimits(Failures(sample_seconds=1000.0))
    hang = find_hang(pulse(LAYER, 3601.0), {"a"}, limits)  # its shard runs alone next
    assert hang is not None
    limits.hung |= hang.stages
    assert (limits.seconds(LAYER), limits.seconds("another")) == (900.0, 3600.0)
    limits.record({LAYER: 100.0})
    assert limits.seconds(LAYER) == 2000.0, "what was measured counts more"
    assert (limits.seconds(READING), limits.seconds(WRITING)) == (STORAGE_FLOOR, STORAGE_FLOOR)
    assert limits.seconds(DECODING) == 2500.0, "decoding outlasts its own limit"


@pytest.mark.parametrize(
    ("a", "b", "hung"),
    [
        ((WAITING, 9999.0), (LAYER, 7.0), "b"),
        ((SERVER, 9999.0), (LAYER, 7.0), "b"),
        ((READING, 7.0), (LAYER, 0.1), "a"),
        ((LAYER, 0.1), ("of a lease that has ended", 7.0), ""),
    ],
)
def test_a_lease_that_waits_never_hangs_and_one_that_makes_no_progress_does_while_the_other_goes_on(
    a: tuple[str, float], b: tuple[str, float], hung: str
) -> None:
    both = Pulse(leases=(LeasePulse("a", *a), LeasePulse("b" if hung else "ended", *b)))
    hang = find_hang(both, {"a", "b"}, SIX)
    assert (hang.shards if hang else set()) == set(hung)


# -- messages


def test_the_message_names_shard_layer_batch_and_limit_or_the_image_in_work() -> None:
    limits = StallLimits(Failures())
    limits.record({LAYER: 2.0})
    assert find_hang(pulse(LAYER, 312.0, "16 rows, keys 'k16' to 'k31'", "k9"), {"a"}, limits).reason == (
        "a has made no progress for 312 s in layer embeddings/red/images (16 rows, keys 'k16' to 'k31') (limit: 300 s, "
        "because the slowest such step so far took 2 s; failures.stall_seconds sets another limit)"
    )
    assert find_hang(pulse(DECODING, 7.0, "key 'k3'", key="k9"), {"a"}, SIX).reason == (
        "a has made no progress for 7 s in decoding (key 'k3'); longest in a decode process: key 'k9' "
        "(limit: failures.stall_seconds = 6)"
    )


def test_a_worker_that_does_not_answer_has_the_limit_of_what_it_last_did() -> None:
    limits = StallLimits(Failures())
    assert find_silence(CEILING, Pulse(), limits) is None, "nothing is known of it"
    silence = find_silence(CEILING + 1, pulse(LAYER, 1.0), limits)
    assert silence is not None
    limits.hung |= silence.stages
    assert limits.seconds(LAYER) == STORAGE_FLOOR, "it does not get an hour again"
    limits.record({LAYER: 2.0})
    assert find_silence(300.0, pulse(LAYER, 1.0, "4 rows"), limits) is None
    hang = find_silence(301.0, pulse(LAYER, 1.0, "4 rows"), limits)
    assert hang.shards == frozenset(), "it may be another one by now"
    assert hang.reason == (
        "the worker has not answered for 301 s, as if something in it holds the interpreter lock; at its last answer "
        "it was at a in layer embeddings/red/images (4 rows) (limit: 300 s, because the slowest such step so far took "
        "2 s; failures.stall_seconds sets another limit)"
    )
