"""JPEGs: with missing scan data, decoded by simplejpeg as by Pillow, and at a fraction of their size."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import reinforce
from reinforce.config import parse_config
from reinforce.engine.plan.plan import build_layers
from reinforce.errors import UserError
from reinforce.images import jpeg
from reinforce.images.backends import BACKENDS, load_backend
from reinforce.images.policy import ImageRefused, decode, image_policy, is_image_policy
from reinforce.processes.imports import installed
from reinforce.source.config import Limits
from schemas import Reason
from tests.helpers.data import config_of, write_tar
from tests.helpers.images import JPEGS, encode, natural, noise, scan_of, without_scan_data
from tests.helpers.models import PixelRecorder
from tests.helpers.reinforced import reinforce_here
from tests.hostile.images import IMAGES, ImageCase

LIMITS = Limits(aspect=100)
fast = pytest.mark.skipif(not installed("simplejpeg"), reason="simplejpeg is not installed")
POLICIES = ["rgb-1", "rgb-1-reduced-40", "rgb-1-reduced-20", "rgb-1-reduced-10"]


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", JPEGS)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_jpeg_that_lacks_scan_data_is_refused_only_by_strict_decoding(
    mode: str, options: dict[str, Any], share: float
) -> None:
    data = without_scan_data(encode(noise(100, 80, mode), "JPEG", **options), share)
    for name in POLICIES:
        with pytest.raises(ImageRefused, match="image_broken: the JPEG lacks scan data"):
            decode(data, LIMITS, strict=True, policy=name)
    assert decode(data, LIMITS).size == (100, 80)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("options", [{"subsampling": 0}, {"subsampling": 0, "restart_marker_blocks": 3}])
def test_a_jpeg_that_is_cut_after_any_ff_and_closed_is_refused(mode: str, options: dict[str, Any]) -> None:
    data = encode(noise(100, 80, mode), "JPEG", quality=80, **options)
    begin, end = scan_of(data)
    last_block = begin + (end - begin) * 98 // 100
    cuts = [place + 1 for place in range(begin, last_block) if data[place] == 0xFF]
    assert len(cuts) >= 3
    for cut in cuts:
        with pytest.raises(ImageRefused, match="the JPEG lacks scan data"):
            decode(data[:cut] + b"\xff\xd9", LIMITS, strict=True)


@pytest.mark.parametrize("options", [*JPEGS, {"progressive": True}])
def test_a_jpeg_that_ends_in_zeros_is_refused_unless_they_follow_its_end_mark(options: dict[str, Any]) -> None:
    data = encode(noise(40, 40), "JPEG", **options)
    begin, end = scan_of(data)
    for cut in range(begin + 1, end, 61):
        with pytest.raises(ImageRefused, match="image_broken"):
            decode(data[:cut] + bytes(len(data) - cut), LIMITS, strict=True)
    if "progressive" in options:
        first_scan = data.index(b"\xff\xda", begin) - begin
        with pytest.raises(ImageRefused):
            decode(without_scan_data(data, 0.5 * first_scan / (end - begin)), LIMITS, strict=True)
        assert decode(without_scan_data(data, 0.9), LIMITS, strict=True).size == (40, 40), "a later scan is cut"
    assert decode(data + bytes(512), LIMITS, strict=True).tobytes() == decode(data, LIMITS).tobytes()
    grey = encode(Image.new("RGB", (40, 30), (128, 128, 128)), "JPEG")
    assert decode(grey[:-2] + b"\xff\xff\xff\xd9", LIMITS, strict=True).size == (40, 30), "fill bytes before the mark"


@given(
    st.tuples(st.integers(1, 90), st.integers(1, 90)),
    st.sampled_from([0, 127, 128, None]),
    st.sampled_from(["L", "RGB", "CMYK"]),
    st.sampled_from([*JPEGS, {"progressive": True}]),
    st.integers(1, 100),
    st.sampled_from(["rgb-1", "rgb-1-reduced-8"]),
)
@settings(max_examples=100)
def test_no_complete_jpeg_is_refused(
    size: tuple[int, int], colour: int | None, mode: str, options: dict[str, Any], quality: int, name: str
) -> None:
    image = noise(*size, mode)
    if colour is not None:  # missing data looks grey
        image.paste(colour if mode == "L" else (colour,) * len(mode), (0, 0, *size))
    data = encode(image, "JPEG", **{"quality": quality, **options})
    strict = decode(data, LIMITS, strict=True, policy=name)
    assert strict.tobytes() == decode(data, LIMITS, policy=name).tobytes()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def outcome(data: bytes, strict: bool) -> Any:
    """Pixels, or the refusal."""
    try:
        return decode(data, LIMITS, strict=strict).tobytes()
    except ImageRefused as refused:
        return refused.reason, refused.detail


def outcomes(data: bytes) -> list[Any]:
    """The outcome of strict decoding, and of decoding a stored image where that differs."""
    strict = outcome(data, strict=True)
    return [strict] if isinstance(strict, bytes) else [strict, outcome(data, strict=False)]


@fast
@settings(max_examples=100)
@given(
    st.integers(1, 90),
    st.integers(1, 90),
    st.integers(0, 2**32),
    st.booleans(),
    st.sampled_from(["4:4:4", "4:2:2", "4:2:0"]),
    st.integers(1, 100),
    st.sampled_from([{}, {"optimize": True}, {"restart_marker_blocks": 3}, {"keep_rgb": True, "subsampling": 0}]),
)
def test_pixels_equal_pillows(
    width: int, height: int, seed: int, saturated: bool, subsampling: str, quality: int, options: dict[str, Any]
) -> None:
    image = noise(width, height, seed=seed, saturated=saturated)
    data = encode(image, "JPEG", **{"subsampling": subsampling, "quality": quality, **options})
    header = opened(data)
    assert jpeg.load(header, data)
    assert header.mode == "RGB"
    assert header.tobytes() == opened(data).tobytes()


@fast
@pytest.mark.parametrize("case", IMAGES, ids=lambda case: case.defect)
def test_hostile_images_have_the_same_outcome_as_with_pillow(case: ImageCase, monkeypatch: pytest.MonkeyPatch) -> None:
    data = case.data()
    found = outcomes(data)
    monkeypatch.setattr(jpeg, "load", lambda *_: False)
    assert found == outcomes(data)


@fast
@settings(max_examples=100)
@given(st.integers(0, 2**32), st.data())
def test_damaged_jpegs_have_the_same_outcome_as_with_pillow(seed: int, draw: st.DataObject) -> None:
    data = bytearray(encode(noise(seed=seed), "JPEG", quality=draw.draw(st.sampled_from([30, 90]))))
    for _ in range(draw.draw(st.integers(1, 4))):
        data[draw.draw(st.integers(2, len(data) - 1))] = draw.draw(st.integers(0, 255))
    damaged = bytes(data[: draw.draw(st.integers(len(data) // 2, len(data)))]) if seed % 3 == 0 else bytes(data)
    found = outcome(damaged, True)
    with mock.patch.object(jpeg, "load", return_value=False):
        assert found == outcome(damaged, True)


@fast
@pytest.mark.parametrize(
    "data",
    [
        encode(natural(40, 30).convert("L"), "JPEG"),
        encode(natural(40, 30).convert("CMYK"), "JPEG"),
        encode(natural(40, 30), "JPEG", progressive=True),
        encode(natural(40, 30), "PNG"),
        encode(natural(40, 30), "MPO", save_all=True, append_images=[natural(40, 30)]),
        without_scan_data(encode(natural(40, 30), "JPEG"), 0.5),
        encode(natural(40, 30), "JPEG")[:-40],
    ],
    ids=["grey", "CMYK", "progressive", "PNG", "MPO", "missing scan data", "truncated"],
)
def test_everything_else_is_left_to_pillow(data: bytes) -> None:
    assert not jpeg.load(opened(data), data)
    large = encode(natural(50, 40), "JPEG")
    assert not jpeg.load(opened(data), large), "of another size than Pillow has found"


@fast
def test_images_have_the_same_pixels_where_the_package_is_missing_or_has_other_pixels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import simplejpeg

    def darker(data: bytes, **options: Any) -> Any:
        return decode_jpeg(data, **options) // 2

    assert jpeg._load_decoder() is not None
    decode_jpeg, data = simplejpeg.decode_jpeg, encode(natural(60, 40), "JPEG")
    fast = decode(data, LIMITS).tobytes()
    monkeypatch.setattr(simplejpeg, "decode_jpeg", darker)
    monkeypatch.setattr(jpeg, "_load_decoder", jpeg._load_decoder.__wrapped__)
    assert jpeg._load_decoder() is None
    assert decode(data, LIMITS).tobytes() == fast
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    assert not jpeg.load(opened(data), data)
    assert decode(data, LIMITS).tobytes() == fast


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
