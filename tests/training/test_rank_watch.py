"""Which ranks are absent, who reports a wait, and when it ends the processes."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from reinforce.training import ranks as rank_watch
from reinforce.training.ranks import (
    AbsentRanks,
    RankPlace,
    RankWatch,
    absent_ranks,
    describe_rank,
    next_report,
)
from tests.helpers import sync_batch_norm  # noqa: F401  SyncBatchNorm's operations on CPUs
from tests.helpers.waiting import wait_for

TIMED_OUT = RuntimeError("[unbound_buffer.cc:78] Timed out waiting 1000ms for recv operation to complete")


def place(count: int, waits: bool = False, age: float = 0.0, ended: str = "") -> RankPlace:
    now = time.time() - age
    return RankPlace(count, "the gradients of step 3", now - 60, "model.py:7 in forward", waits, "node", 12, now, ended)


def test_the_absent_are_those_behind_or_lost_or_busy_with_their_own_code() -> None:
    cases: list[tuple[dict[int, RankPlace], list[int]]] = [
        ({1: place(7), 2: place(6)}, [2]),
        ({1: place(7)}, [2]),
        ({1: place(7, age=60), 2: place(7)}, [1]),
        ({1: place(7, waits=True), 2: place(7, ended="ValueError")}, [2]),
        ({1: place(7, waits=True), 2: place(7)}, [2]),
        ({1: place(8), 2: place(7, waits=True)}, [1]),
        ({1: place(7, waits=True), 2: place(7, waits=True)}, []),
    ]
    for others, absent in cases:
        assert absent_ranks({0: place(7, waits=True), **others}, 0, 3, silence=30) == absent


def test_a_message_says_where_a_rank_is_and_what_to_look_at() -> None:
    for where, message in (
        (
            place(7),
            "Rank 4 (pid 12 on node) has been at the gradients of step 3 for 60 s, in model.py:7 in forward. Look at "
            "what it waits for there: `py-spy dump --pid 12` on node shows its threads.",
        ),
        (place(7, age=90), "has written nothing for 90 s, at the gradients of step 3: it was killed"),
        (place(7, ended="KeyError: x"), "has failed at the gradients of step 3: KeyError: x."),
        (None, "Rank 4 has not started: look at the log of its process."),
    ):
        assert message in describe_rank(4, where, 30)


def watches(count: int, **options: Any) -> list[RankWatch]:
    store = dist.HashStore()
    return [RankWatch(store, rank, count, interval=0.02, **options) for rank in range(count)]


def test_a_wait_is_reported_by_one_rank_each_time_and_ends_the_processes_at_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rank_watch, "_GRACE", 0.1)
    reports: list[str] = []
    ended = threading.Event()
    first, second, third = all_ = watches(
        3, timeout=timedelta(seconds=0.4), report=reports.append, end_process=lambda status: ended.set()
    )
    first.at("the update of step 1", waits=True)
    third.at("the update of step 1", waits=True)
    wait_for(ended.is_set)
    second.at("the update of step 1", waits=True)
    for one in all_:
        one.close()
    assert "for rank 1. Rank 1 (pid " in reports[0]
    assert "has been at the start for " in reports[0]
    early = [text for text in reports if text.endswith("It has waited for 0 s.")]
    assert len(early) <= 4, "at 0.2 s, at 0.4 s, and each of two ranks at the limit of 0.5 s"
    due, times = 300.0, []
    while due < 5000:
        times.append(due)
        due = next_report(due + 7, 300, 3720)
    assert times == [300, 600, 1200, 2400, 3720, 4027, 4334, 4641, 4948], "the same on all ranks"


def test_an_error_of_a_collective_names_the_ranks_and_another_error_is_left_alone() -> None:
    first, second = watches(2)
    first.at("the gradients of step 1")
    second.close(ValueError("no memory"))
    absent = first.explain(TIMED_OUT)
    assert isinstance(absent, AbsentRanks)
    assert "Rank 1 (pid " in str(absent)
    assert "has failed at the start: ValueError: no memory." in str(absent)
    assert str(absent).endswith(f"The error of rank 0 is: {TIMED_OUT}")
    assert first.explain(RuntimeError("size mismatch")) is None
    first.close()

    class Gone(dist.HashStore):
        def check(self, keys: list[str]) -> bool:
            raise dist.DistNetworkError("Connection reset by peer")

    watch = RankWatch(Gone(), 1, 2, interval=60)
    assert "rank 0, which keeps the list of places, cannot be reached" in watch.describe()
    watch._closed.set()
