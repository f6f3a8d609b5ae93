"""PriorityLock at the accelerator."""

from __future__ import annotations

import threading
import time

import pytest

from reinforce.engine.inference.turns import PriorityLock


def test_of_those_who_wait_the_oldest_shard_comes_first() -> None:
    turns, order = PriorityLock(), []

    def use(number: int) -> None:
        with turns.take(number):
            order.append(number)

    threads = [threading.Thread(target=use, args=(number,)) for number in (5, 3, 4, 3)]
    with turns.take(9):
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 120
        while len(turns._waiting) < 4:
            assert time.monotonic() < deadline
            time.sleep(0.001)
    for thread in threads:
        thread.join(120)
    assert order == [3, 3, 4, 5]


def test_one_at_a_time_holds_it_and_an_exception_gives_it_back() -> None:
    turns, inside, most = PriorityLock(), [0], [0]

    def use(number: int) -> None:
        for _ in range(50):
            with turns.take(number):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                inside[0] -= 1

    threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    with pytest.raises(ZeroDivisionError), turns.take(1):
        raise ZeroDivisionError
    with turns.take(2):
        assert most == [1]


def test_later_shards_have_higher_numbers() -> None:
    turns = PriorityLock()
    assert [turns.next_order() for _ in range(3)] == [1, 2, 3]
