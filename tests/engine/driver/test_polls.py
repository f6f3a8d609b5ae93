"""Which workers are asked for their pulse, also in clusters of 10,000 workers."""

from __future__ import annotations

import heapq
import random
import time

import pytest

from reinforce.config import Failures
from reinforce.engine.driver.policy.hangs import StallLimits, find_hang
from reinforce.engine.driver.polls import MAX_IN_FLIGHT, Polls, poll_interval
from reinforce.engine.messages.pulse import LeasePulse, Pulse


def test_few_workers_are_asked_every_five_seconds_and_many_in_turns_within_a_quarter_of_the_limit() -> None:
    asked = [(1, 300.0), (2_000, 300.0), (10_000, 300.0), (10_000, 30.0)]
    assert [poll_interval(workers, least) for workers, least in asked] == [5.0, 20.0, 75.0, 7.5]


def test_no_more_requests_are_under_way_than_allowed_and_slow_ones_keep_nobody_from_being_asked() -> None:
    polls: Polls[int] = Polls()
    for worker in range(5_000):
        polls.add(worker, 0.0)
    assert len(polls.due(5.0, 300.0)) == MAX_IN_FLIGHT
    assert polls.due(5.5, 300.0) == []
    assert len(polls.due(36.0, 300.0)) == MAX_IN_FLIGHT, "none of the first has answered, and others are asked"


def test_a_worker_is_asked_again_only_after_its_answer() -> None:
    polls: Polls[str] = Polls()
    polls.add("a", 0.0)
    assert polls.due(5.0, 300.0) == ["a"]
    assert polls.due(50.0, 300.0) == []
    polls.answered("a")
    assert polls.due(60.0, 300.0) == ["a"]
    polls.remove("a")
    assert polls.due(70.0, 300.0) == []
    assert polls.unanswered(70.0) == []


def test_time_in_which_the_driver_was_stopped_does_not_count_as_silence() -> None:
    polls: Polls[str] = Polls()
    polls.add("a", 0.0)
    polls.due(5.0, 300.0)
    assert [polls.unanswered(now) for now in (6.0, 5000.0, 5001.0)] == [[("a", 1.0)], [("a", 0.0)], [("a", 1.0)]]


@pytest.mark.parametrize("workers", [2_000, 10_000])
def test_no_healthy_worker_is_killed_and_every_hang_is_found_in_time_in_a_large_cluster(workers: int) -> None:
    """Answers take up to two seconds, batches up to 20 s; 20 workers hang at one moment, 20 others stop answering."""
    rng, limit = random.Random(0), 30.0
    limits, polls = StallLimits(Failures(stall_seconds=limit)), Polls[int]()
    hung, silent = set(range(0, 200, 10)), set(range(5, 205, 10))
    began = [rng.uniform(-20.0, 0.0) for _ in range(workers)]  # of the batch in work
    answers: list[tuple[float, int]] = []
    killed: dict[int, float] = {}
    for worker in range(workers):
        polls.add(worker, 0.0)
    start = time.process_time()
    for tick in range(401):
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
