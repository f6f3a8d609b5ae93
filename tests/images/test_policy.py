"""The image policy: pixels of every format and mode, PNGs that lack some, and refusals."""

from __future__ import annotations

import concurrent.futures
import contextlib
import io
import struct

import numpy as np
import PIL
import pytest
from PIL import Image, ImageFile, ImageOps

from reinforce.errors import UserError
from reinforce.images import jpeg as png
from reinforce.images.policy import (
    FORMATS,
    PUBLISHED_POLICY,
    ImageRefused,
    check_header,
    decode,
    format_extension,
    is_plain,
    to_rgb,
)
from reinforce.source.config import Limits
from reinforce.source.file_types import IMAGE_EXTENSIONS
from schemas import Reason
from tests.helpers.images import encode, noise, png_chunk, raw_png

LIMITS = Limits()
WHITE, RED, BLACK = (255, 255, 255), (255, 0, 0), (0, 0, 0)


def pixels(data: bytes, limits: Limits = LIMITS) -> list[tuple[int, int, int]]:
    """The pixels of encoded bytes, and by the way those of the same image when Pillow has opened it."""
    image = decode(data, limits)
    assert image.mode == "RGB"
    opened = Image.open(io.BytesIO(data))
    for same in (to_rgb(opened, limits), to_rgb(opened, limits), to_rgb(image, limits)):
        assert np.array_equal(same, image), "a second conversion and that of converted pixels change nothing"
    return [tuple(pixel) for pixel in np.asarray(image).reshape(-1, 3).tolist()]


def refusal(data: bytes, limits: Limits = LIMITS) -> Reason:
    with pytest.raises(ImageRefused) as caught:
        decode(data, limits)
    assert caught.value.detail
    return caught.value.reason


def test_a_header_has_the_size_and_is_refused_by_the_limits_without_decoding():
    data = encode(Image.new("RGB", (30, 20), RED), "PNG")
    assert check_header(data[:-20], LIMITS) == (30, 20), "the end is not read"
    for content, limits, reason in (
        (data, Limits(pixels=599), Reason.IMAGE_PIXELS),
        (data, Limits(aspect=1.4), Reason.IMAGE_ASPECT),
        (b"text", LIMITS, Reason.IMAGE_FORMAT),
        (data[:20], LIMITS, Reason.IMAGE_BROKEN),
    ):
        with pytest.raises(ImageRefused) as caught:
            check_header(content, limits)
        assert caught.value.reason is reason


# --- pixels


def test_lossless_formats_keep_their_pixels():
    for format in ("PNG", "BMP", "TIFF", "PPM"):
        assert decode(encode(noise(), format), LIMITS).tobytes() == noise().tobytes()


def test_transparent_pixels_and_palette_colours_are_composited_over_white():
    rgba = Image.new("RGBA", (3, 1))
    rgba.putdata([(0, 255, 0, 0), (255, 0, 0, 255), (0, 0, 0, 51)])
    for format in ("PNG", "WEBP", "TIFF"):
        options = {"lossless": True, "exact": True} if format == "WEBP" else {}
        assert pixels(encode(rgba, format, **options)) == [WHITE, RED, (204, 204, 204)]
    grey = Image.new("LA", (2, 1))
    grey.putdata([(0, 0), (7, 255)])
    assert pixels(encode(grey)) == [WHITE, (7, 7, 7)]
    image = Image.new("P", (3, 1))
    image.putpalette([0, 255, 0, 255, 0, 0, 0, 0, 0])
    image.putdata([0, 1, 2])
    assert pixels(encode(image, transparency=0)) == [WHITE, RED, BLACK]
    assert pixels(encode(image, "GIF", transparency=0)) == [WHITE, RED, BLACK]
    assert pixels(encode(image, transparency=b"\x00\xff\x33")) == [WHITE, RED, (204, 204, 204)]
    assert pixels(encode(image)) == [(0, 255, 0), RED, BLACK]


