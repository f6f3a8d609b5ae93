"""Images with the defects of web data, drawn here, and what a run makes of each."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

WHITE, RED, GREEN, BLACK, GREY = (255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 0), (128, 128, 128)
IMAGE_BYTES = 1_500_000  # limits.image_bytes of the run


@dataclass(frozen=True)
class ImageCase:
    """``refused`` is the reason for which it is no row; else the row's image has that ``size`` and mean ``colour``."""

    defect: str
    extension: str
    data: Callable[[], bytes]
    refused: str | None = None
    size: tuple[int, int] = (40, 30)
    colour: tuple[int, int, int] | None = None
    note: str = ""

    @property
    def what(self) -> str:
        if self.refused:
            return f"`{self.refused}`" + (f": {self.note}" if self.note else "")
        return f"kept: {self.note}"


def scan_bomb(scans: int, side: int = 4096) -> bytes:
    """A progressive JPEG of a few kilobytes that repeats a scan over all of its blocks."""
    data = encoded(Image.new("L", (side, side), 200), "JPEG", progressive=True)
    start = data.rindex(b"\xff\xc4")  # the tables of the last scan, the scan, the end mark
    return data[:-2] + data[start:-2] * scans + b"\xff\xd9"


def photo(width: int = 40, height: int = 30) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def plain(colour: tuple[int, ...] | int, mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.new(mode, size, colour)


def encoded(image: Image.Image, format_: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, format_, **options)
    return out.getvalue()


def part(data: bytes, share: float) -> bytes:
    return data[: int(len(data) * share)]


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, depth: int, colour: int, lines: bytes, *extra: bytes) -> bytes:
    """A PNG of raw scanlines, each behind its filter byte."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *extra, chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def bit_png(width: int, height: int) -> bytes:
    """All white, a bit a pixel: a few kilobytes for as many pixels as one likes."""
    return png(width, height, 1, 0, (b"\0" + b"\xff" * ((width + 7) // 8)) * height)


def hidden(mode: str) -> bytes:
    """Opaque red beside transparent green, which must not show."""
    image = plain((*RED, 255), "RGBA")
    image.paste((*GREEN, 0), (20, 0, 40, 30))
    if mode == "RGBA":
        return encoded(image, "PNG")
    palette = Image.new("P", (40, 30), 0)
    palette.putpalette([*RED, *GREEN])
    palette.paste(1, (20, 0, 40, 30))
    return encoded(palette, "PNG", transparency=1)


def cut_with_end_mark(share: float, **options: object) -> bytes:
    data = encoded(photo(100, 70), "JPEG", **options)
    start = data.index(b"\xff\xda")
    cut = start + int((len(data) - start) * share)
    return data[: cut - (data[cut - 1] == 0xFF)] + b"\xff\xd9"


def animated(format_: str) -> bytes:
    frames = [plain(colour) for colour in (RED, BLACK, GREEN)]
    return encoded(frames[0], format_, save_all=True, append_images=frames[1:], lossless=True)


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(photo(), "JPEG", exif=exif)


def grey_16() -> bytes:
    return encoded(Image.fromarray(np.full((30, 40), 0x8080, np.uint16)), "PNG")


def broken_crc() -> bytes:
    data = bytearray(encoded(photo(), "PNG"))
    data[data.index(b"IDAT") + 20] ^= 0xFF
    return bytes(data)


def large_frame() -> bytes:
    data = bytearray(encoded(Image.new("P", (12_000, 9_000), 1), "GIF"))
    data[6:10] = struct.pack("<HH", 2, 2)
    return bytes(data)


def huge_chunk(kind: bytes) -> bytes:
    return png(1, 1, 8, 0, b"\0\1", chunk(kind, b"a\0\0" + zlib.compress(bytes(50 * 2**20))))


HTML = b"<!DOCTYPE html><html><head><title>404</title></head><body>Not Found</body></html>"
SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>'
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/tmp/x) (w) file closefile showpage\n%%EOF\n"
MIXED = (255, 127, 127)  # half red, half white

IMAGES = [
    ImageCase("JPEG cut short", "jpg", lambda: part(encoded(photo(), "JPEG"), 0.6), "image_broken"),
    ImageCase("PNG cut short", "png", lambda: part(encoded(photo(), "PNG"), 0.6), "image_broken"),
    ImageCase("WebP cut short", "webp", lambda: part(encoded(photo(), "WEBP"), 0.6), "image_broken"),
    ImageCase("GIF cut short", "gif", lambda: part(encoded(photo(), "GIF"), 0.6), "image_broken"),
    ImageCase("TIFF cut short", "tif", lambda: part(encoded(photo(), "TIFF"), 0.6), "image_broken"),
    ImageCase("AVIF cut short", "avif", lambda: part(encoded(photo(), "AVIF"), 0.6), "image_broken"),
    ImageCase("no bytes", "jpg", lambda: b"", "image_format"),
    ImageCase("zeros", "jpg", lambda: bytes(5_000), "image_format"),
    ImageCase("HTML as .jpg", "jpg", lambda: HTML, "image_format"),
    ImageCase("JSON as .jpg", "jpg", lambda: b'{"error": "forbidden"}', "image_format"),
    ImageCase("SVG as .png", "png", lambda: SVG, "image_format"),
    ImageCase("EPS as .jpg", "jpg", lambda: EPS, "image_format", note="Ghostscript is never started"),
    ImageCase("PDF as .jpg", "jpg", lambda: b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n", "image_format"),
    ImageCase("PNG as .jpg", "jpg", lambda: encoded(photo(), "PNG"), note="the content decides, not the name"),
    ImageCase("JPEG without part of its scan data, with an end mark", "jpg", lambda: cut_with_end_mark(0.5),
              "image_broken", note="libjpeg would paint it grey"),
    ImageCase("the same with restart markers", "jpg", lambda: cut_with_end_mark(0.5, restart_marker_blocks=3),
              "image_broken"),
    ImageCase("progressive JPEG without later scans", "jpg", lambda: cut_with_end_mark(0.9, progressive=True),
              size=(100, 70), note="blurred where data lacks; cannot be told from one that was meant so"),
    ImageCase("JPEG of 600 scans", "jpg", lambda: scan_bomb(600, 64), "image_scans",
              note="`limits.scans`; the time of each adds up to hours"),
    ImageCase("JPEG with junk behind its end", "jpg", lambda: encoded(photo(), "JPEG") + b"junk" * 100,
              note="junk is ignored"),
    ImageCase("PNG with too few scanlines", "png", lambda: png(4, 4, 8, 2, bytes(13) * 3), "image_broken",
              note="Pillow would fill it with black"),
    ImageCase("PNG with a wrong checksum", "png", broken_crc, "image_broken"),
    ImageCase("PNG with a huge iCCP chunk", "png", lambda: huge_chunk(b"iCCP"), "image_broken"),
    ImageCase("PNG with a huge zTXt chunk", "png", lambda: huge_chunk(b"zTXt"), "image_broken"),
    ImageCase("broken ICC profile", "jpg", lambda: encoded(photo(), "JPEG", icc_profile=b"junk" * 99),
              note="profiles are ignored"),
    ImageCase("broken EXIF", "jpg", lambda: encoded(photo(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xffjunk"),
              note="as if it had none"),
    ImageCase("EXIF orientation", "jpg", rotated, size=(30, 40), note="applied"),
    ImageCase("CMYK", "jpg", lambda: encoded(plain((0, 255, 255, 0), "CMYK"), "JPEG"), colour=RED, note="converted"),
    ImageCase("palette with a hidden colour", "png", lambda: hidden("P"), colour=MIXED, note="composited over white"),
    ImageCase("RGBA with a hidden colour", "png", lambda: hidden("RGBA"), colour=MIXED, note="composited over white"),
    ImageCase("LA, transparent", "png", lambda: encoded(plain((0, 0), "LA"), "PNG"), colour=WHITE,
              note="composited over white"),
    ImageCase("16-bit grey", "png", grey_16, colour=GREY, note="divided by 257"),
    ImageCase("1 bit", "png", lambda: bit_png(40, 30), colour=WHITE, note="black and white"),
    ImageCase("animated GIF", "gif", lambda: animated("GIF"), colour=RED, note="its first frame"),
    ImageCase("animated WebP", "webp", lambda: animated("WEBP"), colour=RED, note="its first frame"),
    ImageCase("animated PNG", "png", lambda: animated("PNG"), colour=RED, note="its first frame"),
    ImageCase("TIFF of several pages", "tif", lambda: encoded(plain(RED), "TIFF", save_all=True,
              append_images=[plain(BLACK)]), colour=RED, note="its first page"),
    ImageCase("AVIF", "avif", lambda: encoded(plain(RED), "AVIF"), colour=RED, note="read"),
    ImageCase("BMP", "bmp", lambda: encoded(plain(RED), "BMP"), colour=RED, note="read"),
    ImageCase("JPEG 2000", "jpg", lambda: encoded(photo(), "JPEG2000"), "image_format"),
    ImageCase("just under limits.pixels", "png", lambda: bit_png(9_459, 9_459), size=(9_459, 9_459), note="decoded"),
    ImageCase("just over limits.pixels", "png", lambda: bit_png(9_460, 9_460), "image_pixels",
              note="by the header, not decoded"),
    ImageCase("2^31 by 2^31 pixels", "png", lambda: png(2**31 - 1, 2**31 - 1, 8, 2, b""), "image_pixels"),
    ImageCase("no pixels", "png", lambda: png(0, 5, 8, 2, b""), "image_broken"),
    ImageCase("GIF frame larger than its canvas", "gif", large_frame, "image_pixels"),
    ImageCase("1 by 16000", "png", lambda: bit_png(1, 16_000), "image_aspect"),
    ImageCase("16000 by 1", "png", lambda: bit_png(16_000, 1), "image_aspect"),
    ImageCase("1 pixel", "png", lambda: bit_png(1, 1), size=(1, 1), note="read"),
    ImageCase("more than limits.image_bytes", "jpg", lambda: bytes(IMAGE_BYTES + 1), "image_bytes", note="not read"),
]  # fmt: skip
