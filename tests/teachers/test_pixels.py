"""Preprocessing compared with open_clip and Pillow."""

from __future__ import annotations

from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from teachers.fit import fit
from teachers.pixels import to_pixels
from teachers.protocols import ImageSpec

MEAN, STD = (0.48, 0.45, 0.40), (0.26, 0.27, 0.28)


def _picture(width: int, height: int, seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    noise = np.random.default_rng(seed + 1).integers(-20, 20, (height, width, 3))
    smooth = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC), dtype=np.int64)
    return Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8))


def _open_clip(image: Image.Image, spec: ImageSpec) -> torch.Tensor:
    mode = "shortest" if spec.resize == "crop" else "squash"
    size: Any = spec.size if isinstance(spec.size, int) else tuple(spec.size)
    transform = open_clip.image_transform(
        size, is_train=False, mean=MEAN, std=STD, resize_mode=mode, interpolation=spec.interpolation
    )
    result: torch.Tensor = transform(image)
    return result


@settings(max_examples=30)
@given(
    width=st.integers(1, 130),
    height=st.integers(1, 130),
    size=st.sampled_from([32, 33, (32, 48), (48, 32), (31, 32)]),
    resize=st.sampled_from(["crop", "squash"]),
    interpolation=st.sampled_from(["bicubic", "bilinear"]),
)
def test_whole_images_match_open_clips_own(width: int, height: int, size: Any, resize: Any, interpolation: Any) -> None:
    if resize == "crop" and not isinstance(size, int):
        interpolation = "bicubic"  # open_clip always uses it for such crops
    spec = ImageSpec(size, MEAN, STD, interpolation, resize)
    image = _picture(width, height)
    array = fit(image, spec)
    assert array.dtype == np.uint8
    pixels = to_pixels(torch.from_numpy(array.copy())[None], spec)[0]
    assert torch.equal(pixels, _open_clip(image, spec))


def test_nearest_interpolation_creates_no_new_colors() -> None:
    spec = ImageSpec(8, MEAN, STD, "nearest", "squash")
    image = Image.fromarray(np.indices((32, 32)).sum(0).astype(np.uint8) % 2 * 255).convert("RGB")
    assert set(np.unique(fit(image, spec))) <= {0, 255}
    batch = torch.from_numpy(np.asarray(image).copy())[None]
    values = to_pixels(batch, ImageSpec(8, (0.0,) * 3, (1.0,) * 3, "nearest"))  # type: ignore[arg-type]
    assert set(values.unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [48, 80, (40, 56)])
def test_resized_crops_match_pillow_within_rounding(size: Any, interpolation: Any) -> None:
    spec = ImageSpec(size, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), interpolation, "squash")
    images = [_picture(64, 64, seed) for seed in range(3)]
    ours = to_pixels(torch.stack([torch.from_numpy(np.asarray(image).copy()) for image in images]), spec)
    pillow = np.stack([fit(image, spec) for image in images]).transpose(0, 3, 1, 2) / 255
    assert ours.shape == pillow.shape
    apart = np.abs(ours.numpy() - pillow) * 255
    assert apart.mean() < 0.4  # Pillow rounds and clips after each of its two passes
    assert apart.max() < 4


def test_resized_pixels_stay_within_0_and_1_and_the_input_as_it_was() -> None:
    edges = torch.zeros(1, 16, 16, 3, dtype=torch.uint8)
    edges[:, :, ::3] = 255
    before = edges.clone()
    for size in (16, 32):
        pixels = to_pixels(edges, ImageSpec(size, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)))
        assert (pixels.min(), pixels.max()) == (0, 1)
        assert torch.equal(edges, before)
