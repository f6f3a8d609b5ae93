"""Full batches before a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from reinforce.config import Config, parse_config
from reinforce.dataset.layers import Layer
from reinforce.engine.inference.full_batch import find_batch, fit_batch
from reinforce.engine.inference.models import Counters, Models
from reinforce.engine.plan.recipe import build_layers, describe_models
from reinforce.errors import UserError
from tests.helpers.data import config_of
from tests.helpers.models import ColorTeacher, SeedCaptioner
from tests.helpers.small_device import MESSAGE, SmallDevice

CPU = torch.device("cpu")


class Teacher(ColorTeacher):
    """Needs memory for three rows of a device for each row that it encodes, and encodes at most 10 texts."""

    def __init__(self, device: SmallDevice) -> None:
        super().__init__(CPU)
        self.memory = device
        self.longest = 0

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        self.memory.check(3 * len(pixels) // 2)
        return super().encode_images(pixels)

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        self.longest = max(self.longest, *map(len, texts))
        if len(texts) > 10:
            raise torch.cuda.OutOfMemoryError(MESSAGE)
        return super().encode_texts(texts)


def setup(batch: Any, capacity: int = 17) -> tuple[Models, Config, list[Layer]]:
    device = SmallDevice(capacity)
    config = parse_config(config_of("x.tar", "out", workers={"batch": batch}))
    layers = [*build_layers(config, describe_models(config)).values()]
    teachers = {"red": Teacher(device), "blue": ColorTeacher(CPU, size=24, dim=12)}
    return Models(teachers, {"namer": SeedCaptioner(CPU)}, device), config, layers


def test_auto_is_the_largest_batch_that_fits_while_others_are_copied() -> None:
    models, config, layers = setup("auto", 50)  # four batches of 4 crops and 4 views are copied, and 12 more are needed
    found = find_batch(models, config, layers, largest=64)
    assert found.workers.images == 8, "4 rows with 2 augmentations"
    assert models.batches.texts(64) == 8
    assert models.batches.take_notes() == ()
    assert models.counters == Counters()
    with models.batches.on_device() as shared:
        assert shared, "the search is no reason to copy one batch at a time"


def test_a_batch_that_does_not_fit_is_reported_before_the_run() -> None:
    models, config, layers = setup(16)
    assert find_batch(models, config, layers).workers.batch == 16
    notes = models.batches.take_notes()
    assert any(
        "8 images at once do not fit in the memory of the device; from now on 4 images" in note for note in notes
    )


def test_on_the_cpu_auto_is_a_fixed_number_and_nothing_is_tried() -> None:
    models, config, layers = setup("auto", 0)
    assert fit_batch(models, config, layers).workers.batch == 256
    assert models.counters == Counters()


def test_a_model_that_fails_in_a_full_batch_only_ends_the_run_before_it_begins() -> None:
    models, config, layers = setup(64, 10_000)

    def caption(pixels: torch.Tensor, seeds: np.ndarray) -> Any:
        raise IndexError(f"no room for {len(pixels)}")

    captioner: Any = models.captioners["namer"]
    captioner.caption = caption
    with pytest.raises(UserError, match=r"captions/namer fails in a full batch of 64: IndexError: no room for 32"):
        find_batch(models, config, layers)


def test_a_batch_must_be_a_number_or_auto() -> None:
    for wrong in (0, "large", True, 1.5):
        with pytest.raises(UserError, match=r"workers\.batch: must be a number of images, at least 1, or auto, got"):
            parse_config(config_of("x.tar", "out", workers={"batch": wrong}))
