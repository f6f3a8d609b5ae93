"""Augmentation backends by name."""

from __future__ import annotations

import numpy as np
import pytest

from reinforce.config import Augmentations, parse_config
from reinforce.dataset.augment.backends import BACKENDS, load_backend
from reinforce.dataset.augment.records import AUGMENTATION_BACKEND, replay, sample_augmentation
from reinforce.dataset.layers import Layer
from reinforce.engine.plan.recipe import build_layers, describe_models
from reinforce.errors import UserError
from tests.helpers.data import config_of
from tests.helpers.random_images import noise


def test_the_config_accepts_every_backend_and_no_other() -> None:
    assert Augmentations().backend == AUGMENTATION_BACKEND
    assert [Augmentations(backend=name).backend for name in BACKENDS] == list(BACKENDS)
    with pytest.raises(UserError, match=r"augmentations\.backend.*torchvision-pil-1"):
        parse_config({"source": "x.tar", "output": "out", "augmentations": {"backend": "torchvision-pil-0"}})


def test_an_unknown_backend_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"backend 'other-1'; this version has torchvision-pil-1, fixed-point-1\."):
        load_backend("other-1")


def test_the_default_backend_gives_the_pixels_of_replay() -> None:
    image = noise(60, 45)
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


def test_another_backend_is_another_fingerprint_and_the_default_one_is_as_before() -> None:
    def layers(**augmentations: str) -> dict[str, Layer]:
        config = parse_config(config_of("x/{0..1}.tar", "out", augmentations=augmentations))
        return build_layers(config, describe_models(config))

    assert layers()["samples"].fingerprint == layers(backend=AUGMENTATION_BACKEND)["samples"].fingerprint
    assert layers()["samples"].fingerprint == "9a59ea0ee9feb030", "that of all datasets before there was a choice"
    other = layers(backend="fixed-point-1")
    assert other["samples"].recipe["policies"]["augmentation"] == "fixed-point-1"
    assert all(other[name].fingerprint != layer.fingerprint for name, layer in layers().items())


def test_published_augmentations_keep_their_backend() -> None:
    augmentations = {"count": 2, "backend": "fixed-point-1"}
    config = {"source": "x.tar", "output": "out", "reinforcements": "y.tar", "augmentations": augmentations}
    with pytest.raises(UserError, match=r"augmentations\.backend: remove it"):
        parse_config(config)
