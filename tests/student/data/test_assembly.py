"""Memory of batches that is used again, and never while a batch is still held."""

from __future__ import annotations

import torch

from reinforce.student.data.assembly import BufferPool


def test_memory_is_lent_again_only_when_nothing_refers_to_it() -> None:
    lent = BufferPool()
    batch = torch.from_numpy(lent.array((4, 2)))
    place, part = batch.data_ptr(), batch[1:3]
    assert torch.from_numpy(lent.array((4, 2))).data_ptr() != place
    del batch
    assert torch.from_numpy(lent.array((4, 2))).data_ptr() != place, "a part of it is still held"
    del part
    assert torch.from_numpy(lent.array((2, 4))).data_ptr() != place
    places = {torch.from_numpy(lent.array((4, 2))).data_ptr() for _ in range(9)}
    assert len(places) <= 2, "one after the other, they take turns in what is there"
    held = [torch.from_numpy(lent.array((4, 2))) for _ in range(3)]
    assert place in {tensor.data_ptr() for tensor in held}
    assert len({tensor.data_ptr() for tensor in held}) == 3
