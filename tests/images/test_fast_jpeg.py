"""JPEGs decoded by simplejpeg: the pixels and refusals of Pillow."""

from __future__ import annotations

import io
import sys
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from reinforce.images import jpeg
from reinforce.images.policy import ImageRefused, decode
from reinforce.input_config import Limits
from tests.helpers.images import encode, natural, noise, without_scan_data
from tests.hostile.images import IMAGES, ImageCase

pytest.importorskip("simplejpeg")
LIMITS = Limits(aspect=100)
SUBSAMPLINGS = ["4:4:4", "4:2:2", "4:2:0"]


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


@settings(max_examples=100)
@given(
    st.integers(1, 90),
    st.integers(1, 90),
    st.integers(0, 2**32),
    st.booleans(),
    st.sampled_from(SUBSAMPLINGS),
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


@pytest.mark.parametrize("case", IMAGES, ids=lambda case: case.defect)
def test_hostile_images_have_the_same_outcome_as_with_pillow(case: ImageCase, monkeypatch: pytest.MonkeyPatch) -> None:
    data = case.data()
    found = outcomes(data)
    monkeypatch.setattr(jpeg, "load", lambda *_: False)
    assert found == outcomes(data)


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
