"""JPEGs with missing scan data."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reinforce.config import Limits
from reinforce.images.policy import ImageRefused, decode
from tests.helpers.images import encode, noise

LIMITS = Limits()


def scan_of(data: bytes) -> tuple[int, int]:
    """Offsets of the first scan data of a JPEG and of its end mark."""
    start = data.index(b"\xff\xda")
    return start + 2 + int.from_bytes(data[start + 2 : start + 4], "big"), len(data) - 2


def without_scan_data(data: bytes, share: float) -> bytes:
    """The JPEG with that share of its scan data, and an end mark."""
    start, end = scan_of(data)
    cut = start + int((end - start) * share)
    while data[cut - 1] == 0xFF:
        cut -= 1
    return data[:cut] + b"\xff\xd9"


JPEGS = [{}, {"subsampling": 0}, {"restart_marker_blocks": 3}, {"optimize": True, "quality": 95}]


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", JPEGS)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_jpeg_that_lacks_scan_data_is_refused_only_by_strict_decoding(mode, options, share):
    data = without_scan_data(encode(noise(100, 70, mode), "JPEG", **options), share)
    with pytest.raises(ImageRefused, match="image_broken: the JPEG lacks scan data"):
        decode(data, LIMITS, strict=True)
    assert decode(data, LIMITS).size == (100, 70)


def test_a_progressive_jpeg_is_refused_if_its_first_scan_is_cut_but_not_if_a_later_one_is():
    data = encode(noise(100, 70), "JPEG", progressive=True)
    begin, end = scan_of(data)
    first_scan = data.index(b"\xff\xda", begin) - begin
    with pytest.raises(ImageRefused):
        decode(without_scan_data(data, 0.5 * first_scan / (end - begin)), LIMITS, strict=True)
    assert decode(without_scan_data(data, 0.9), LIMITS, strict=True).size == (100, 70)


@given(
    st.tuples(st.integers(1, 50), st.integers(1, 50)),
    st.sampled_from([0, 127, 128, None]),
    st.sampled_from(["L", "RGB", "CMYK"]),
    st.sampled_from([*JPEGS, {"progressive": True}]),
    st.integers(1, 100),
)
@settings(max_examples=100, deadline=None)
def test_no_complete_jpeg_is_refused(size, colour, mode, options, quality):
    image = noise(*size, mode)
    if colour is not None:  # missing data looks grey
        image.paste(colour if mode == "L" else (colour,) * len(mode), (0, 0, *size))
    data = encode(image, "JPEG", **{"quality": quality, **options})
    assert decode(data, LIMITS, strict=True).tobytes() == decode(data, LIMITS).tobytes()
