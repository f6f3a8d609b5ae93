"""Pixels, tokens and vectors of examples in buffers, and batches assembled from them."""

from __future__ import annotations

import multiprocessing
from collections import Counter

import numpy as np
import pytest
import torch

from reinforce.config import Limits
from reinforce.dataset.augment.records import Augmentation, Crop, replay
from reinforce.errors import UserError
from reinforce.images.policy import decode
from reinforce.student.data.assembly import Assembler, BufferPool
from reinforce.student.data.examples import Example, SampleFile
from reinforce.student.data.parts import Part, PartBuffers, PartMaker
from tests.helpers.data import picture
from tests.helpers.reinforced import letters, read

FILE = SampleFile("samples/x.parquet", Limits())
CROP = Augmentation(Crop(top=2, left=3, height=20, width=24), 16, None)


def tensors_of(buffers: PartBuffers) -> tuple[torch.Tensor, ...]:
    return buffers.image, buffers.view, buffers.vectors


def fill(buffers: PartBuffers) -> None:
    """Runs in another process."""
    for tensor, value in zip(tensors_of(buffers), (1, 2, 0.5), strict=True):
        tensor.fill_(value)


def example(number: int) -> Example:
    vectors = np.full(5, number, np.float32)
    return Example(FILE, f"k{number}", picture(number), CROP, (f"true {number}", f"synthetic {number}"), vectors)


@pytest.mark.parametrize(("view", "shape"), [(None, (0, 0)), (12, (0, 0)), (16, (16, 16))])
def test_a_part_has_the_pixels_tokens_and_vectors_of_its_examples(view: int | None, shape: tuple[int, int]) -> None:
    maker = PartMaker(12, 5, letters, view)
    examples = [example(0), example(1)]
    part = maker.make(examples, maker.allocate(3), Counter({"no caption": 1}))
    assert part.buffers is not None
    assert (part.keys, part.unusable) == (["k0", "k1"], {"no caption": 1})
    assert part.buffers.view.shape == (2, *shape, 3)
    for i, each in enumerate(examples):
        image = decode(each.image, Limits())
        assert np.array_equal(part.buffers.image[i].numpy(), replay(image, CROP, 12))
        if shape[0]:
            assert np.array_equal(part.buffers.view[i].numpy(), replay(image, CROP, 16))
    assert part.buffers.vectors.tolist() == [[0.0] * 5, [1.0] * 5]
    assert [read(tokens) for tokens in part.tokens] == [["true 0", "true 1"], ["synthetic 0", "synthetic 1"]]
    assert part.texts == ([each.texts for each in examples] if view else [])


def test_parts_are_made_in_the_selected_buffers() -> None:
    maker = PartMaker(12, 5, letters)
    buffers = maker.allocate(2, 3, 4)
    buffers.image.zero_()
    maker.make([example(1)], buffers.select(1, 2), Counter())
    filled = [(p, d, n) for p in range(2) for d in range(3) for n in range(4) if buffers.image[p, d, n].any()]
    assert filled == [(1, 2, 0)]
    assert buffers.vectors[1, 2, 0].tolist() == [1.0] * 5


def test_shared_buffers_are_shared_between_processes() -> None:
    maker = PartMaker(12, 5, letters, view=16)
    buffers, alike = maker.allocate_shared(2, 3), maker.allocate(2, 3)
    for shared, other in zip(tensors_of(buffers), tensors_of(alike), strict=True):
        assert (shared.shape, shared.dtype) == (other.shape, other.dtype)
        shared.zero_()
    process = multiprocessing.get_context("forkserver").Process(target=fill, args=(buffers,))
    process.start()
    process.join(240)
    assert process.exitcode == 0
    assert [tensor.unique().tolist() for tensor in tensors_of(buffers)] == [[1], [2], [0.5]]


@pytest.mark.parametrize("image", [b"not an image", picture(0, width=8, height=6)])
def test_an_image_that_is_not_the_augmented_one_is_named(image: bytes) -> None:
    maker = PartMaker(12, 5, letters)
    with pytest.raises(UserError, match=r"samples/x\.parquet, key k0: this is not the image that was augmented"):
        maker.make([example(0)._replace(image=image)], maker.allocate(1), Counter())
    strict = FILE._replace(limits=Limits(pixels=100))  # of the file that has the image
    with pytest.raises(UserError, match="this is not the image that was augmented"):
        maker.make([example(0)._replace(file=strict)], maker.allocate(1), Counter())


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
