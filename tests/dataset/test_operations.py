"""Faster forms of Pillow's operations give Pillow's pixels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageFilter

from reinforce.dataset.augment import operations
from tests.helpers.random_images import noise

SIDES = st.integers(1, 40)


@pytest.mark.parametrize("name", ["Brightness", "Color", "Contrast", "Sharpness"])
@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), SIDES, SIDES, st.booleans(), st.floats(-1.5, 1.5, width=32))
def test_enhancements_equal_pillows(name: str, seed: int, width: int, height: int, saturated: bool, by: float) -> None:
    image = noise(width, height, seed, saturated)
    expected = getattr(ImageEnhance, name)(image).enhance(1.0 + by)
    assert operations.TORCHVISION[name](image, by).tobytes() == expected.tobytes()


@pytest.mark.parametrize("value", range(0, 256, 15))
def test_smoothing_rounds_as_pillow_does_for_every_sum(value: int) -> None:
    """Images of two values have every sum of neighbours, next to each centre."""
    rng = np.random.default_rng(value)
    chosen = rng.choice(np.array([0, 1, value, 254, 255], np.uint8), (64, 64, 3))
    image = Image.fromarray(chosen)
    expected = Image.blend(image.filter(ImageFilter.SMOOTH), image, 0.0)
    assert operations.sharpness(image, -1.0).tobytes() == expected.tobytes()
