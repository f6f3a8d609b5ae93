"""Augmentation records, their operations and the backends that replay them, compared with torchvision and Pillow."""

from __future__ import annotations

import io
import math
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import InterpolationMode, RandAugment, RandomResizedCrop
from torchvision.transforms import functional as F
from torchvision.transforms.autoaugment import _apply_op

from reinforce.config import Augmentations, parse_config
from reinforce.config import RandAugment as RandAugmentPolicy
from reinforce.errors import UserError
from reinforce.images import records as operations
from reinforce.images.backends import BACKENDS, load_backend, sample_augmentation
from reinforce.images.records import (
    AUGMENTATION_BACKEND,
    OPS,
    Augmentation,
    Crop,
    Op,
    from_records,
    replay,
    to_records,
)
from schemas import AUGMENTATION
from tests.helpers.images import natural, noise

POLICY = Augmentations()
# The record of this seed, key and index. If it changes, no dataset can be reproduced any more.
GOLDEN_ARGUMENTS = (17, "00012/0003é", 1, 640, 427)
GOLDEN = Augmentation(Crop(138, 288, 289, 318), 224, (Op("Color", -0.27000001072883606), Op("Identity", 0.0)))


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.mode == other.mode and np.array_equal(np.asarray(one), np.asarray(other))


def through_parquet(augmentations: list[Augmentation]) -> list[Augmentation]:
    column = pa.array([to_records(augmentations)], pa.list_(AUGMENTATION))
    buffer = io.BytesIO()
    pq.write_table(pa.table({"augmentations": column}), buffer)
    (records,) = pq.read_table(buffer)["augmentations"].to_pylist()
    return from_records(records)


@st.composite
def policies(draw) -> Augmentations:
    scale = sorted(draw(st.tuples(st.floats(0.01, 1), st.floats(0.01, 1))))
    ratio = sorted(draw(st.tuples(st.floats(0.05, 20), st.floats(0.05, 20))))
    rand_augment = RandAugmentPolicy(
        ops=draw(st.integers(0, 4)),
        magnitude=draw(st.integers(0, 30)),
    )
    return Augmentations(size=draw(st.integers(8, 64)), scale=scale, ratio=ratio, rand_augment=rand_augment)


SIDES = st.one_of(st.integers(1, 8), st.integers(1, 200))
SIZES = st.one_of(st.tuples(SIDES, SIDES), st.sampled_from([(1, 1), (1, 5000), (5000, 1), (2, 3), (97, 13)]))


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(policies(), st.integers(0, 2**63), st.text(max_size=8), SIZES)
def test_a_record_is_of_a_crop_in_the_image_and_replays_to_the_same_pixels_from_parquet(policy, seed, key, size):
    image = natural(*size)
    sampled = [sample_augmentation(policy, seed, key, index, *size) for index in range(3)]
    stored = through_parquet(sampled)
    assert stored == sampled
    for one, other in zip(sampled, stored, strict=True):
        assert same(replay(image, one), replay(image, other))
        assert replay(image, other).size == (policy.size, policy.size)


def test_the_golden_record_is_sampled_in_any_process_and_depends_on_seed_key_and_index():
    code = (
        "from reinforce.images.backends import sample_augmentation\n"
        "from reinforce.config import Augmentations\n"
        f"import sys; print(sample_augmentation(Augmentations(), *{GOLDEN_ARGUMENTS!a}), "
        "'torch' in sys.modules, 'torchvision' in sys.modules)"
    )
    other = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert sample_augmentation(POLICY, *GOLDEN_ARGUMENTS) == GOLDEN
    assert other.strip() == f"{GOLDEN} False False"
    for change in ((18, "00012/0003é", 1), (17, "00012/0003e", 1), (17, "00012/0003é", 2)):
        assert sample_augmentation(POLICY, *change, 640, 427).crop != GOLDEN.crop


def torchvision_magnitudes(size: int) -> dict[str, tuple[list[float], bool]]:
    space = RandAugment()._augmentation_space(31, (size, size))
    return {
        name: ([float(value) for value in values] if values.ndim else [0.0] * 31, signed)
        for name, (values, signed) in space.items()
    }


#: Bounds of the magnitudes that are tried.
BOUNDS = {
    **dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), (-1.5, 1.5)),
    "Posterize": (1, 8),
    "Solarize": (0, 255),
}


@pytest.mark.parametrize("name", OPS)
@settings(max_examples=60)
@given(st.integers(0, 2**32), st.integers(1, 48), st.integers(1, 48), st.booleans(), st.floats(0, 1, width=32))
def test_every_operation_equals_torchvisions_at_any_magnitude(name, seed, width, height, saturated, share):
    image, (low, high) = noise(width, height, seed=seed, saturated=saturated), BOUNDS.get(name, (-60, 60))
    magnitude = float(np.float32(low + share * (high - low)))
    theirs = _apply_op(image, name, magnitude, InterpolationMode.NEAREST, None)
    assert same(operations.TORCHVISION[name](image, magnitude), theirs)


