"""Images with the defects of web data, and the expected outcome of a run for each."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from tests.helpers.images import encode, noise, png_chunk, raw_png

WHITE, RED, GREEN, BLACK, GREY = (255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 0), (128, 128, 128)
IMAGE_BYTES = 1_500_000  # limits.image_bytes of the run


@dataclass(frozen=True)
class ImageCase:
    """``refused`` is the reason if the image is refused; otherwise its row has this ``size`` and mean ``colour``."""

    defect: str
    extension: str
    data: Callable[[], bytes]
    refused: str | None = None
    size: tuple[int, int] = (40, 30)
    colour: tuple[int, int, int] | None = None
    note: str = ""

    @property
    def outcome(self) -> str:
        if self.refused:
            return f"`{self.refused}`" + (f": {self.note}" if self.note else "")
        return f"kept: {self.note}"


def scan_bomb(scans: int, side: int = 4096) -> bytes:
    """A progressive JPEG of a few kilobytes that repeats a scan over all blocks."""
    data = encode(Image.new("L", (side, side), 200), "JPEG", progressive=True)
    start = data.rindex(b"\xff\xc4")  # the tables of the last scan, followed by the scan and the end mark
    return data[:-2] + data[start:-2] * scans + b"\xff\xd9"


def plain(colour: tuple[int, ...] | int, mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.new(mode, size, colour)


def cut(data: bytes, share: float) -> bytes:
    return data[: int(len(data) * share)]


def bit_png(width: int, height: int) -> bytes:
    """A white image of 1 bit per pixel: a few kilobytes for any number of pixels."""
    return raw_png(width, height, 1, 0, (b"\0" + b"\xff" * ((width + 7) // 8)) * height)


def hidden(mode: str) -> bytes:
    """Opaque red next to transparent green, which must not be visible."""
    image = plain((*RED, 255), "RGBA")
    image.paste((*GREEN, 0), (20, 0, 40, 30))
    if mode == "RGBA":
        return encode(image, "PNG")
    palette = Image.new("P", (40, 30), 0)
    palette.putpalette([*RED, *GREEN])
    palette.paste(1, (20, 0, 40, 30))
    return encode(palette, "PNG", transparency=1)


def cut_with_end_mark(share: float, **options: object) -> bytes:
    data = encode(noise(100, 70), "JPEG", **options)
    start = data.index(b"\xff\xda")
    cut = start + int((len(data) - start) * share)
    return data[: cut - (data[cut - 1] == 0xFF)] + b"\xff\xd9"


def animated(format_: str) -> bytes:
    frames = [plain(colour) for colour in (RED, BLACK, GREEN)]
    return encode(frames[0], format_, save_all=True, append_images=frames[1:], lossless=True)


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(noise(), "JPEG", exif=exif)


def grey_16() -> bytes:
    return encode(Image.fromarray(np.full((30, 40), 0x8080, np.uint16)), "PNG")


def broken_crc() -> bytes:
    data = bytearray(encode(noise(), "PNG"))
    data[data.index(b"IDAT") + 20] ^= 0xFF
    return bytes(data)


def zeroed(data: bytes) -> bytes:
    kept = len(data) * 3 // 4
    return data[:kept] + bytes(len(data) - kept)


def large_frame() -> bytes:
    data = bytearray(encode(Image.new("P", (12_000, 9_000), 1), "GIF"))
    data[6:10] = struct.pack("<HH", 2, 2)
    return bytes(data)


def huge_chunk(kind: bytes) -> bytes:
    return raw_png(1, 1, 8, 0, b"\0\1", png_chunk(kind, b"a\0\0" + zlib.compress(bytes(50 * 2**20))))


HTML = b"<!DOCTYPE html><html><head><title>404</title></head><body>Not Found</body></html>"
SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>'
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/tmp/x) (w) file closefile showpage\n%%EOF\n"
MIXED = (255, 127, 127)  # half red, half white

IMAGES = [
    ImageCase("JPEG cut short", "jpg", lambda: cut(encode(noise(), "JPEG"), 0.6), "image_broken"),
    ImageCase("PNG cut short", "png", lambda: cut(encode(noise(), "PNG"), 0.6), "image_broken"),
    ImageCase("WebP cut short", "webp", lambda: cut(encode(noise(), "WEBP"), 0.6), "image_broken"),
    ImageCase("GIF cut short", "gif", lambda: cut(encode(noise(), "GIF"), 0.6), "image_broken"),
    ImageCase("TIFF cut short", "tif", lambda: cut(encode(noise(), "TIFF"), 0.6), "image_broken"),
    ImageCase("AVIF cut short", "avif", lambda: cut(encode(noise(), "AVIF"), 0.6), "image_broken"),
    ImageCase("no bytes", "jpg", lambda: b"", "image_format"),
    ImageCase("zeros", "jpg", lambda: bytes(5_000), "image_format"),
    ImageCase("HTML as .jpg", "jpg", lambda: HTML, "image_format"),
    ImageCase("JSON as .jpg", "jpg", lambda: b'{"error": "forbidden"}', "image_format"),
    ImageCase("SVG as .png", "png", lambda: SVG, "image_format"),
    ImageCase("EPS as .jpg", "jpg", lambda: EPS, "image_format", note="Ghostscript is never started"),
    ImageCase("PDF as .jpg", "jpg", lambda: b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n", "image_format"),
    ImageCase("PNG as .jpg", "jpg", lambda: encode(noise(), "PNG"), note="the format is detected from the content"),
    ImageCase("JPEG that lacks scan data, with an end mark", "jpg", lambda: cut_with_end_mark(0.5),
              "image_broken", note="libjpeg would fill it with grey"),
    ImageCase("JPEG that lacks scan data, with restart markers", "jpg",
              lambda: cut_with_end_mark(0.5, restart_marker_blocks=3), "image_broken"),
    ImageCase("progressive JPEG without later scans", "jpg", lambda: cut_with_end_mark(0.9, progressive=True),
              size=(100, 70), note="blurred where data is missing; looks like a blurred image"),
    ImageCase("JPEG of 600 scans", "jpg", lambda: scan_bomb(600, 64), "image_scans",
              note="above `limits.scans`; many scans can take hours to decode"),
    ImageCase("JPEG that ends in zeros", "jpg", lambda: zeroed(encode(noise(), "JPEG")), "image_broken"),
    ImageCase("PNG that ends in zeros", "png", lambda: zeroed(encode(noise().quantize(4), "PNG")), "image_broken"),
    ImageCase("BMP that ends in zeros", "bmp", lambda: zeroed(encode(noise(), "BMP")),
              note="cannot be seen: the format has no checksum"),
    ImageCase("JPEG with junk after its end", "jpg", lambda: encode(noise(), "JPEG") + b"junk" * 100,
              note="the junk is ignored"),
    ImageCase("PNG with too few scanlines", "png", lambda: raw_png(4, 4, 8, 2, bytes(13) * 3), "image_broken",
              note="Pillow would fill it with black"),
    ImageCase("PNG with a wrong checksum", "png", broken_crc, "image_broken"),
    ImageCase("PNG with a huge iCCP chunk", "png", lambda: huge_chunk(b"iCCP"), "image_broken"),
    ImageCase("PNG with a huge zTXt chunk", "png", lambda: huge_chunk(b"zTXt"), "image_broken"),
    ImageCase("broken ICC profile", "jpg", lambda: encode(noise(), "JPEG", icc_profile=b"junk" * 99),
              note="profiles are ignored"),
    ImageCase("broken EXIF data", "jpg", lambda: encode(noise(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xffjunk"),
              note="ignored"),
    ImageCase("EXIF orientation", "jpg", rotated, size=(30, 40), note="applied"),
    ImageCase("CMYK", "jpg", lambda: encode(plain((0, 255, 255, 0), "CMYK"), "JPEG"), colour=RED, note="converted"),
    ImageCase("palette with a hidden colour", "png", lambda: hidden("P"), colour=MIXED, note="composited over white"),
    ImageCase("RGBA with a hidden colour", "png", lambda: hidden("RGBA"), colour=MIXED, note="composited over white"),
    ImageCase("LA, transparent", "png", lambda: encode(plain((0, 0), "LA"), "PNG"), colour=WHITE,
              note="composited over white"),
    ImageCase("16-bit grey", "png", grey_16, colour=GREY, note="divided by 257"),
    ImageCase("1 bit", "png", lambda: bit_png(40, 30), colour=WHITE, note="converted to black and white"),
    ImageCase("animated GIF", "gif", lambda: animated("GIF"), colour=RED, note="its first frame"),
    ImageCase("animated WebP", "webp", lambda: animated("WEBP"), colour=RED, note="its first frame"),
    ImageCase("animated PNG", "png", lambda: animated("PNG"), colour=RED, note="its first frame"),
    ImageCase("TIFF of several pages", "tif", lambda: encode(plain(RED), "TIFF", save_all=True,
              append_images=[plain(BLACK)]), colour=RED, note="its first page"),
    ImageCase("AVIF", "avif", lambda: encode(plain(RED), "AVIF"), colour=RED, note="decoded"),
    ImageCase("BMP", "bmp", lambda: encode(plain(RED), "BMP"), colour=RED, note="decoded"),
    ImageCase("JPEG 2000", "jpg", lambda: encode(noise(), "JPEG2000"), "image_format"),
    ImageCase("just under limits.pixels", "png", lambda: bit_png(9_459, 9_459), size=(9_459, 9_459), note="decoded"),
    ImageCase("just over limits.pixels", "png", lambda: bit_png(9_460, 9_460), "image_pixels",
              note="checked against the header; not decoded"),
    ImageCase("2^31 by 2^31 pixels", "png", lambda: raw_png(2**31 - 1, 2**31 - 1, 8, 2, b""), "image_pixels"),
    ImageCase("no pixels", "png", lambda: raw_png(0, 5, 8, 2, b""), "image_broken"),
    ImageCase("GIF frame larger than its canvas", "gif", large_frame, "image_pixels"),
    ImageCase("1 by 16000", "png", lambda: bit_png(1, 16_000), "image_aspect"),
    ImageCase("16000 by 1", "png", lambda: bit_png(16_000, 1), "image_aspect"),
    ImageCase("1 pixel", "png", lambda: bit_png(1, 1), size=(1, 1), note="decoded"),
    ImageCase("more than limits.image_bytes", "jpg", lambda: bytes(IMAGE_BYTES + 1), "image_bytes", note="not read"),
]  # fmt: skip
