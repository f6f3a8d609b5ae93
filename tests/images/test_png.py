"""PNGs with missing or damaged pixel data."""

from __future__ import annotations

import contextlib
import io

import pytest
from PIL import Image

from reinforce.images import png
from reinforce.images.policy import ImageRefused, decode
from reinforce.input_config import Limits
from tests.helpers.images import encode, noise, png_chunk, raw_png

LIMITS = Limits()


@pytest.mark.parametrize("interlace", [0, 1])
@pytest.mark.parametrize(
    ("depth", "colour", "bits"), [(1, 0, 1), (2, 3, 2), (8, 0, 8), (16, 0, 16), (8, 2, 24), (8, 6, 32)]
)
def test_a_png_with_missing_rows_is_refused_and_one_with_black_rows_is_not(depth, colour, bits, interlace):
    width, height = 13, 11
    passes = [(0, 0, 1, 1)]
    if interlace:
        passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    lines = b""
    for x, y, step_x, step_y in passes:
        line = 1 + (len(range(x, width, step_x)) * bits + 7) // 8
        lines += bytes(line * len(range(y, height, step_y)))
    palette = [png_chunk(b"PLTE", bytes(12))] if colour == 3 else []
    whole = raw_png(width, height, depth, colour, lines, *palette, interlace=interlace)
    assert decode(whole, LIMITS).size == (width, height)
    for missing in (1, 1 + (width * bits + 7) // 8):
        short = raw_png(width, height, depth, colour, lines[:-missing], *palette, interlace=interlace)
        assert png.missing_bytes(Image.open(io.BytesIO(whole)), short) == missing
        with pytest.raises(ImageRefused, match=r"^image_broken: "):
            decode(short, LIMITS)


def test_a_png_with_damaged_pixel_data_or_without_an_end_is_refused_only_by_strict_decoding():
    data = encode(noise(6, 5).resize((48, 40), Image.Resampling.BICUBIC).quantize(16), "PNG")
    whole = decode(data, LIMITS, strict=True).tobytes()
    begin, end = data.index(b"IDAT") + 4, data.index(b"IEND") - 4
    unnoticed = []
    for place in range(begin, end, 7):
        for damaged in (data[:place] + bytes(len(data) - place), data[:place] + bytes(9) + data[place + 9 :]):
            with pytest.raises(ImageRefused, match="image_broken: "):
                decode(damaged, LIMITS, strict=True)
            with contextlib.suppress(ImageRefused):
                unnoticed.append(decode(damaged, LIMITS).tobytes() != whole)
    assert any(unnoticed), "damage that Pillow alone does not notice"
    with pytest.raises(ImageRefused, match="image_broken: the PNG has no end"):
        decode(data[:end], LIMITS, strict=True)
    assert decode(data[:end], LIMITS).tobytes() == whole
    assert decode(data + b"junk", LIMITS, strict=True).tobytes() == whole
