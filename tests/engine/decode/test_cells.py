"""Cells of pixels in one memory."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from reinforce.dataset.augment.backends import load_backend
from reinforce.dataset.augment.records import AUGMENTATION_BACKEND, Augmentation, Crop, replay
from reinforce.engine.decode.cells import FreeCells, PixelLayout, runs
from teachers.preprocessing.fit import fit
from teachers.protocols import ImageSpec

VIEW = ImageSpec((6, 4), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic", "squash")


def test_a_layout_divides_memory_into_cells_that_share_it() -> None:
    layout = PixelLayout((2, 8), (VIEW,))
    assert layout.cell_bytes == 2 * 8 * 8 * 3 + 6 * 4 * 3
    memory = np.zeros(3 * layout.cell_bytes + 5, np.uint8)
    cells = layout.cells(memory)
    assert cells.crops is not None
    assert (cells.crops.shape, cells.views[VIEW].shape) == ((3, 2, 8, 8, 3), (3, 6, 4, 3))
    cells.crops[:] = 1
    cells.views[VIEW][:] = 2
    assert np.bincount(memory).tolist() == [5, 3 * 2 * 8 * 8 * 3, 3 * 6 * 4 * 3]


def test_pixels_are_written_into_one_cell_only() -> None:
    layout = PixelLayout((1, 8), (VIEW,))
    cells = layout.cells(np.full(3 * layout.cell_bytes, 7, np.uint8))
    image = Image.effect_noise((20, 16), 90).convert("RGB")
    record = Augmentation(Crop(2, 3, 10, 12), 8, None)
    cells.write(1, image, [record], load_backend(AUGMENTATION_BACKEND))
    assert cells.crops is not None
    np.testing.assert_array_equal(cells.crops[1, 0], np.asarray(replay(image, record)))
    np.testing.assert_array_equal(cells.views[VIEW][1], fit(image, VIEW))
    for array in (cells.crops, cells.views[VIEW]):
        assert (array[[0, 2]] == 7).all()
    cells.blacken(1)
    assert not cells.crops[1].any()
    assert not cells.views[VIEW][1].any()


def test_the_lowest_free_cell_is_taken_first() -> None:
    free = FreeCells(4)
    assert [free.take() for _ in range(4)] == [0, 1, 2, 3]
    free.release([2, 0])
    assert (len(free), free.take(), free.take()) == (2, 0, 2)
    with pytest.raises(IndexError):
        free.take()


@given(st.lists(st.integers(0, 9), unique=True, min_size=1))
def test_runs_are_the_cells_in_order_without_copies(cells: list[int]) -> None:
    array = np.arange(20, dtype=np.uint8).reshape(10, 2)
    found = runs(array, cells)
    np.testing.assert_array_equal(np.concatenate(found), array[cells])
    assert all(np.shares_memory(part, array) for part in found)
    assert len(found) == 1 + sum(b != a + 1 for a, b in itertools.pairwise(cells))
