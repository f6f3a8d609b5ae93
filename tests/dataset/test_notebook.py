"""Datasets, samples and results in a notebook."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

import reinforce
from reinforce.engine.record.summary import RunSummary
from reinforce.training.record.results import Results
from tests.helpers.reinforced import small_dataset


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> reinforce.Dataset:
    return reinforce.open(small_dataset(tmp_path_factory.mktemp("data")))


def test_show_finds_the_sample_of_a_key(data: reinforce.Dataset) -> None:
    for sample in (next(iter(data)), list(data)[-1]):
        found = data.show(sample.key)
        assert (found.key, found.caption, found.image) == (sample.key, sample.caption, sample.image)
        assert found.augmentations == sample.augmentations
    assert data[1].show("00100003").caption == "thing 3 of shard 1"
    with pytest.raises(KeyError, match="00100003"):
        data[0].show("00100003")


def test_a_sample_is_shown_with_its_crops_and_similarities_and_markup_stays_text(data: reinforce.Dataset) -> None:
    sample = dataclasses.replace(data.show("00000001"), caption="<script>alert(1)</script> \x1b[31m")
    shown = sample._repr_html_()
    assert "<script" not in shown
    assert "&lt;script&gt;alert(1)&lt;/script&gt; \\x1b[31m" in shown
    assert shown.count("<rect ") == shown.count('class="replay"') == len(sample.augmentations)
    assert shown.count("data:image/webp;base64,") == 1 + len(sample.augmentations)
    assert not re.search(r"(src|href)=\"(?!data:)", shown)


def test_a_sample_whose_image_is_broken_is_shown_with_the_reason(data: reinforce.Dataset) -> None:
    shown = dataclasses.replace(data.show("00000001"), image=b"broken")._repr_html_()
    assert "not the image that was augmented" in shown
    assert "thing 1 of shard 0" in shown


def test_a_dataset_and_the_results_of_runs_are_shown_as_tables(data: reinforce.Dataset, tmp_path: Path) -> None:
    shown = data._repr_html_()
    for text in ("44", "3", "red (dim 8, K 2, logit scale 50)", "embeddings/blue/namer", data.fingerprints["samples"]):
        assert text in shown
    run = RunSummary(
        run="r1", shards=3, samples=44, seconds=2.0, busy_share=0.9, bytes=2048, refused={"no_text": 2},
        message="done", stages={"captions/a": {"inputs": 9.0}},
    )  # fmt: skip
    assert all(text in run._repr_html_() for text in ("r1: done", "2.0 KiB", "2 no_text", "captions/a", "22 samples/s"))
    results = Results("runs/<s0>", "student", 10, 40, 5.0, 2_000_000, 1.25, {"top1": 0.5, "bad": None}, None, 0)
    assert all(
        text in results._repr_html_() for text in ("runs/&lt;s0&gt;", "1.2500", "top1", "not finite", "2.0 million")
    )
