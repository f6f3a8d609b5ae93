"""Augmentation backends: fixed-point-1 has the same pixels everywhere, device-1 those of torchvision-pil-1.

One more operation belongs to a new backend.
"""

from __future__ import annotations

import hashlib
import inspect
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops

from reinforce.config import Augmentations, RandAugment
from reinforce.errors import UserError
from reinforce.images import backends as fixed_point
from reinforce.images.backends import (
    BACKENDS,
    RESIZERS,
    Backend,
    Replayer,
    known_operations,
    load_backend,
    load_resizer,
    sample_augmentation,
)
from reinforce.images.device import augment
from reinforce.images.device_records import CELL, CellRecord, fill_cell
from reinforce.images.records import (
    AUGMENTATION_BACKEND,
    OPS,
    RAND_AUGMENT,
    Augmentation,
    Crop,
    Op,
    OperationTable,
    Resize,
    replay,
    torchvision_magnitudes,
)
from tests.helpers.images import natural, noise

BACKEND = "fixed-point-1"
# The pixels of 300 records. If they change, students no longer see what the teachers saw.
GOLDEN = "b1ad86cc409b42a1dfe2d5374f425d418f13205ef6da7a99bdd471f2048b21df"
SIDES = st.one_of(st.integers(1, 8), st.integers(1, 300))


def replayed_digest(replay: Replayer | None = None) -> str:
    """SHA-256 of the replayed pixels of records for images of many sizes."""
    digest, replay = hashlib.sha256(), replay or load_backend(BACKEND)
    for number, (image, record) in enumerate(records()):
        digest.update(replay(image, record, None if number % 3 else 40).tobytes())
    return digest.hexdigest()


def records() -> Iterator[tuple[Image.Image, Augmentation]]:
    """Images whose pixels no library draws, and their records."""
    for number in range(300):
        sides = 8 if number % 7 == 0 else 200
        width, height = 1 + number * 7919 % sides, 1 + number * 104729 % sides
        values = np.arange(number, number + 3 * width * height, dtype=np.uint32) * np.uint32(2246822519)
        pixels = (values >> np.uint32(24)).astype(np.uint8).reshape(height, width, 3)
        image = Image.fromarray(pixels if number % 5 else pixels // 128 * 255)
        policy = Augmentations(size=8 + number % 60, rand_augment=RandAugment(ops=3, magnitude=number % 31))
        yield image, sample_augmentation(policy, 0, "key", number, width, height)


def run(code: str, **env: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **env}).stdout.strip()


def test_the_golden_pixels_in_threads_and_processes() -> None:
    with ThreadPoolExecutor(2) as threads:
        assert {future.result() for future in [threads.submit(replayed_digest) for _ in range(2)]} == {GOLDEN}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as processes:
        assert processes.submit(replayed_digest).result() == GOLDEN


@pytest.mark.parametrize(
    ("capability", "threads"),
    [("default", 3), *(pytest.param(name, n, marks=pytest.mark.slow) for n, name in enumerate(("avx2", "avx512"), 1))],
)  # the default is the best of the processor
def test_torch_gives_the_golden_pixels_on_every_processor_and_with_any_threads(capability: str, threads: int) -> None:
    """In a process of its own: threads of torch that the process of the tests started would not survive its forks."""
    flag = {"default": "", "avx2": "avx2", "avx512": "avx512f"}[capability]
    if flag not in Path("/proc/cpuinfo").read_text():
        pytest.skip(f"this processor has no {capability}")
    code = (
        "import torch; from tests.images import test_backends as t; "
        f"torch.set_num_threads({threads}); t.fixed_point.RESIZERS = {{'torch': t.RESIZERS['torch']}}; "
        "print(t.replayed_digest())"
    )
    assert run(code, ATEN_CPU_CAPABILITY=capability) == GOLDEN