@pytest.mark.parametrize(
    ("depth", "colour", "samples", "transparent", "expected"),
    [
        (1, 0, bytes([0b01000000]), struct.pack(">H", 0), [WHITE, WHITE]),
        (2, 0, bytes([0b01100000]), struct.pack(">H", 1), [WHITE, (170,) * 3]),
        (4, 0, bytes([0x12]), struct.pack(">H", 1), [WHITE, (34,) * 3]),
        (8, 0, bytes([1, 2]), struct.pack(">H", 1), [WHITE, (2,) * 3]),
        (16, 0, struct.pack(">2H", 257, 514), struct.pack(">H", 257), [WHITE, (2,) * 3]),
        (8, 2, bytes([1, 2, 3, 4, 5, 6]), struct.pack(">3H", 1, 2, 3), [WHITE, (4, 5, 6)]),
        (
            16,
            2,
            struct.pack(">6H", *range(2000, 8000, 1000)),
            struct.pack(">3H", 2000, 3000, 4000),
            [WHITE, (19, 23, 27)],
        ),
    ],
)
def test_the_transparent_colour_of_a_png_works_at_every_depth(depth, colour, samples, transparent, expected):
    assert pixels(raw_png(2, 1, depth, colour, b"\0" + samples, png_chunk(b"tRNS", transparent))) == expected


def test_alpha_modes_without_a_common_file_format_are_composited():
    green = Image.new("RGBA", (1, 1), (0, 255, 0, 0))
    palette = green.convert("P").convert("PA")
    palette.putalpha(0)
    for image in (Image.new("LA", (1, 1), (0, 0)).convert("La"), green.convert("RGBa"), palette):
        assert to_rgb(image, LIMITS).getpixel((0, 0)) == WHITE


def test_16_bit_grey_is_divided_by_257():
    values = np.array([[0, 257, 32_896, 65_535, 128, 129]], dtype=np.uint16)
    expected = [(value,) * 3 for value in (0, 1, 128, 255, 0, 1)]
    assert pixels(raw_png(6, 1, 16, 0, b"\0" + values.astype(">u2").tobytes())) == expected
    assert pixels(encode(Image.fromarray(values), "TIFF")) == expected
    assert pixels(b"P5 6 1 65535\n" + values.astype(">u2").tobytes()) == expected
    big_endian = Image.frombytes("I;16B", (6, 1), values.astype(">u2").tobytes())
    assert pixels(encode(big_endian, "TIFF")) == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0.0, 0.5, 1.0, -3.0, np.nan, np.inf]], np.float32), [0, 128, 255, 0, 0, 255]),
        (np.array([[0.0, 100.0, 255.0]], np.float32), [0, 100, 255]),
        (np.array([[0.0, 5e5, 1e6]], np.float32), [0, 128, 255]),
        (np.array([[np.nan, -1.0]], np.float32), [0, 0]),
        (np.array([[0, 200, -5]], np.int32), [0, 200, 0]),
        (np.array([[257, 65_535]], np.int32), [1, 255]),
        (np.array([[0, 2**31 - 1]], np.int32), [0, 255]),
    ],
)
def test_float_and_32_bit_grey_are_scaled_to_their_range(values, expected):
    assert pixels(encode(Image.fromarray(values), "TIFF")) == [(value,) * 3 for value in expected]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied_once(format, orientation):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16] = RED
    upright[8:, 16:] = 255
    # as a camera in this orientation stores it: the inverse of what a viewer applies
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(format, {})
    data = encode(Image.fromarray(np.ascontiguousarray(stored)), format, exif=exif, **options)
    image = decode(data, LIMITS)
    assert image.size == (32, 16)
    assert np.abs(np.asarray(image).astype(int) - upright).max() <= 8
    opened = Image.open(io.BytesIO(data))
    for same in (opened, opened.copy(), opened.convert("RGB"), ImageOps.exif_transpose(opened), image):
        assert np.array_equal(to_rgb(same, LIMITS), image), "once, whoever applies it"
    published = decode(data, LIMITS, policy=PUBLISHED_POLICY)
    assert np.array_equal(to_rgb(published, LIMITS), published), "an image that was decoded is not turned"


def test_conversion_in_strips_equals_conversion_at_once(monkeypatch):
    rgba = noise(mode="RGBA")
    rgba.putalpha(noise(mode="L"))
    values = np.random.default_rng(1).normal(100, 90, (30, 40)).astype(np.float32)
    images = [encode(rgba), encode(rgba.convert("LA")), encode(Image.fromarray(values), "TIFF")]
    images += [encode(noise(mode="P"), transparency=bytes(range(256))), encode(noise(), transparency=(1, 2, 3))]
    images += [encode(Image.fromarray(values.clip(0).astype(np.uint16)), transparency=7)]
    at_once = [decode(data, LIMITS).tobytes() for data in images]
    monkeypatch.setattr("reinforce.images.policy._STRIP_PIXELS", 1)
    assert [decode(data, LIMITS).tobytes() for data in images] == at_once


