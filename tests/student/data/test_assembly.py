"""Batches assembled from parts, and their memory, which is reused but never while a batch still references it."""

from __future__ import annotations

from collections import Counter

import torch

from reinforce.student.data.assembly import Assembler, BufferPool
from reinforce.student.data.parts import Part, PartBuffers

TARGETS = ((("t", "image"), 2), (("t", "caption"), 2), (("u", "image"), 3))


def part(start: int, count: int, view: int = 0) -> tuple[Part, PartBuffers]:
    rows = torch.arange(start, start + count)
    image = rows.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 4, 4, 3).contiguous()
    views = image[:, :view, :view].contiguous()
    buffers = PartBuffers(image, views, rows[:, None] + torch.arange(7) / 10)
    tokens = torch.stack([rows[:, None].expand(-1, 5), -rows[:, None].expand(-1, 5)])
    texts = [(f"true {i}", f"synthetic {i}") for i in rows.tolist()]
    return Part([str(i) for i in rows.tolist()], buffers, tokens, texts, Counter()), buffers


def test_parts_are_concatenated_and_vectors_split_by_teacher() -> None:
    parts, buffers = zip(part(0, 2), part(2, 3), strict=True)
    batch = Assembler(("caption", "synthetic"), TARGETS, (), False).assemble(parts, buffers)
    assert batch.keys() == {"key", "image", "caption", "synthetic", "targets"}
    assert batch["key"] == list("01234")
    assert batch["image"][:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert batch["synthetic"][:, 0].tolist() == [0, -1, -2, -3, -4]
    shapes = {t: {what: tuple(v.shape) for what, v in of.items()} for t, of in batch["targets"].items()}
    assert shapes == {"t": {"image": (5, 2), "caption": (5, 2)}, "u": {"image": (5, 3)}}
    torch.testing.assert_close(batch["targets"]["u"]["image"][4], torch.tensor([4.4, 4.5, 4.6]))


def test_online_teachers_get_views_and_texts() -> None:
    for view in (0, 2):
        parts, buffers = zip(part(0, 2, view), part(2, 3, view), strict=True)
        batch = Assembler(("caption", "synthetic"), (), ("a", "b"), False).assemble(parts, buffers)
        assert batch["views"]["a"] is batch["views"]["b"]
        assert (batch["views"]["a"] is batch["image"]) == (view == 0), "without views, the image is what teachers see"
        assert batch["views"]["a"].shape == (5, view or 4, view or 4, 3)
        assert batch["texts"]["synthetic"] == [f"synthetic {i}" for i in range(5)]


def test_memory_is_reused_only_when_nothing_references_it() -> None:
    pool = BufferPool()
    batch = torch.from_numpy(pool.array((4, 2)))
    place, part = batch.data_ptr(), batch[1:3]
    assert torch.from_numpy(pool.array((4, 2))).data_ptr() != place
    del batch
    assert torch.from_numpy(pool.array((4, 2))).data_ptr() != place, "a part of it is still referenced"
    del part
    assert torch.from_numpy(pool.array((2, 4))).data_ptr() != place
    places = {torch.from_numpy(pool.array((4, 2))).data_ptr() for _ in range(9)}
    assert len(places) <= 2, "one after the other, they alternate between the free arrays"
    held = [torch.from_numpy(pool.array((4, 2))) for _ in range(3)]
    assert place in {tensor.data_ptr() for tensor in held}
    assert len({tensor.data_ptr() for tensor in held}) == 3
