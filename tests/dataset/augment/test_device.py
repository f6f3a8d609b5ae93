"""The augmentation backend ``device-1`` has the pixels of ``torchvision-pil-1``."""

from __future__ import annotations

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from reinforce.config import Augmentations
from reinforce.dataset.augment.backends import sample_augmentation
from reinforce.dataset.augment.device import augment
from reinforce.dataset.augment.device_records import CELL, CellRecord, fill_cell
from reinforce.dataset.augment.operations import OPS, torchvision_magnitudes
from reinforce.dataset.augment.records import Augmentation, Crop, Op, replay

SIZE = 48
HEIGHT_FIRST = int(PIL.__version__.split(".")[0]) >= 13


def noisy(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng((seed, width, height))
    coarse = Image.fromarray(rng.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray((smooth + rng.integers(-20, 20, smooth.shape)).clip(0, 255).astype(np.uint8))


def on_device(images: list[Image.Image], records: list[Augmentation], size: int = SIZE) -> np.ndarray:
    cells = np.zeros((len(images), CELL * size, CELL * size, 3), np.uint8)
    filled = [fill_cell(*of, size, cell) for *of, cell in zip(images, records, cells, strict=True)]
    return augment(torch.from_numpy(cells), filled, size).numpy().astype(int)


@pytest.mark.parametrize("name", OPS)
def test_an_operation_has_exactly_the_same_pixels(name: str) -> None:
    records = []
    for level in (3, 9, 30):
        magnitude = torchvision_magnitudes(level, SIZE)[name]
        signs = (1, -1) if name in OPS[1:10] else (1,)
        records += [Augmentation(Crop(0, 0, SIZE, SIZE), SIZE, (Op(name, sign * magnitude),)) for sign in signs]
    images = [noisy(SIZE, SIZE, seed) for seed in range(len(records))]
    grey, dark = Image.new("RGB", (SIZE, SIZE), (90, 90, 90)), Image.new("RGB", (SIZE, SIZE))
    images, records = [*images, grey, dark], [*records, records[0], records[0]]
    expected = [np.asarray(replay(*of)) for of in zip(images, records, strict=True)]
    np.testing.assert_array_equal(on_device(images, records), np.stack(expected))


def test_resized_crops_of_all_shapes_differ_by_one_level_in_few_places() -> None:
    sides = [(20, 30), (150, 40), (30, 90), (70, 95), (48, 60), (60, 48), (48, 48), (1, 1), (3, 190), (300, 200)]
    records = [Augmentation(Crop(0, 0, height, width), SIZE, None) for width, height in sides]
    images = [noisy(*side) for side in sides]
    expected = np.stack([np.asarray(replay(*of)) for of in zip(images, records, strict=True)]).astype(int)
    differences = abs(on_device(images, records) - expected)
    assert differences.max() <= (1 if HEIGHT_FIRST else 4)
    assert not HEIGHT_FIRST or (differences > 0).mean() < 1e-3


def test_sampled_records_have_the_same_pixels_but_for_few() -> None:
    policy = Augmentations(count=1, size=SIZE)
    images = [noisy(40 + 7 * n, 200 - 5 * n) for n in range(24)]
    records = [sample_augmentation(policy, 0, str(n), 0, *image.size) for n, image in enumerate(images)]
    expected = np.stack([np.asarray(replay(*of)) for of in zip(images, records, strict=True)]).astype(int)
    differences = abs(on_device(images, records) - expected)
    assert not HEIGHT_FIRST or (differences.max() <= 3 and (differences > 0).mean() < 1e-3)
    assert differences.mean() < 1


def test_a_crop_without_room_in_a_cell_is_resized_by_the_host() -> None:
    record, cell = Augmentation(Crop(0, 0, 100, 200), SIZE, None), np.zeros((CELL * SIZE) ** 2 * 3, np.uint8)
    assert fill_cell(noisy(200, 100), record, SIZE, cell) == CellRecord(SIZE, SIZE, ())
    np.testing.assert_array_equal(cell[: SIZE * SIZE * 3], np.asarray(replay(noisy(200, 100), record)).reshape(-1))
    with pytest.raises(ValueError, match="another image"):
        fill_cell(noisy(199, 100), record, SIZE, cell)
