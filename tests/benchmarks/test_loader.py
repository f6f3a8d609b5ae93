"""The benchmarks of loading, augmenting, sources, steps and captions, small, and stored results and their pages."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import augment, captions, sources, step, transfer, view_students
from benchmarks.augment import Variant, compare, cosines, report, variants
from benchmarks.loader import photo
from reinforce.images.policy import decode
from reinforce.source.config import Input, Limits
from reinforce.source.formats.base import read_samples as read_source


def test_variants_have_equal_pixels_and_ratios_to_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_stored_targets_add_operations_to_a_plain_step(tmp_path: Path) -> None:
    result = step.Bench(tmp_path, "cpu").measure(step.Case("tiny", batch=4, rounds=1, online=0))
    assert set(result["ratio"]) == {"plain", "stored"}
    assert result["ratio"]["plain"] == result["limit"]["plain"] == 1
    assert result["operations"]["stored"] > result["operations"]["plain"]
    assert result[f"limit of stored at {step.LARGE}"] > result["limit"]["stored"] > 1


def test_forward_passes_of_a_module_are_added_and_operations_counted() -> None:
    timer, module = captions.PartTimer(), torch.nn.Linear(4, 4)
    hooks = timer.watch(module, "linear")
    module(torch.rand(2, 4))
    once = timer.seconds["linear"]
    module(torch.rand(2, 4))
    assert timer.seconds["linear"] > once > 0
    for hook in hooks:
        hook.remove()
    twice = timer.seconds["linear"]
    module(torch.rand(2, 4))
    assert timer.seconds["linear"] == twice
    x, weight = torch.rand(3, 8), torch.rand(5, 8)
    assert captions.operations(lambda: x @ weight.T) == 2 * 3 * 8 * 5


def test_the_page_of_transfer_has_the_stored_numbers_and_the_mean_range_and_seeds_of_others() -> None:
    names = (*transfer.MEASURES, transfer.SECONDS)
    rows = {"plain": [dict.fromkeys(names, 0.25), dict.fromkeys(names, 0.75)]}
    measure = transfer.summarise(rows)["plain"]["own_style"]
    assert measure == {"mean": pytest.approx(0.5), "min": 0.25, "max": 0.75, "seeds": [0.25, 0.75]}
    page = transfer.PAGE.read_text(encoding="utf-8")
    assert page == transfer.render_page(page, json.loads(transfer.RESULTS.read_text()))


def test_the_page_has_the_stored_results_of_students_on_views() -> None:
    stored = json.loads(view_students.RESULTS.read_text())
    page = view_students.PAGE.read_text(encoding="utf-8")
    assert view_students.render_page(page, stored) == page, "run `python -m benchmarks.view_students`"
    whole, right = ({"mean": mean, "min": mean, "max": mean} for mean in (0.1, 0.3))
    students = {"whole": {"a": whole}, "view": {"a": {"mean": 0.25}}, "right": {"a": right}}
    assert view_students.recovered(students, "a") == "75%"
    students["right"]["a"]["min"] = 0.1
    assert view_students.recovered(students, "a") == "-", "no loss in each seed"
