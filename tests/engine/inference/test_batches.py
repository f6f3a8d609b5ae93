"""Batches of rows, two of a shard in work, and the order in which shards use the accelerator."""

from __future__ import annotations

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from reinforce.engine.decode.row import Row
from reinforce.engine.inference.batches import Batches
from reinforce.engine.inference.models import PriorityLock
from reinforce.engine.messages.pulse import LeaseWatch


def rows(count: int) -> list[Row]:
    return [Row(f"{number}", None) for number in range(count)]


def keys(batch: list[Row]) -> str:
    return "".join(row.key for row in batch)


def test_batches_are_yielded_in_order_and_the_end_gets_all_rows() -> None:
    with Batches(lambda: 2, LeaseWatch("a")) as batches:
        found = [(keys(batch), result) for batch, result in batches.run(rows(5), keys, keys)]
    assert found == [("01", "01"), ("23", "23"), ("4", "4"), ("", "01234")]


def test_the_older_of_two_shards_keeps_the_accelerator_between_its_batches() -> None:
    lock, used, started = PriorityLock(), "", threading.Event()

    def shard(name: str, order: int) -> None:
        def run(batch: list[Row]) -> None:
            nonlocal used
            with lock.take(order):
                started.set()
                while name == "a" and keys(batch) != "3" and not any(order == 1 for order, _ in lock._waiting):
                    time.sleep(0.001)
                used += name

        with Batches(lambda: 1, LeaseWatch(name)) as batches:
            for _ in batches.run(rows(4), run, lambda _: None):
                time.sleep(0.005)  # the texts of a batch, while the next one waits for its turn

    with ThreadPoolExecutor(2) as threads:
        older = threads.submit(shard, "a", 1)
        assert started.wait(600)
        threads.submit(shard, "b", 2).result()
        older.result()
    assert used == "aaaabbbb"


def test_an_error_arrives_once_no_batch_is_in_work() -> None:
    working, ended = threading.Event(), threading.Event()

    def run(batch: list[Row]) -> None:
        if keys(batch) == "0":
            assert working.wait(600)
            raise ValueError("odd")
        working.set()
        time.sleep(0.1)
        ended.set()

    with pytest.raises(ValueError, match="odd"), Batches(lambda: 1, LeaseWatch("a")) as batches:
        list(batches.run(rows(3), run, lambda _: None))
    assert ended.is_set()


def test_the_oldest_waiting_shard_gets_the_lock_first() -> None:
    lock, order = PriorityLock(), []

    def use(number: int) -> None:
        with lock.take(number):
            order.append(number)

    threads = [threading.Thread(target=use, args=(number,)) for number in (5, 3, 4, 3)]
    with lock.take(9):
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 600
        while lock.waiting < 4:
            assert time.monotonic() < deadline
            time.sleep(0.001)
    for thread in threads:
        thread.join(600)
    assert order == [3, 3, 4, 5]


def test_one_thread_at_a_time_holds_the_lock_and_an_exception_releases_it() -> None:
    lock, inside, most = PriorityLock(), 0, 0
    orders = [lock.next_order() for _ in range(4)]
    assert orders == [1, 2, 3, 4]

    def use(order: int) -> None:
        nonlocal inside, most
        for _ in range(50):
            with contextlib.suppress(ZeroDivisionError), lock.take(order):
                inside += 1
                most = max(most, inside)
                inside -= 1
                raise ZeroDivisionError

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(use, orders))
    assert most == 1
