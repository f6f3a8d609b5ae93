"""The bounded map over decode processes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from reinforce.config import parse_config
from reinforce.engine.decode.ahead import chunk_items, decode_ahead
from reinforce.engine.decode.rows import RowSpec
from reinforce.source.samples import RawSample, Refusal
from schemas import Reason
from tests.helpers.data import config_of, picture
from tests.helpers.decode_faults import SizedItem
from tests.helpers.decoding import lease

CONFIG = parse_config(config_of("x", "y", captioners={}, teachers={}))
IMAGE = picture(0, 40, 30)


def item(number: int, size: int = 0) -> SizedItem:
    return SizedItem(f"k{number}", RawSample(f"k{number}", IMAGE, 0, len(IMAGE), {}), None, size)


@pytest.mark.parametrize(("mebibytes", "most"), [(0, 16), (10, 12), (50, 2), (500, 1)])
def test_items_are_read_ahead_up_to_a_number_and_a_number_of_bytes(mebibytes: int, most: int) -> None:
    read = 0

    def items() -> Iterator[SizedItem]:
        nonlocal read
        for number in range(40):
            read += 1
            yield item(number, mebibytes * 2**20)

    with lease(CONFIG, RowSpec(crops=True)) as taken:
        furthest = []
        for done, (found, cell, _) in enumerate(decode_ahead(taken, items(), 16), start=1):
            assert found is not None
            assert found.key == f"k{done - 1}", "in order"
            furthest.append(read - done)
            taken.free.release([cell])
    assert max(furthest) == most


def test_refusals_pass_through_in_order() -> None:
    refusal = Refusal("bad", Reason.NO_IMAGE, "no image")
    with lease(CONFIG, RowSpec(crops=True)) as taken:
        found = [outcome for _, _, outcome in decode_ahead(taken, [item(0), refusal, item(1), refusal], 16)]
    assert [outcome == refusal for outcome in found] == [False, True, False, True]


def test_chunks_spread_a_window_over_all_processes() -> None:
    assert [chunk_items(256, 2), chunk_items(256, 24), chunk_items(50, 12), chunk_items(4, 8)] == [8, 5, 2, 1]
