"""Augmentation backends by name."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from reinforce.config import Augmentations, parse_config
from reinforce.dataset.augment import AUGMENTATION_BACKEND, replay, sample_augmentation
from reinforce.dataset.backends import BACKENDS, load_backend
from reinforce.engine.recipe import build_layers
from reinforce.errors import UserError


def photo(width: int = 60, height: int = 45, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_the_config_accepts_every_backend_and_no_other() -> None:
    assert Augmentations().backend == AUGMENTATION_BACKEND
    assert [Augmentations(backend=name).backend for name in BACKENDS] == list(BACKENDS)
    with pytest.raises(UserError, match=r"augmentations\.backend.*torchvision-pil-1"):
        parse_config({"source": "x.tar", "output": "out", "augmentations": {"backend": "torchvision-pil-0"}})


def test_an_unknown_backend_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"unknown augmentation backend 'other-1'; this version has torchvision-pil-1"):
        load_backend("other-1")


def test_the_default_backend_gives_the_pixels_of_replay() -> None:
    image = photo()
    for index in range(20):
        record = sample_augmentation(Augmentations(size=32), 0, "key", index, *image.size)
        for size in (None, 48):
            pixels = load_backend(AUGMENTATION_BACKEND)(image, record, size)
            np.testing.assert_array_equal(pixels, replay(image, record, size))


def test_the_recipe_names_the_backend_once_among_the_policies() -> None:
    config = parse_config({"source": "x.tar", "output": "out"})
    recipe = build_layers(config, {})["samples"].recipe
    assert recipe["policies"]["augmentation"] == AUGMENTATION_BACKEND
    assert "backend" not in recipe["augmentations"], "datasets were made before there was a choice"
