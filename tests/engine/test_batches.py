"""Batches of rows, two of a shard in work."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from reinforce.engine.decode.rows import Row
from reinforce.engine.inference.batches import Batches
from reinforce.engine.inference.turns import PriorityLock
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
    turns, used, started = PriorityLock(), "", threading.Event()

    def shard(name: str, order: int) -> None:
        def run(batch: list[Row]) -> None:
            nonlocal used
            with turns.take(order):
                started.set()
                while name == "a" and keys(batch) != "3" and not any(order == 1 for order, _ in turns._waiting):
                    time.sleep(0.001)
                used += name

        with Batches(lambda: 1, LeaseWatch(name)) as batches:
            for _ in batches.run(rows(4), run, lambda _: None):
                time.sleep(0.005)  # the texts of a batch, while the next one waits for its turn

    with ThreadPoolExecutor(2) as threads:
        older = threads.submit(shard, "a", 1)
        assert started.wait(120)
        threads.submit(shard, "b", 2).result()
        older.result()
    assert used == "aaaabbbb"


def test_an_error_arrives_once_no_batch_is_in_work() -> None:
    working, ended = threading.Event(), threading.Event()

    def run(batch: list[Row]) -> None:
        if keys(batch) == "0":
            assert working.wait(120)
            raise ValueError("odd")
        working.set()
        time.sleep(0.1)
        ended.set()

    with pytest.raises(ValueError, match="odd"), Batches(lambda: 1, LeaseWatch("a")) as batches:
        list(batches.run(rows(3), run, lambda _: None))
    assert ended.is_set()
