"""The image policy rgb-1-reduced-N: large JPEGs are decoded at a fraction of their size."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import reinforce
from reinforce.config import parse_config
from reinforce.dataset.augment.backends import BACKENDS, load_backend
from reinforce.engine.plan.recipe import build_layers
from reinforce.errors import UserError
from reinforce.images.policy import ImageRefused, decode, image_policy, is_image_policy
from reinforce.input_config import Limits
from schemas import Reason
from tests.helpers.data import config_of, write_tar
from tests.helpers.images import JPEGS, encode, natural, noise
from tests.helpers.models import PixelRecorder
from tests.helpers.reinforced import reinforce_here
from tests.hostile.images import IMAGES, ImageCase

LIMITS = Limits(aspect=100)


def policy(side: int) -> str:
    return f"rgb-1-reduced-{side}"


def size_of(width: int, height: int, side: int, **options: Any) -> tuple[int, int]:
    data = encode(Image.new("RGB", (width, height)), **{"format_": "JPEG", **options})
    return decode(data, LIMITS, policy=policy(side)).size


@pytest.mark.parametrize(
    ("size", "side", "reduced"),
    [
        ((800, 600), 600, (800, 600)),
        ((800, 600), 301, (800, 600)),
        ((800, 600), 300, (400, 300)),
        ((800, 600), 150, (200, 150)),
        ((799, 601), 75, (100, 76)),
        ((800, 600), 8, (100, 75)),
        ((5, 3), 8, (5, 3)),
    ],
)
def test_only_a_jpeg_gets_the_smallest_size_that_keeps_the_side(
    size: tuple[int, int], side: int, reduced: tuple[int, int]
) -> None:
    assert size_of(*size, side) == reduced
    assert size_of(*size, side, progressive=True) == reduced
    assert {size_of(*size, side, format_=format_) for format_ in ("PNG", "WEBP")} == {size}


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", JPEGS)
def test_the_pixels_are_those_of_libjpegs_scaled_transform(mode: str, options: dict[str, Any]) -> None:
    data = encode(natural(203, 150).convert(mode), "JPEG", **options)
    expected = Image.open(io.BytesIO(data))
    expected.draft(None, (50, 37))
    assert decode(data, LIMITS, strict=True, policy=policy(37)).tobytes() == expected.convert("RGB").tobytes()
    if mode == "RGB":
        full = decode(data, LIMITS).resize(expected.size, Image.Resampling.BOX)
        assert np.abs(np.asarray(full).astype(int) - np.asarray(expected)).mean() < 4


def test_exif_orientation_is_applied_after_the_reduction_and_limits_apply_to_the_full_size() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned, plain = (
        decode(encode(natural(200, 100), "JPEG", **options), LIMITS, policy=policy(50))
        for options in ({"exif": exif}, {})
    )
    assert turned.size == (50, 100)
    assert turned.tobytes() == plain.transpose(Image.Transpose.ROTATE_270).tobytes()
    with pytest.raises(ImageRefused, match="100x80 pixels, above"):
        decode(encode(noise(100, 80), "JPEG"), Limits(pixels=7999), policy=policy(10))


@pytest.mark.parametrize("case", [case for case in IMAGES if case.extension == "jpg"], ids=lambda case: case.defect)
def test_hostile_jpegs_are_refused_as_at_full_size(case: ImageCase) -> None:
    def outcome(name: str) -> Reason | None:
        try:
            decode(case.data(), LIMITS, strict=True, policy=name)
        except ImageRefused as refused:
            return refused.reason
        return None

    assert outcome(policy(8)) == outcome("rgb-1")


def test_the_policy_is_recorded_and_published_reinforcements_need_images_of_full_size() -> None:
    def config(**input_: int) -> reinforce.Config:
        return parse_config({"source": "x.tar", "output": "out", "input": input_})

    recipe = build_layers(config(reduce_to=448), {})["samples"].recipe
    assert recipe["policies"]["image"] == image_policy(config(reduce_to=448)) == "rgb-1-reduced-448"
    assert "reduce_to" not in recipe["input"]
    assert is_image_policy("rgb-1-reduced-448")
    assert not any(map(is_image_policy, ("rgb-1-reduced-", "rgb-1-reduced-0", "rgb-2", "rgb-1-reduced-448 ")))
    with pytest.raises(UserError, match=r"input\.reduce_to: remove it"):
        parse_config({"source": "x.tar", "output": "out", "reinforcements": "y.tar", "input": {"reduce_to": 448}})


@pytest.mark.parametrize("backend", BACKENDS)
def test_records_and_sizes_refer_to_the_reduced_image(tmp_path: Path, backend: str) -> None:
    members = [(f"{i}.jpg", encode(natural(400, 300 + i, i), "JPEG")) for i in range(3)]
    write_tar(tmp_path / "source" / "0.tar", members)
    config = config_of(f"{tmp_path}/source/*.tar", tmp_path / "out", captioners={}, input={"reduce_to": 100})
    config["augmentations"] |= {"backend": backend}
    config["teachers"] = {"recorder": {"class": "tests.helpers.models:PixelRecorder"}}
    PixelRecorder.seen.clear()
    samples = list(reinforce.open(reinforce_here(config)))
    assert [(s.width, s.height) for s in samples] == [(200, 150), (200, 151), (200, 151)]
    for sample in samples:
        assert sample.pil().size == (sample.width, sample.height)
        assert all(r.crop.left + r.crop.width <= sample.width for r in sample.augmentations)
    crops = [np.asarray(sample.augmented(k)) for sample in samples for k in range(2)]
    np.testing.assert_array_equal(crops, PixelRecorder.seen[-6:])
    image = decode(samples[0].image, LIMITS, policy=policy(100))
    np.testing.assert_array_equal(crops[1], load_backend(backend)(image, samples[0].augmentations[1]))
