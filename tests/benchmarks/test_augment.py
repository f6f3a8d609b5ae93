"""Measurements of the augmentation benchmark, on a few small images."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import augment
from benchmarks.augment import Variant, compare, cosines, report, variants
from benchmarks.loader import photo
from reinforce.config import Limits
from reinforce.images.policy import decode


def test_photographs_have_the_side_that_is_asked_for() -> None:
    assert max(decode(photo(0, 300), Limits()).size) == 300
    assert photo(0, 300) == photo(0, 300) != photo(1, 300)


def test_the_variants_of_the_new_backend_have_the_same_pixels() -> None:
    image = decode(photo(1, 300), Limits())
    [records] = augment.records_of([image], 4)
    pixels = {name: [variant.replay(image, record) for record in records] for name, variant in variants().items()}
    np.testing.assert_array_equal(pixels["fixed-point-1"], pixels["fixed-point-1 (torch)"])
    assert not np.array_equal(pixels["fixed-point-1"], pixels["torchvision-pil-1"])


def test_results_have_ratios_to_the_default_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augment, "SIZE", 64)
    photos = [photo(seed, 200) for seed in range(2)]
    of = variants()
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
