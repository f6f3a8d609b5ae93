from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from reinforce.prefetch import prefetch


@pytest.mark.parametrize(("mebibytes", "most"), [(0, 16), (10, 12), (50, 2), (500, 1)])
def test_large_images_are_not_read_far_ahead(mebibytes: int, most: int) -> None:
    read = 0

    def items() -> Iterator[int]:
        nonlocal read
        for item in range(40):
            read += 1
            yield item

    with ThreadPoolExecutor(2) as pool:
        furthest = []
        for done, result in enumerate(prefetch(pool, int, items(), 16, lambda _: mebibytes * 2**20), start=1):
            assert result == done - 1, "in order"
            furthest.append(read - done)
    assert max(furthest) == most
