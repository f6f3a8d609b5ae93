"""Batches on their way to the device, and parts of them."""

from __future__ import annotations

import pytest
import torch

from reinforce.training.batches import Prefetcher, slice_batch
from teachers.device.accelerator import Accelerator


def batch(start: int) -> dict[str, object]:
    return {"key": [str(start), str(start + 1)], "deep": {"left": torch.arange(start, start + 2)}}


def test_a_slice_has_the_same_samples_of_every_entry_and_shares_memory() -> None:
    whole = {"key": list("abcd"), "deep": {"left": torch.arange(8).reshape(4, 2)}}
    part = slice_batch(whole, 1, 3)
    assert part["key"] == ["b", "c"]
    assert part["deep"]["left"].tolist() == [[2, 3], [4, 5]]
    assert part["deep"]["left"].data_ptr() == whole["deep"]["left"][1:].data_ptr()  # type: ignore[index]


def test_batches_arrive_in_order_with_all_entries() -> None:
    prefetcher = Prefetcher([batch(0), batch(2)], Accelerator("cpu"))
    for start in (0, 2):
        prefetcher.fetch()
        found = prefetcher.take()
        assert found["key"] == [str(start), str(start + 1)]
        assert found["deep"]["left"].tolist() == [start, start + 1]


def test_a_feed_that_ends_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="the feed ended before the training"):
        Prefetcher([], Accelerator("cpu")).fetch()
