"""Inputs and measurements of the loader benchmark."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks import loader
from tests.helpers.demo import read_samples


def test_photos_have_a_common_size_and_about_a_bit_per_pixel() -> None:
    data = loader.photo(3)
    assert data == loader.photo(3)
    with Image.open(io.BytesIO(data)) as image:
        width, height = image.size
    assert 500 <= max(width, height) <= 800
    assert 0.6 < 8 * len(data) / (width * height) < 2.4


def test_source_has_every_image_once(tmp_path: Path) -> None:
    url, means = loader.write_source(tmp_path, 6, processes=1, distinct=2)
    assert url == f"{tmp_path}/{{00000..00003}}.tar"
    shards = [read_samples(path) for path in sorted(tmp_path.glob("*.tar"))]
    assert sorted(key for shard in shards for key in shard) == [f"{i:08d}" for i in range(6)]
    assert shards[1]["00000005"]["txt"] == loader.sentence(5).encode()
    assert means["bytes"] == np.mean([len(loader.photo(seed)) for seed in range(2)])


def test_variants_are_warmed_up_before_each_measurement() -> None:
    requested: list[int] = []
    figures = loader.compare({"only": requested.append}, rounds=2)
    assert requested == [loader.WARMUP * loader.BATCH, loader.STEPS * loader.BATCH] * 2
    assert len(figures["only"]["images/s"]) == len(figures["only"]["cpu ms"]) == 2


def test_random_models_return_unit_vectors_and_captions() -> None:
    teacher = loader.RandomTeacher(torch.device("cpu"), seed=0)
    vectors = teacher.encode_texts(["a", "b"])
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(2))
    captioner = loader.RandomCaptioner(torch.device("cpu"), captions=2)
    captions = captioner.caption(torch.zeros(1, 3, 8, 8), np.array([[1, 2]]))
    assert captions == [[loader.sentence(1), loader.sentence(2)]]
