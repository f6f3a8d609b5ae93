"""The image of a sample, decoded and augmented as the teachers saw it."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import reinforce
from reinforce.dataset.augment.backends import load_backend
from reinforce.dataset.augment.records import replay
from reinforce.errors import UserError
from tests.helpers.data import config_of, picture, write_tar
from tests.helpers.pixels import PixelRecorder, torchvision_replay
from tests.helpers.published import COUNT, SIZE, published_members, published_sample, source_members, write_published
from tests.helpers.published import config_of as published_config
from tests.helpers.reinforced import reinforce_here


def rotated_by_exif(seed: int = 1) -> bytes:
    """A PNG of 40 x 30 pixels, partly transparent, that EXIF turns by 90 degrees."""
    out = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.random.default_rng(seed).integers(0, 255, (30, 40, 4), np.uint8)
    Image.fromarray(pixels, "RGBA").save(out, "PNG", exif=exif)
    return out.getvalue()


@pytest.fixture
def dataset(shards: Callable[..., str], tmp_path: Path) -> reinforce.Dataset:
    return reinforce.open(reinforce_here(config_of(shards(3), tmp_path / "out")))


@pytest.mark.parametrize(
    ("images", "backend"),
    [("embed", "torchvision-pil-1"), ("reference", "torchvision-pil-1"), ("embed", "fixed-point-1")],
)
def test_augmented_is_the_crop_that_the_teachers_saw(tmp_path: Path, images: str, backend: str) -> None:
    members = [(f"{i}.png", rotated_by_exif(i) if i % 2 else picture(i)) for i in range(5)]
    write_tar(tmp_path / "source" / "0.tar", members)
    config = config_of(f"{tmp_path}/source/*.tar", tmp_path / "out", images=images, captioners={})
    config["augmentations"] |= {"backend": backend}
    config["teachers"] = {"recorder": {"class": "tests.helpers.pixels:PixelRecorder"}}
    PixelRecorder.seen.clear()
    samples = list(reinforce.open(reinforce_here(config), images_from=f"{tmp_path}/source"))
    crops = [np.asarray(sample.augmented(k)) for sample in samples for k in range(2)]
    assert len(samples) == 5
    np.testing.assert_array_equal(crops, PixelRecorder.seen[-10:])  # before these: a check of the loaded model
    expected = [load_backend(backend)(sample.pil(), record) for sample in samples for record in sample.augmentations]
    np.testing.assert_array_equal(crops, expected)
    assert samples[0].augmented(1, image=samples[0].pil()).tobytes() == expected[1].tobytes()


def test_published_records_are_replayed_as_torchvision_does(tmp_path: Path) -> None:
    one, data = published_sample(5), rotated_by_exif()
    name, _ = source_members(one)[0]
    write_published(tmp_path, [[(name, data), *source_members(one)[1:]]], [published_members(one)])
    [sample] = reinforce.open(reinforce_here(published_config(tmp_path)))
    assert sample.policies.image == "pillow-rgb-1"
    assert sample.pil().tobytes() == Image.open(io.BytesIO(data)).convert("RGB").tobytes()
    for k in range(COUNT):
        np.testing.assert_array_equal(sample.augmented(k), torchvision_replay(data, one.records[k], SIZE))


def test_the_default_policy_applies_exif_and_composites_over_white(tmp_path: Path) -> None:
    write_tar(tmp_path / "source" / "0.tar", [("a.png", rotated_by_exif())])
    config = config_of(f"{tmp_path}/source/*.tar", tmp_path / "out", captioners={}, teachers={})
    [sample] = reinforce.open(reinforce_here(config))
    rgba = Image.open(io.BytesIO(sample.image)).transpose(Image.Transpose.ROTATE_270)
    white = Image.new("RGB", rgba.size, "white")
    white.paste(rgba, mask=rgba.getchannel("A"))
    assert sample.pil().size == (sample.width, sample.height) == (30, 40)
    assert sample.pil().tobytes() == white.tobytes()


def test_augmented_at_another_size_scales_translations(dataset: reinforce.Dataset) -> None:
    sample = next(iter(dataset))
    assert sample.augmented(0).size == (24, 24)
    for k, record in enumerate(sample.augmentations):
        assert sample.augmented(k, size=36).tobytes() == replay(sample.pil(), record, 36).tobytes()
    assert sample.augmented(-1).tobytes() == sample.augmented(1).tobytes()


@pytest.mark.parametrize("k", [2, -3])
def test_a_record_number_out_of_range_is_an_index_error(dataset: reinforce.Dataset, k: int) -> None:
    with pytest.raises(IndexError, match=f"record {k} is out of range: sample 00000000 has 2 augmentation records"):
        next(iter(dataset)).augmented(k)


def test_an_image_that_was_changed_is_named_by_dataset_and_key(dataset: reinforce.Dataset) -> None:
    sample = next(iter(dataset))
    smaller = dataclasses.replace(sample, image=picture(0, width=2, height=2))
    broken = dataclasses.replace(sample, image=b"no image")
    for changed in (smaller, broken):
        with pytest.raises(UserError, match=rf"out, key {sample.key}: this is not the image that was augmented"):
            changed.augmented(0)


@pytest.mark.parametrize(
    ("policy", "supported"),
    [("image", "rgb-1, rgb-1-reduced-N and pillow-rgb-1"), ("augmentation", "torchvision-pil-1 and fixed-point-1")],
)
def test_a_policy_of_another_version_is_an_error(dataset: reinforce.Dataset, policy: str, supported: str) -> None:
    dataset.manifest["policies"][policy] = "new-2"
    sample = next(iter(dataset))
    with pytest.raises(UserError, match=f"{policy} policy new-2, this version supports {supported}"):
        sample.augmented(0)


def test_a_manifest_without_limits_is_an_error(dataset: reinforce.Dataset) -> None:
    del dataset.manifest["input"]["limits"]
    with pytest.raises(UserError, match=r"does not record image policies and limits"):
        next(iter(dataset))


def test_limits_are_the_recorded_ones(dataset: reinforce.Dataset) -> None:
    dataset.manifest["input"]["limits"]["pixels"] = 10
    with pytest.raises(UserError, match=r"above limits\.pixels of 10"):
        next(iter(dataset)).pil()


def test_repr_shows_shapes_instead_of_content(dataset: reinforce.Dataset) -> None:
    sample = dataclasses.replace(next(iter(dataset)), caption="word " * 100)
    text = repr(sample)
    assert len(text) < 450
    assert f"image=<{len(sample.image):,} bytes>, augmentations=2, captions={{'namer': 2}}" in text
    assert "images={'red': (2, 8), 'blue': (2, 12)}" in text
    assert "'caption': (1, 8), 'namer': (2, 8)" in text
