"""Threads that record what they work on."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import pytest

from reinforce.engine.watch import WatchedThreads


@dataclass
class Item:
    key: str


def test_the_longest_running_item_is_reported_until_it_ends() -> None:
    begun, release = threading.Semaphore(0), threading.Event()

    def work(item: Item) -> str:
        begun.release()
        release.wait(10)
        return item.key

    with WatchedThreads(2) as threads:
        assert threads.longest() == (None, 0.0)
        first = threads.submit(work, Item("first"))
        begun.acquire(timeout=10)
        threads.submit(work, Item("second"))
        begun.acquire(timeout=10)
        key, seconds = threads.longest()
        assert (key, seconds > 0) == ("first", True)
        release.set()
        assert first.result(10) == "first"
    assert threads.longest() == (None, 0.0)
    assert threads.finished == 2


def test_an_item_that_raises_counts_as_finished_and_its_error_is_raised() -> None:
    with WatchedThreads(1) as threads:
        with pytest.raises(ZeroDivisionError):
            threads.submit(lambda: 1 / 0).result(10)
        assert threads.longest() == (None, 0.0)
    assert threads.finished == 1
