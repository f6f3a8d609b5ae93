"""Inputs and measurements of the benchmarks of loading, augmenting and sources, on a few small images."""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import augment, loader, sources
from benchmarks.augment import Variant, compare, cosines, report, variants
from benchmarks.loader import photo
from reinforce.config import Input, Limits
from reinforce.images.policy import decode
from reinforce.source.reading import read_samples as read_source
from tests.helpers.demo import read_samples


def test_source_has_every_photo_once_of_a_common_size_and_about_a_bit_per_pixel(tmp_path: Path) -> None:
    data = loader.photo(3)
    assert data == loader.photo(3)
    with Image.open(io.BytesIO(data)) as image:
        width, height = image.size
    assert 500 <= max(width, height) <= 800
    assert 0.6 < 8 * len(data) / (width * height) < 2.4
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


def test_variants_of_a_backend_have_equal_pixels_and_results_ratios_to_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(augment, "SIZE", 64)
    photos = [photo(seed, 200) for seed in range(2)]
    of = variants()
    [records] = augment.records_of([image := decode(photo(1, 300), Limits())], 4)
    pixels = {name: [variant.replay(image, record) for record in records] for name, variant in of.items()}
    np.testing.assert_array_equal(pixels["fixed-point-1"], pixels["fixed-point-1 (torch)"])
    assert not np.array_equal(pixels["fixed-point-1"], pixels["torchvision-pil-1"])
    chosen = {name: of[name] for name in ("torchvision-pil-1", "fixed-point-1")}
    chosen["reduced"] = Variant(of["fixed-point-1"].replay, "rgb-1-reduced-60")
    tables = {"web images": compare(photos, chosen, 2, rounds=2)}
    similar = {"web images": cosines(photos, chosen, 2)}
    assert all(values["1st percentile"] > 0.8 for values in similar["web images"].values())
    assert similar["web images"]["torchvision-pil-1"]["mean"] == pytest.approx(1)
    options = argparse.Namespace(rounds=2, results=tmp_path / "augment.json")
    report(tables, similar, {"web images": photos}, options)
    written = json.loads(options.results.read_text())
    assert written["ratios"]["web images"]["torchvision-pil-1"] == 1, "the first variant"
    assert written["cpu ms per sample"]["web images"]["reduced"].keys() == {"decode", "crops", "ops", "all"}


def test_every_format_has_the_same_samples(tmp_path: Path) -> None:
    samples = sources.make_samples(3, 60)
    for file, write in sources.WRITERS.values():
        write(tmp_path / file, samples)
        spec, found = Input(), read_source(sources._shard(tmp_path / file), Input())
        assert [(one.key, one.image, one.caption(spec.captions, spec.limits)) for one in found] == samples


def test_medians_and_ratios_are_those_of_the_rounds() -> None:
    figures = {"tar": {"read": [1.0, 2.0, 9.0], "run": [4.0, 5.0, 5.0]}, "jsonl": {"read": [3.0], "run": [6.0]}}
    found = sources.summarize(figures)
    assert found["tar"] == {"read": 2.0, "run": 5.0, "run / tar": 1.0}
    assert found["jsonl"]["run / tar"] == 1.2
