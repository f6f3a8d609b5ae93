"""The bounded map over threads: order, bounds and errors."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from reinforce.processes.prefetch import prefetch


def test_items_are_read_ahead_up_to_a_number() -> None:
    read = 0

    def items() -> Iterator[int]:
        nonlocal read
        for item in range(40):
            read += 1
            yield item

    with ThreadPoolExecutor(2) as pool:
        furthest = []
        for done, result in enumerate(prefetch(pool, int, items(), 16), start=1):
            assert result == done - 1, "in order"
            furthest.append(read - done)
    assert max(furthest) == 16


def test_results_are_in_order_and_all_items_are_computed() -> None:
    with ThreadPoolExecutor(4) as pool:
        assert list(prefetch(pool, str, range(50), window=7)) == [str(item) for item in range(50)]
        assert list(prefetch(pool, str, [], window=7)) == []


def test_an_error_is_raised_in_place_of_its_result() -> None:
    with ThreadPoolExecutor(2) as pool:
        results = prefetch(pool, lambda item: 6 // item, [3, 2, 0, 1], window=4)
        assert [next(results), next(results)] == [2, 3]
        with pytest.raises(ZeroDivisionError):
            next(results)