def test_magnitudes_equal_torchvisions_table():
    for size in (8, 160, 224, 336, 4096):
        theirs = torchvision_magnitudes(size)
        for bin_ in range(31):
            policy = Augmentations(size=size, rand_augment=RandAugmentPolicy(ops=60, magnitude=bin_))
            for op in sample_augmentation(policy, bin_, "key", 0, 64, 64).ops:
                table, signed = theirs[op.name]
                magnitude = abs(op.magnitude) if signed else op.magnitude
                assert math.isclose(magnitude, table[bin_], rel_tol=2e-7)
                assert int(magnitude) == int(table[bin_])
                assert op.magnitude == np.float32(op.magnitude)


def kolmogorov_smirnov(one: list[float], other: list[float]) -> float:
    """Kolmogorov-Smirnov distance between two samples."""
    points = np.sort(np.concatenate([one, other]))
    shares = [np.searchsorted(np.sort(values), points, side="right") / len(values) for values in (one, other)]
    return float(np.abs(shares[0] - shares[1]).max())


@pytest.mark.parametrize(("width", "height"), [(640, 427), (100, 320)])
def test_crops_are_distributed_as_torchvisions(width, height):
    count = 4000
    torch.manual_seed(0)
    image = Image.new("RGB", (width, height))
    theirs = [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(count)]
    crops = [sample_augmentation(POLICY, 0, str(i), 0, width, height).crop for i in range(count)]
    ours = [(crop.top, crop.left, crop.height, crop.width) for crop in crops]
    measures = {
        "area": lambda top, left, h, w: h * w,
        "ratio": lambda top, left, h, w: w / h,
        "row": lambda top, left, h, w: top,
        "column": lambda top, left, h, w: left,
    }
    for name, measure in measures.items():
        distance = kolmogorov_smirnov([measure(*box) for box in ours], [measure(*box) for box in theirs])
        assert distance < 1.95 * math.sqrt(2 / count), name  # p = 0.001


def test_translations_shift_the_image_by_the_same_fraction_at_any_size_and_other_operations_keep_their_magnitude():
    pixels = np.zeros((448, 448, 3), np.uint8)
    pixels[192:256, 192:256] = 255
    image, crop = Image.fromarray(pixels), Crop(0, 0, 448, 448)
    moved, still = (Augmentation(crop, 224, ops) for ops in ((Op("TranslateX", 28), Op("TranslateY", -56)), None))
    for size in (112, 224, 336, 448):
        of_moved, of_still = (np.argwhere(np.asarray(replay(image, one, size))[..., 0] > 127) for one in (moved, still))
        assert (of_moved.mean(axis=0) - of_still.mean(axis=0)).tolist() == [-size * 56 / 224, size * 28 / 224]

    image = natural(90, 70)
    ops = tuple(
        Op(name, table[9]) for name, (table, _) in torchvision_magnitudes(64).items() if "Translate" not in name
    )
    theirs = F.resized_crop(image, 2, 3, 60, 80, [100, 100], InterpolationMode.BICUBIC)
    for op in ops:
        theirs = _apply_op(theirs, op.name, op.magnitude, InterpolationMode.NEAREST, None)
    assert same(replay(image, Augmentation(Crop(2, 3, 60, 80), 64, ops), 100), theirs)


@pytest.mark.parametrize(
    ("width", "height", "tall"), [(40, 70, True), (60, 70, False), (90, 70, False), (90, 160, True)]
)
def test_crops_are_resized_in_the_same_order_by_each_version_of_pillow(width, height, tall):
    image, size = noise(width, height), 48
    between = [(size, height), (width, size)]
    orders = [
        image.resize(half, Image.Resampling.BICUBIC).resize((size, size), Image.Resampling.BICUBIC) for half in between
    ]
    ours = replay(image, Augmentation(Crop(0, 0, height, width), size, None))
    assert [same(ours, theirs) for theirs in orders] == [not tall, tall]


@pytest.mark.parametrize(
    ("image", "augmentation"),
    [
        (Image.new("RGB", (30, 20)), Augmentation(Crop(0, 0, 21, 5), 8, None)),
        (Image.new("RGB", (30, 20)), Augmentation(Crop(0, -1, 5, 5), 8, None)),
        (Image.new("L", (30, 20)), Augmentation(Crop(0, 0, 5, 5), 8, None)),
        (Image.new("RGB", (30, 20)), Augmentation(Crop(0, 0, 5, 5), 8, (Op("Invert", 0.0),))),
    ],
)
def test_a_record_that_does_not_fit_the_image_is_an_error(image, augmentation):
    for backend in BACKENDS:
        with pytest.raises(ValueError, match=r"another image|unknown operation"):
            load_backend(backend)(image, augmentation)


def test_every_backend_and_no_other_is_accepted_and_published_augmentations_keep_theirs() -> None:
    assert Augmentations().backend == AUGMENTATION_BACKEND
    assert [Augmentations(backend=name).backend for name in BACKENDS] == list(BACKENDS)
    config = {"source": "x.tar", "output": "out"}
    with pytest.raises(UserError, match=r"augmentations\.backend.*torchvision-pil-1"):
        parse_config({**config, "augmentations": {"backend": "torchvision-pil-0"}})
    with pytest.raises(UserError, match=r"backend 'other-1'; this version has torchvision-pil-1, fixed-point-1\."):
        load_backend("other-1")
    with pytest.raises(UserError, match=r"augmentations\.backend: remove it"):
        parse_config({**config, "reinforcements": "y.tar", "augmentations": {"count": 2, "backend": "fixed-point-1"}})
