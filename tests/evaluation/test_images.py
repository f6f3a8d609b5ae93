"""Batches of decoded images, and their cache."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image

from reinforce.config import Limits
from reinforce.evaluation import images
from reinforce.evaluation.images import CacheBudget, ImageBatches
from reinforce.evaluation.reading import Example
from teachers.preprocessing.pixels import to_pixels
from teachers.protocols import ImageSpec
from tests.helpers.evaluation import (
    CPU,
    ColourOracle,
    load_teacher,
    make_evaluator,
    make_photos,
    write_colour_folder,
    write_colour_shard,
    write_models,
)

SPEC = ImageSpec(8, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_colour_folder(tmp_path_factory.mktemp("colours"))


@pytest.mark.parametrize("kind", ["shortest", "squash"])
def test_pixels_equal_those_of_open_clips_validation_transform(tmp_path: Path, kind: str) -> None:
    name, photos = write_models(tmp_path)[kind], make_photos()
    _, _, transform = open_clip.create_model_and_transforms(name)
    spec = load_teacher(name).image
    assert spec is not None
    examples = [Example(str(i), lambda data=data: data, i) for i, data in enumerate(photos)]
    batches = ImageBatches(lambda: iter(examples), len(photos), Limits(), CacheBudget(0)).batches(spec, 4, 2)
    pixels = torch.cat([to_pixels(CPU.put(batch.pixels), spec) for batch in batches])
    assert torch.equal(pixels, torch.stack([transform(Image.open(io.BytesIO(data))) for data in photos]))


class DecodeCounter:
    """Counts decoded images."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        decode = images.decode

        def counted(data: bytes, limits: Limits, **options: Any) -> Image.Image:
            self.count += 1
            return decode(data, limits, **options)

        monkeypatch.setattr(images, "decode", counted)

    def during(self, act: Callable[[], Any]) -> int:
        before = self.count
        act()
        return self.count - before


def test_sets_that_fit_are_decoded_once(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decodes = DecodeCounter(monkeypatch)
    url = write_colour_shard(tmp_path / "a.tar", each=3)
    sets = {"zero_shot": {"a": {"images": folder}, "b": {"images": url, "label": "json:class"}}}
    small = 12 * 8 * 8 * 3
    expected: list[dict[str, float]] = []
    for memory, decoded in ((small + 18 * 8 * 8 * 3, 0), (small, 18), (small - 1, 30), (0, 30)):
        evaluator = make_evaluator(**sets, memory=memory)
        expected.append(evaluator.evaluate(ColourOracle(), CPU).metrics)
        again = functools.partial(evaluator.evaluate, ColourOracle(), CPU)
        assert decodes.during(lambda again=again: expected.append(again().metrics)) == decoded
    assert all(metrics == expected[0] for metrics in expected)


def test_another_geometry_replaces_the_cache_and_an_interrupted_pass_is_not_cached(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Larger(ColourOracle):
        image = ImageSpec(12, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

    class Normalised(ColourOracle):
        image = ImageSpec(8, (0.1, 0.1, 0.1), (1.0, 1.0, 1.0))

    class Interrupted(ColourOracle):
        def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
            raise KeyboardInterrupt

    decodes = DecodeCounter(monkeypatch)
    evaluator = make_evaluator(zero_shot={"a": {"images": folder}}, memory=12 * 12 * 12 * 3)
    with pytest.raises(KeyboardInterrupt):
        evaluator.evaluate(Interrupted(), CPU)
    for model, count in ((ColourOracle(), 12), (Normalised(), 0), (Larger(), 12), (Larger(), 0), (ColourOracle(), 12)):
        assert decodes.during(lambda model=model: evaluator.evaluate(model, CPU)) == count
    assert evaluator.evaluate(ColourOracle(), CPU).metrics["zero_shot/a/top1"] == 1
