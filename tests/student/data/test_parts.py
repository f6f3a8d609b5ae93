"""Pixels, tokens and vectors of examples in buffers, and batches assembled from them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from reinforce.config import Limits
from reinforce.dataset.augment.device import augment
from reinforce.dataset.augment.records import Augmentation, Crop, Op
from reinforce.errors import UserError
from reinforce.student.data.assembly import BufferPool
from reinforce.student.data.examples import Example, SampleFile
from reinforce.student.data.parts import PartMaker
from tests.helpers.data import picture
from tests.helpers.evaluation import encode_png
from tests.helpers.in_loaders import letters

FILE = SampleFile("samples/x.parquet", Limits())
CROP = Augmentation(Crop(top=2, left=3, height=20, width=24), 16, None)


def example(number: int) -> Example:
    vectors = np.full(5, number, np.float32)
    return Example(FILE, f"k{number}", picture(number), CROP, (f"true {number}", f"synthetic {number}"), vectors)


def test_an_image_that_is_not_the_augmented_one_or_has_a_damaged_record_is_named() -> None:
    strict = FILE._replace(limits=Limits(pixels=100))  # of the file that has the image
    ops = (Op("Posterize", 9.0), Op("Melt", 1.0), Op("Rotate", float("nan")))
    for device, damaged in (
        (False, example(0)._replace(image=b"not an image")),
        (False, example(0)._replace(image=picture(0, width=8, height=6))),
        (False, example(0)._replace(file=strict)),
        *((True, example(0)._replace(augmentation=Augmentation(CROP.crop, 16, (op,)))) for op in ops),
    ):
        maker = PartMaker(12, 5, letters, device=device)
        with pytest.raises(UserError, match=r"samples/x\.parquet, key k0: this is not the image that was augmented"):
            maker.make([damaged], maker.allocate(1), Counter())


def test_translations_are_scaled_or_shift_by_the_stored_pixels() -> None:
    """The crop is white; a translation to the right leaves black columns of its own width."""
    image = np.full((20, 24, 3), 255, np.uint8)
    record = Augmentation(Crop(0, 0, 20, 24), 16, (Op("TranslateX", 4.9), Op("TranslateY", -3.0)))
    white = example(0)._replace(image=encode_png(image), augmentation=record)

    def shifts(size: int, **options: Any) -> list[int]:
        maker = PartMaker(size, 5, letters, **options)
        part = maker.make([white], maker.allocate(1), Counter())
        assert part.buffers is not None
        buffers = [part.buffers.image, part.buffers.view] if maker.sides[1] else [part.buffers.image]
        black = [(pixels[0] == 0).all(dim=-1) for pixels in buffers]
        return [int(side.sum()) for mask in black for side in (mask.all(dim=0), mask.all(dim=1))]

    assert shifts(16) == shifts(16, scaled=False) == [4, 3]
    assert shifts(32) == [9, 6]
    assert shifts(32, scaled=False) == [4, 3]
    assert shifts(32, scaled=False, view=48) == [4, 3, 14, 9], "teachers in the loop see what a stored one would"


def test_an_image_that_is_augmented_on_the_device_has_the_pixels_of_the_default_backend() -> None:
    """Also at another size, where translations are scaled or not; a crop without room in a cell is resized here."""
    records = [
        Augmentation(Crop(2, 3, 20, 24), 16, (Op("TranslateX", 4.9), Op("Equalize", 0.0))),
        Augmentation(Crop(0, 1, 40, 39), 16, (Op("Rotate", -9.0),)),
        Augmentation(Crop(2, 3, 7, 40), 16, None),
    ]
    examples = [example(n)._replace(augmentation=r, image=picture(n, 48, 40)) for n, r in enumerate(records)]

    def images(size: int, scaled: bool, device: bool) -> torch.Tensor:
        maker = PartMaker(size, 5, letters, scaled=scaled, device=device)
        part = maker.make(examples, maker.allocate(3), Counter())
        assert part.buffers is not None
        return augment(part.buffers.image, part.records, size) if device else part.buffers.image

    for size, scaled in ((16, True), (12, True), (12, False)):
        found, expected = (images(size, scaled, device).int() for device in (True, False))
        assert (found - expected).abs().max() <= 1
        assert (found != expected).float().mean() < 0.01


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
