"""A sample decoded and augmented as the teachers saw it, in notebooks and in torch's DataLoader."""

from __future__ import annotations

import dataclasses
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import distributed
from torch.utils.data import DataLoader

import reinforce
from reinforce.engine.record import RunSummary
from reinforce.errors import UserError
from reinforce.images.backends import load_backend
from reinforce.images.records import replay
from reinforce.training.results import Results
from tests.helpers.data import config_of, picture, write_tar
from tests.helpers.images import encode
from tests.helpers.in_loaders import key_and_crop
from tests.helpers.models import PixelRecorder
from tests.helpers.reinforced import reinforce_here


def rotated_by_exif(seed: int = 1) -> bytes:
    """A PNG of 40 x 30 pixels, partly transparent, that EXIF turns by 90 degrees."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(Image.fromarray(np.random.default_rng(seed).integers(0, 255, (30, 40, 4), np.uint8)), exif=exif)


@pytest.fixture
def data(made: Path) -> reinforce.Dataset:
    """Shards of 9 and 3 samples, with a manifest that a test may change."""
    return reinforce.open(str(made))


@pytest.mark.parametrize(
    ("images", "backend"),
    [("embed", "torchvision-pil-1"), ("reference", "torchvision-pil-1"), ("embed", "fixed-point-1")],
)
def test_augmented_is_the_crop_that_the_teachers_saw(tmp_path: Path, images: str, backend: str) -> None:
    members = [(f"{i}.png", rotated_by_exif(i) if i % 2 else picture(i)) for i in range(5)]
    write_tar(tmp_path / "source" / "0.tar", members)
    config = config_of(f"{tmp_path}/source/*.tar", tmp_path / "out", images=images, captioners={})
    config["augmentations"] |= {"backend": backend}
    config["teachers"] = {"recorder": {"class": "tests.helpers.models:PixelRecorder"}}
    PixelRecorder.seen.clear()
    samples = list(reinforce.open(reinforce_here(config), images_from=f"{tmp_path}/source"))
    crops = [np.asarray(sample.augmented(k)) for sample in samples for k in range(2)]
    assert len(samples) == 5
    assert samples[1].pil().size == (samples[1].width, samples[1].height) == (30, 40), "turned by EXIF"
    np.testing.assert_array_equal(crops, PixelRecorder.seen[-10:])  # before these: a check of the loaded model
    expected = [load_backend(backend)(sample.pil(), record) for sample in samples for record in sample.augmentations]
    np.testing.assert_array_equal(crops, expected)
    assert samples[0].augmented(1, image=samples[0].pil()).tobytes() == expected[1].tobytes()


def test_augmented_takes_a_size_and_the_number_of_a_record(data: reinforce.Dataset) -> None:
    sample = next(iter(data))
    assert sample.augmented(0).size == (24, 24)
    for k, record in enumerate(sample.augmentations):
        assert sample.augmented(k, size=36).tobytes() == replay(sample.pil(), record, 36).tobytes()
    assert sample.augmented(-1).tobytes() == sample.augmented(1).tobytes()
    for k in (2, -3):
        with pytest.raises(IndexError, match=f"record {k} is out of range: sample 00000000 has 2 augmentation records"):
            sample.augmented(k)


@pytest.mark.parametrize(
    ("policy", "supported"),
    [("image", "rgb-1, rgb-1-reduced-N and pillow-rgb-1"), ("augmentation", "torchvision-pil-1 and fixed-point-1")],
)
def test_a_policy_of_another_version_is_an_error(data: reinforce.Dataset, policy: str, supported: str) -> None:
    data.manifest["policies"][policy] = "new-2"
    with pytest.raises(UserError, match=f"{policy} policy new-2, this version supports {supported}"):
        next(iter(data)).augmented(0)


def test_an_image_that_was_changed_is_named_by_dataset_and_key_and_limits_are_the_recorded_ones(
    data: reinforce.Dataset,
) -> None:
    sample = next(iter(data))
    for image in (picture(0, width=2, height=2), b"no image"):
        with pytest.raises(UserError, match=rf"out, key {sample.key}: this is not the image that was augmented"):
            dataclasses.replace(sample, image=image).augmented(0)
    del data._policies
    limits = data.manifest["input"].pop("limits")
    with pytest.raises(UserError, match=r"does not record image policies and limits"):
        next(iter(data))
    data.manifest["input"]["limits"] = {**limits, "pixels": 10}
    with pytest.raises(UserError, match=r"above limits\.pixels of 10"):
        next(iter(data)).pil()


def test_show_finds_the_sample_of_a_key(data: reinforce.Dataset) -> None:
    for sample in (next(iter(data)), list(data)[-1]):
        found = data.show(sample.key)
        assert (found.key, found.caption, found.image) == (sample.key, sample.caption, sample.image)
        assert found.augmentations == sample.augmentations
    assert data[1].show("00100002").caption == "thing 2 of shard 1"
    with pytest.raises(KeyError, match="00100002"):
        data[0].show("00100002")


def test_a_sample_is_shown_with_its_crops_and_similarities_and_markup_stays_text(data: reinforce.Dataset) -> None:
    whole = data.show("00000001")
    sample = dataclasses.replace(whole, caption="<script>alert(1)</script> \x1b[31m" + "word " * 100)
    text, shown = repr(sample), sample._repr_html_()
    assert "<script" not in shown
    assert "&lt;script&gt;alert(1)&lt;/script&gt; \\x1b[31m" in shown
    assert shown.count("<rect ") == shown.count('class="replay"') == len(sample.augmentations)
    assert shown.count("data:image/webp;base64,") == 1 + len(sample.augmentations)
    assert not re.search(r"(src|href)=\"(?!data:)", shown)
    broken = dataclasses.replace(whole, image=b"broken")._repr_html_()
    assert "not the image that was augmented" in broken
    assert "thing 1 of shard 0" in broken
    assert len(text) < 450
    assert f"image=<{len(sample.image):,} bytes>, augmentations=2, captions={{'namer': 2}}" in text
    assert "images={'red': (2, 8), 'blue': (2, 12)}" in text
    assert "'caption': (1, 8), 'namer': (2, 8)" in text


def test_a_dataset_and_the_results_of_runs_are_shown_as_tables(data: reinforce.Dataset, tmp_path: Path) -> None:
    shown = data._repr_html_()
    for text in ("12", "2", "red (dim 8, K 2, logit scale 50)", "embeddings/blue/namer", data.fingerprints["samples"]):
        assert text in shown
    run = RunSummary(
        run="r1", shards=3, samples=44, seconds=2.0, busy_share=0.9, bytes=2048, refused={"no_text": 2},
        message="done", stages={"captions/a": {"inputs": 9.0}},
    )  # fmt: skip
    assert all(text in run._repr_html_() for text in ("r1: done", "2.0 KiB", "2 no_text", "captions/a", "22 samples/s"))
    results = Results("runs/<s0>", "student", 10, 40, 5.0, 2_000_000, 1.25, {"top1": 0.5, "bad": None}, None, 0, 10)
    assert all(
        text in results._repr_html_() for text in ("runs/&lt;s0&gt;", "1.2500", "top1", "not finite", "2.0 million")
    )


def test_samples_come_in_the_order_of_the_dataset(data: reinforce.Dataset) -> None:
    keys = [sample.key for sample in data]
    assert [sample.key for sample in data.to_torch()] == keys
    assert [key for key, _ in data.to_torch(key_and_crop)] == keys
    assert isinstance(data.to_torch(), torch.utils.data.IterableDataset)
    loader = DataLoader(data[:1].to_torch(key_and_crop), batch_size=None, num_workers=2)
    assert len(list(loader)) == 9, "more readers than shards leave some without samples"


def test_ranks_read_every_sample_once_also_in_a_process_that_gets_the_samples_of_its_rank(
    data: reinforce.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    here, sent = [], []
    for rank in range(2):
        monkeypatch.setattr(distributed, "get_rank", lambda rank=rank: rank)
        samples = data.to_torch(key_and_crop)
        here.append({key: crop.tolist() for key, crop in samples})
        sent.append(pickle.dumps(samples))  # as for a worker that is spawned
    assert sorted([*here[0], *here[1]]) == [sample.key for sample in data]
    monkeypatch.setattr(distributed, "is_initialized", lambda: False)
    for pickled, expected in zip(sent, here, strict=True):
        batches = list(DataLoader(pickle.loads(pickled), batch_size=2))
        assert {key: crop.tolist() for keys, made in batches for key, crop in zip(keys, made, strict=True)} == expected


def test_forked_workers_read_from_an_object_store(data: reinforce.Dataset, s3: Any) -> None:
    s3.put(data.store.root, "bucket/forked", recursive=True)
    stored = reinforce.open("s3://bucket/forked", teachers=["red"], captioners=[])
    here = [sample.key for sample in stored]
    loader = DataLoader(
        stored.to_torch(key_and_crop), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=600
    )
    assert sorted(key for key, _ in loader) == here
