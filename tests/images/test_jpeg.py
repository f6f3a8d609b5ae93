"""JPEGs with missing scan data, at their size and reduced."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from reinforce.images.policy import ImageRefused, decode
from reinforce.input_config import Limits
from tests.helpers.images import JPEGS, encode, noise, scan_of, without_scan_data

LIMITS = Limits(aspect=100)
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