# --- refusals


def test_exotic_formats_truncated_images_and_what_is_above_the_limits_are_refused():
    for format in ("ICO", "TGA", "PCX", "SGI", "ICNS"):
        assert refusal(encode(Image.new("RGB", (32, 32)), format)) is Reason.IMAGE_FORMAT
    for data in (encode(noise(), format) for format in FORMATS):
        for keep in (len(data) // 2, len(data) * 9 // 10):
            assert refusal(data[:keep]) is Reason.IMAGE_BROKEN
    limits = Limits(pixels=10_000, aspect=10)
    assert decode(encode(Image.new("RGB", (100, 100))), limits).size == (100, 100)
    assert refusal(encode(Image.new("RGB", (101, 100))), limits) is Reason.IMAGE_PIXELS
    assert decode(encode(Image.new("RGB", (10, 100))), limits).size == (10, 100)
    assert refusal(encode(Image.new("RGB", (101, 10))), limits) is Reason.IMAGE_ASPECT
    with pytest.raises(ImageRefused, match=r"^image_format: no known format, begins with b'\\xff\\xff'$"):
        decode(b"\xff\xff", LIMITS)


def test_the_pixel_limit_of_the_config_applies_instead_of_pillows_except_to_webp_and_tiff(monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for format in ("PNG", "JPEG", "GIF", "BMP", "PPM"):
        assert decode(encode(noise(), format), LIMITS).size == (40, 30)
    found = [one.message for one in recwarn if not issubclass(one.category, ResourceWarning)]  # of other tests
    assert not found
    for format in ("WEBP", "TIFF")[int(PIL.__version__.partition(".")[0]) < 13 :]:  # Pillow 13 checks WebP, too
        assert refusal(encode(noise(), format)) is Reason.IMAGE_PIXELS


def test_decoding_is_thread_safe_and_pillow_must_not_allow_truncated_images(monkeypatch):
    encoded = [*(encode(noise(), format) for format in FORMATS), encode(noise(mode="P"), "GIF")]
    encoded += [encode(noise(mode="RGBA")), encode(noise(), "TIFF", compression="tiff_lzw")]
    expected = [decode(data, LIMITS).tobytes() for data in encoded]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda data: decode(data, LIMITS).tobytes(), encoded * 8))
    assert found == expected * 8
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(UserError, match="LOAD_TRUNCATED_IMAGES"):
        decode(encode(noise()), LIMITS)


def test_plain_images_are_the_same_by_both_policies() -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    palette = noise(mode="RGB").quantize(16)
    images = {
        "plain": [encode(noise(mode=mode), "PNG") for mode in ("RGB", "L", "1", "P")]
        + [encode(noise(mode=mode), "JPEG") for mode in ("RGB", "L", "CMYK")]
        + [encode(noise(), "BMP"), encode(palette)],
        "others": [encode(noise(mode=mode), "PNG") for mode in ("RGBA", "LA")]
        + [encode(noise(), "JPEG", exif=turned), encode(noise(), "PNG", exif=turned)]
        + [encode(palette, "PNG", transparency=3), encode(noise(), "GIF"), encode(noise(), "WEBP"), b"no image"],
    }
    assert {kind: {is_plain(image) for image in found} for kind, found in images.items()} == {
        "plain": {True},
        "others": {False},
    }
    for image in images["plain"]:
        ours, theirs = (decode(image, Limits(), policy=policy) for policy in ("rgb-1", PUBLISHED_POLICY))
        assert ours.tobytes() == theirs.tobytes()
    formats = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
    extensions = [format_extension(encode(noise(), format_)) for format_ in formats]
    assert extensions == ["jpg", "png", "webp", "gif", "bmp", "tif", "ppm"]
    assert {*extensions} <= IMAGE_EXTENSIONS
    Image.init()
    assert {Image.EXTENSION[f".{extension}"] for extension in IMAGE_EXTENSIONS - {"jfif", "jpe"}} <= {*FORMATS}


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