@pytest.mark.parametrize("extensions", ["none", "sse4_1", "avx2", "neon"])
def test_cykooz_resizer_gives_the_golden_pixels_with_any_instructions(
    extensions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cykooz = pytest.importorskip("cykooz_resizer")
    made = []

    class Restricted(cykooz.Resizer):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.cpu_extensions = getattr(cykooz.CpuExtensions, extensions)
            made.append(self)

    try:
        Restricted()
    except BaseException as error:
        pytest.skip(f"this processor has no {extensions}: {error}")
    monkeypatch.setattr(cykooz, "Resizer", Restricted)
    monkeypatch.setattr(fixed_point, "RESIZERS", {"cykooz-resizer": RESIZERS["cykooz-resizer"]})
    assert replayed_digest(load_backend.__wrapped__(BACKEND)) == GOLDEN
    assert len(made) > 300


@settings(max_examples=100)
@given(SIDES, SIDES, st.integers(8, 260), st.integers(0, 2**32), st.booleans())
def test_both_packages_resize_to_the_same_pixels(width: int, height: int, size: int, seed: int, extreme: bool) -> None:
    pytest.importorskip("cykooz_resizer")
    image = noise(width, height, seed=seed, saturated=extreme)
    one, other = (load()(image, size) for load in RESIZERS.values())
    assert one.size == (size, size)
    assert one.tobytes() == other.tobytes()


def test_torch_is_imported_only_where_cykooz_resizer_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cykooz_resizer")
    code = (
        "import sys; from reinforce.images.backends import load_backend; "
        "print({name: (load_backend(name) and None, 'torch' in sys.modules, 'cykooz_resizer' in sys.modules)[1:] "
        "for name in ('torchvision-pil-1', 'fixed-point-1')})"
    )
    assert run(code) == str({"torchvision-pil-1": (False, False), "fixed-point-1": (False, True)})
    monkeypatch.setitem(sys.modules, "cykooz_resizer", None)
    assert "torch" in inspect.getclosurevars(load_resizer()).nonlocals


def test_a_package_with_other_pixels_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def other() -> Resize:
        return lambda image, size: image.resize((size, size), Image.Resampling.BICUBIC)

    monkeypatch.setattr(fixed_point, "RESIZERS", {"pillow": other, "torch": RESIZERS["torch"]})
    assert load_resizer()(noise(9, 9), 20).tobytes() == RESIZERS["torch"]()(noise(9, 9), 20).tobytes()
    monkeypatch.setattr(fixed_point, "RESIZERS", {"pillow": other})
    with pytest.raises(UserError, match=r"fixed-point-1: pillow \S+ does not give its pixels on this machine"):
        load_resizer()


SIZE = 48
HEIGHT_FIRST = int(PIL.__version__.split(".")[0]) >= 13


def differences_of(images: list[Image.Image], records: list[Augmentation]) -> np.ndarray:
    """How many levels each pixel of the backend device-1 differs."""
    cells = np.zeros((len(images), CELL * SIZE, CELL * SIZE, 3), np.uint8)
    filled = [fill_cell(*of, SIZE, cell) for *of, cell in zip(images, records, cells, strict=True)]
    expected = np.stack([np.asarray(replay(*of)) for of in zip(images, records, strict=True)]).astype(int)
    return abs(augment(torch.from_numpy(cells), filled, SIZE).numpy() - expected)


@pytest.mark.parametrize("name", OPS)
def test_an_operation_has_exactly_the_same_pixels(name: str) -> None:
    records = []
    for level in (3, 9, 30):
        magnitude = torchvision_magnitudes(level, SIZE)[name]
        signs = (1, -1) if name in OPS[1:10] else (1,)
        records += [Augmentation(Crop(0, 0, SIZE, SIZE), SIZE, (Op(name, sign * magnitude),)) for sign in signs]
    images = [natural(SIZE, SIZE, seed) for seed in range(len(records))]
    grey, dark = Image.new("RGB", (SIZE, SIZE), (90, 90, 90)), Image.new("RGB", (SIZE, SIZE))
    images, records = [*images, grey, dark], [*records, records[0], records[0]]
    assert not differences_of(images, records).any()


def test_resized_crops_of_all_shapes_differ_by_one_level_in_few_places() -> None:
    sides = [(20, 30), (150, 40), (30, 90), (70, 95), (48, 60), (60, 48), (48, 48), (1, 1), (3, 190), (300, 200)]
    records = [Augmentation(Crop(0, 0, height, width), SIZE, None) for width, height in sides]
    images = [natural(*side) for side in sides]
    differences = differences_of(images, records)
    assert differences.max() <= (1 if HEIGHT_FIRST else 4)
    assert not HEIGHT_FIRST or (differences > 0).mean() < 1e-3


def test_sampled_records_have_the_same_pixels_but_for_few() -> None:
    policy = Augmentations(count=1, size=SIZE)
    images = [natural(40 + 7 * n, 200 - 5 * n) for n in range(24)]
    records = [sample_augmentation(policy, 0, str(n), 0, *image.size) for n, image in enumerate(images)]
    differences = differences_of(images, records)
    assert not HEIGHT_FIRST or (differences.max() <= 3 and (differences > 0).mean() < 1e-3)
    assert differences.mean() < 1


def test_a_crop_without_room_in_a_cell_is_resized_by_the_host() -> None:
    record, cell = Augmentation(Crop(0, 0, 100, 200), SIZE, None), np.zeros((CELL * SIZE) ** 2 * 3, np.uint8)
    assert fill_cell(natural(200, 100), record, SIZE, cell) == CellRecord(SIZE, SIZE, ())
    np.testing.assert_array_equal(cell[: SIZE * SIZE * 3], np.asarray(replay(natural(200, 100), record)).reshape(-1))
    with pytest.raises(ValueError, match="another image"):
        fill_cell(natural(199, 100), record, SIZE, cell)


NEW = "with-invert-1"


def with_invert() -> Backend:
    """The default backend with one more operation."""
    default, table = BACKENDS[AUGMENTATION_BACKEND], RAND_AUGMENT
    operations = {**default.operations, "Invert": lambda image, _: ImageChops.invert(image)}
    more = OperationTable(
        (*table.names, "Invert"), table.signed, lambda level, size: {**table.magnitudes(level, size), "Invert": 0.0}
    )
    return Backend(default.load_resize, operations, more)


def test_a_new_backend_draws_and_replays_its_operation_and_others_refuse_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, NEW, with_invert())
    assert known_operations() == (*OPS, "Invert")
    policy = Augmentations().model_copy(update={"backend": NEW})
    drawn = [sample_augmentation(policy, 0, str(n), 0, 64, 48) for n in range(200)]
    inverting = [record for record in drawn if any(op.name == "Invert" for op in record.ops or ())]
    assert 10 < len(inverting) < 45  # 2 of 15 operations a record: 27 of 200 expected
    record = Augmentation(inverting[0].crop, 16, tuple(op for op in inverting[0].ops or () if op.name == "Invert")[:1])
    image = noise(64, 48)
    plain = load_backend(NEW)(image, Augmentation(record.crop, 16, None))
    assert np.array_equal(load_backend(NEW)(image, record), 255 - plain)
    for backend in (AUGMENTATION_BACKEND, "fixed-point-1"):
        with pytest.raises(ValueError, match="unknown operation 'Invert'"):
            load_backend(backend)(image, record)
