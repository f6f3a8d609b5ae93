"""The image policy: how the bytes of an encoded image become RGB pixels, or a refusal with its reason."""

from __future__ import annotations

import contextlib
import functools
import io
import struct
import threading
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFile

from reinforce.config import Config, Limits
from reinforce.errors import UserError
from reinforce.source.jpeg import lacks_scan_data
from schemas import Reason

#: Name and version of what :func:`decode` does to pixels; recorded in dataset.json.
IMAGE_POLICY = "rgb-1"
#: Likewise, of images whose published augmentations were made by Pillow's ``convert("RGB")`` alone.
PUBLISHED_POLICY = "pillow-rgb-1"

#: Formats that are read, by Pillow's names, in the order in which they are tried.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")

_WHITE = (255, 255, 255)
_STRIP_PIXELS = 2**20
_LARGE_PIXELS = 16 * 2**20
_large = threading.Lock()  # a large image takes up to a gigabyte while it is decoded: one of them at a time
_START_OF_SCAN = b"\xff\xda"  # of a JPEG
_ORIENTATION = 0x0112  # EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def image_policy(config: Config) -> str:
    """The policy by which a run turns images into RGB: for published reinforcements, the one that made them."""
    return IMAGE_POLICY if config.reinforcements is None else PUBLISHED_POLICY


class ImageRefused(Exception):
    """The image cannot be had; ``reason`` is one of the IMAGE_ reasons."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason.value}: {detail}")
        self.reason = reason
        self.detail = detail


def decode(data: bytes, limits: Limits, strict: bool = False, policy: str = IMAGE_POLICY) -> Image.Image:
    """An encoded image as RGB, upright, in its own size: policy ``rgb-1``.

    - The content decides the format, not the name. Size and aspect are checked by the header, before decoding.
    - Of an animation the first frame. EXIF orientation is applied. Transparent pixels are composited over white.
    - 16-bit grey is divided by 257; 32-bit and float grey is scaled so that white is the first of 1 (float),
      255, 65535 and the image's maximum that no pixel exceeds, with negative and NaN pixels black.
    - CMYK, YCbCr, LAB, HSV and 1-bit images are converted as Pillow does.
    - ICC profiles are ignored: most are sRGB, and a broken one must not matter.

    ``strict`` says that the image is met for the first time and not stored yet: then a JPEG is refused, too, that
    has an end mark and too little data before it, which libjpeg mends by itself, or scans enough to keep it busy for
    hours. What is stored stays readable.
    By ``policy`` ``pillow-rgb-1`` pixels become what ``Image.convert("RGB")`` makes of them instead: as they lie in the
    file, whatever EXIF says, and without regard to transparency.
    Raises ImageRefused, also for truncated data. Thread-safe.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise UserError("PIL.ImageFile.LOAD_TRUNCATED_IMAGES is on, so broken images would pass. Leave it off.")
    try:
        image = _open(data)
        _check_size(image.size, limits)
        is_jpeg = image.format in ("JPEG", "MPO")
        if strict and is_jpeg and (scans := data.count(_START_OF_SCAN)) > limits.scans:
            raise ImageRefused(Reason.IMAGE_SCANS, f"{scans} scans, above limits.scans of {limits.scans}")
        with _large if image.width * image.height > _LARGE_PIXELS else contextlib.nullcontext():
            image.load()
            _check_size(image.size, limits)  # a first frame may enlarge the canvas
            if image.format == "PNG":
                _check_png_complete(image, data)
            elif strict and is_jpeg and lacks_scan_data(image, data, _loaded):
                raise ImageRefused(Reason.IMAGE_BROKEN, "the JPEG lacks scan data")
            if policy == PUBLISHED_POLICY:
                image = image.convert("RGBA") if image.mode == "P" else image  # the same colours without a warning
                return image if image.mode == "RGB" else image.convert("RGB")
            return _upright(_to_rgb(image, data), image)
    except ImageRefused:
        raise
    except Image.DecompressionBombError as error:
        raise ImageRefused(Reason.IMAGE_PIXELS, _describe(error)) from error
    except Exception as error:  # decoders raise whatever a broken file leads them to
        raise ImageRefused(Reason.IMAGE_BROKEN, _describe(error)) from error


def _loaded(data: bytes) -> Image.Image:
    image = _open(data)
    image.load()
    return image


@functools.cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]  # AVIF depends on how Pillow was built


def _open(data: bytes) -> Image.Image:
    """Parse the header. As ``Image.open`` does, less its process-wide pixel limit: ours decides.

    Pillow's WebP and TIFF plugins keep a ceiling of their own, twice ``Image.MAX_IMAGE_PIXELS``.
    """
    faults = []
    for name in _formats():
        factory, accept = Image.OPEN[name]
        accepted = accept(data[:16]) if accept else True
        if isinstance(accepted, str):  # known to Pillow, but this build lacks the decoder
            raise ImageRefused(Reason.IMAGE_FORMAT, accepted)
        if accepted:
            try:
                return factory(io.BytesIO(data), "")
            except (SyntaxError, IndexError, TypeError, struct.error) as error:  # what plugins say "not mine" with
                faults.append(f"{name}: {error}")
    if faults:
        raise ImageRefused(Reason.IMAGE_BROKEN, "; ".join(faults)[:200])
    raise ImageRefused(Reason.IMAGE_FORMAT, f"no known format, begins with {data[:8]!r}" if data else "no data")


def _check_size(size: tuple[int, int], limits: Limits) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageRefused(Reason.IMAGE_BROKEN, f"{width}x{height} pixels")
    if width * height > limits.pixels:
        raise ImageRefused(Reason.IMAGE_PIXELS, f"{width}x{height} pixels, above limits.pixels of {limits.pixels}")
    if max(size) > limits.aspect * min(size):
        raise ImageRefused(Reason.IMAGE_ASPECT, f"{width}x{height} pixels, above limits.aspect of {limits.aspect:g}")


def _to_rgb(image: Image.Image, data: bytes) -> Image.Image:
    """A loaded image in its own mode -> RGB."""
    if image.mode == "F" or image.mode.startswith("I"):
        return _grey_to_rgb(image)
    transparency = image.info.get("transparency")
    if image.mode == "La":  # Pillow goes from premultiplied grey to LA alone
        image = image.convert("LA")
    if transparency is None and image.mode not in ("LA", "PA", "RGBA", "RGBa"):
        return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it
    if transparency is not None and image.format == "PNG" and image.mode in ("L", "RGB"):
        image.info["transparency"] = _in_8_bits(transparency, _png_header(data).depth)
    white = Image.new("RGB", image.size, _WHITE)
    for top, strip in _strips(image):
        rgba = strip.convert("RGBA")
        white.paste(rgba, (0, top), mask=rgba.getchannel("A"))
    return white


def _in_8_bits(colour: int | tuple[int, ...], depth: int) -> int | tuple[int, ...]:
    """A PNG's transparent colour at the depth that Pillow has brought the pixels to."""
    if isinstance(colour, tuple):
        return tuple(sample >> 8 if depth == 16 else sample for sample in colour)
    return colour * 255 // (2**depth - 1)


def _grey_to_rgb(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits -> RGB."""
    grey = Image.new("L", image.size)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):  # 16 bits by format
        transparency = image.info.get("transparency")
        for top, pixels in _pixels(image):
            values = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
            if isinstance(transparency, int):
                values[pixels == transparency] = 255
            grey.paste(Image.fromarray(values), (0, top))
    else:
        most = max(float(pixels.max(where=np.isfinite(pixels), initial=0)) for _, pixels in _pixels(image))
        ceilings = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        white = next((ceiling for ceiling in ceilings if most <= ceiling), most)
        for top, pixels in _pixels(image):
            scaled = np.nan_to_num(pixels.astype(np.float64), nan=0.0, posinf=white, neginf=0.0) * (255 / white)
            grey.paste(Image.fromarray(scaled.clip(0, 255).round().astype(np.uint8)), (0, top))
    return grey.convert("RGB")


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """The image a few rows at a time, each strip with its first row: what is made in between takes much memory."""
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _pixels(image: Image.Image) -> Iterator[tuple[int, np.ndarray]]:
    return ((top, np.asarray(strip)) for top, strip in _strips(image))


def _upright(rgb: Image.Image, original: Image.Image) -> Image.Image:
    try:
        orientation = original.getexif().get(_ORIENTATION)
    except Exception:  # broken EXIF must not cost the image
        return rgb
    method = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return rgb if method is None else rgb.transpose(method)


class _PngHeader(NamedTuple):
    width: int
    height: int
    depth: int  # bits of a sample
    colour: int  # type: 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA
    compression: int
    filter: int
    interlace: int  # 0, or 1 for Adam7


def _check_png_complete(image: Image.Image, data: bytes) -> None:
    """Refuse a PNG whose pixel data is well formed but ends early: Pillow leaves the rows it lacks at zero.

    Rows come in order, so a last row that is not all zero proves the others; only else is the data inflated
    once more, to count it.
    """
    header = _png_header(data)
    last_row = image.crop((0, image.height - 1, image.width, image.height)).tobytes()
    if header.interlace == 0 and last_row.strip(b"\0"):
        return
    bits = header.depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[header.colour]
    missing = 0
    for x, y, step_x, step_y in _ADAM7 if header.interlace else ((0, 0, 1, 1),):
        columns, rows = len(range(x, header.width, step_x)), len(range(y, header.height, step_y))
        missing += rows * (1 + (columns * bits + 7) // 8) if columns else 0
    inflate = zlib.decompressobj()
    for body in (body for kind, body in _png_chunks(data) if kind == b"IDAT"):
        pending: bytes | memoryview = body
        while missing > 0 and len(pending):
            missing -= len(inflate.decompress(pending, 2**16))
            pending = inflate.unconsumed_tail
    missing -= len(inflate.flush()) if missing > 0 else 0
    if missing > 0:
        raise ImageRefused(Reason.IMAGE_BROKEN, f"the PNG lacks {missing} bytes of pixel data")


#: First column and row, and steps, of the passes of an interlaced PNG.
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def _png_header(data: bytes) -> _PngHeader:
    return _PngHeader._make(
        struct.unpack(">IIBBBBB", next(body for kind, body in _png_chunks(data) if kind == b"IHDR"))
    )


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    view = memoryview(data)
    at = 8
    while at + 8 <= len(data):
        length, kind = struct.unpack(">I4s", view[at : at + 8])
        yield kind, view[at + 8 : at + 8 + length]
        at += 12 + length


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200].encode("utf-8", "replace").decode()
