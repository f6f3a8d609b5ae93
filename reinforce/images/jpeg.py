"""JPEGs: common ones decoded by simplejpeg where it is installed, and those with missing scan data detected; PNGs whose
pixel data ends early or is damaged.

simplejpeg gives the pixels of Pillow for less CPU: both use libjpeg-turbo with its default transform and upsampling.
Everything else than an RGB JPEG without warnings that is decoded at its size is left to Pillow.

libjpeg fills in missing scan data with grey and only warns, and Pillow hides the warning. simplejpeg's strict mode
refuses such JPEGs, and also images that datasets contain: those with stray bytes before a marker, with damaged codes
after which decoding continues, and progressive ones whose later scans are missing.

Of PNGs, Pillow leaves missing rows at zero, and checks no checksum. Their chunks are those of the PNG specification
(W3C), sections 5.3 and 11.
"""

from __future__ import annotations

import functools
import io
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image, JpegImagePlugin

_PIXEL_BYTES = 4  # that Pillow has for an RGB pixel
_MARKER = re.compile(rb"\xff[^\x00\xff]")
_SOS, _EOI, _TEM, _DRI = 0xDA, 0xD9, 0x01, 0xDD
_RESTARTS = range(0xD0, 0xD8)
_FILL = 0xFF  # any number of it may come before a marker
_BLOCK = 8  # side in pixels of a block at full size
#: Bytes without a marker. As scan data, they decode to something other than grey.
_NOISE = bytes(1 + (i * i * 31 + i * 17) % 253 for i in range(64))


def load(image: Image.Image, data: bytes) -> bool:
    """Load the pixels of a JPEG that Pillow has opened from ``data``. Returns False where Pillow must load them."""
    if type(image) is not JpegImagePlugin.JpegImageFile or image.mode != "RGB" or "progressive" in image.info:
        return False
    if image.decoderconfig:  # it is decoded at a fraction of its size
        return False
    if (decoder := _load_decoder()) is None:
        return False
    pixels = _decode(decoder, data, image.size)
    if pixels is None:
        return False
    image.im = pixels.im
    image.tile = []
    return True


@functools.cache
def _load_decoder() -> Any:
    """The module simplejpeg; None if it is missing, or its pixels are not Pillow's."""
    try:
        import simplejpeg
    except ImportError:
        return None
    values = np.arange(3 * 45 * 35, dtype=np.uint32) ** 2 * np.uint32(2654435761) >> np.uint32(24)
    image = Image.fromarray(values.astype(np.uint8).reshape(35, 45, 3))
    for subsampling in ("4:4:4", "4:2:2", "4:2:0"):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", subsampling=subsampling, quality=90)
        pixels = _decode(simplejpeg, buffer.getvalue(), image.size)
        if pixels is None or pixels.tobytes() != Image.open(buffer).tobytes():
            return None
    return simplejpeg


def _decode(decoder: Any, data: bytes, size: tuple[int, int]) -> Image.Image | None:
    """The RGB pixels, in memory that is not copied; None after a warning or for an image of another size."""
    try:
        height, width, *_ = decoder.decode_jpeg_header(data)
        if (width, height) != size:
            return None
        pixels = decoder.decode_jpeg(data, colorspace="RGBX", strict=True)
    except ValueError:  # a warning or an error of libjpeg
        return None
    values = pa.Array.from_buffers(pa.uint8(), pixels.size, [None, pa.py_buffer(pixels)])
    return Image.fromarrow(pa.FixedSizeListArray.from_arrays(values, _PIXEL_BYTES), "RGB", size)


def lacks_scan_data(image: Image.Image, data: bytes, decode: Callable[[bytes], Image.Image]) -> bool:
    """Return whether scan data is missing from the JPEG ``data``.

    Where the data ends early, libjpeg reads zeros, and the blocks become flat at mid-grey. An image that has such a
    block is decoded again with noise after its scan data. A complete image does not change, because nothing is read
    after its last block. Missing later scans of a progressive JPEG are not detected: the image is only blurred.

    ``image`` is what ``data`` was decoded to, in its original mode, maybe at a fraction of its size; ``decode`` decodes
    bytes at their size, where noise changes more pixels.
    """
    restarts = bytes((0xFF, _DRI)) in data and any(marker == _DRI for marker, _ in _segments(data))
    if not _has_flat_block(image, restarts):
        return False
    try:
        full = image if _block_side(image) == _BLOCK else decode(data)
        return decode(_with_noise(data)).tobytes() != full.tobytes()
    except Exception:  # the noise was read, so data is missing
        return True


def ends_in_zeros(data: bytes) -> bool:
    """Return whether a JPEG ends with zeros in its last scan, without an end mark: libjpeg decodes them as pixels."""
    if not data.endswith(bytes(2)):  # one may be the end of scan data
        return False
    scan = max((end for marker, end in _segments(data) if marker == _SOS), default=0)
    return all(data[found.start() + 1] in _RESTARTS for found in _MARKER.finditer(data, scan))


def _has_flat_block(image: Image.Image, restarts: bool) -> bool:
    """Return whether the last block is mid-grey, or with restart markers any block."""
    if not restarts:
        pixel = image.getpixel((image.width - 1, image.height - 1))
        values = pixel if isinstance(pixel, tuple) else (pixel,)
        return all(value in (127, 128) for value in values)  # 127 where they are inverted, as in CMYK
    side = _block_side(image)
    pixels = np.asarray(image).reshape(image.height, image.width, -1)[side // 2 :: side, side // 2 :: side]
    return bool(((pixels == 127) | (pixels == 128)).all(axis=-1).any()) or _has_flat_block(image, restarts=False)


def _block_side(image: Image.Image) -> int:
    """Side in pixels of a block at the size at which the JPEG was decoded."""
    config = getattr(image, "decoderconfig", None)  # (divisor of the size, quality) after ``draft``
    return _BLOCK // config[0] if config else _BLOCK


def _with_noise(data: bytes) -> bytes:
    """Insert noise after each segment of scan data, and further restart intervals of noise at the end of each scan."""
    parts: list[bytes] = []
    copied = restarts = 0
    for begin in (begin for marker, begin in _segments(data) if marker == _SOS):
        for found in _MARKER.finditer(data, begin):
            end = found.start()
            while data[end - 1] == _FILL:
                end -= 1
            parts += [data[copied:end], _NOISE]
            copied = end
            if data[found.start() + 1] not in _RESTARTS:
                parts += [bytes((0xFF, _RESTARTS[(restarts + i) % 8])) + _NOISE for i in range(8)]
                restarts = 0
                break
            restarts += 1
    return b"".join([*parts, data[copied:]])


def _segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield (marker, end) of each marker segment before the end of the image; scan data is skipped."""
    position = 2
    while found := _MARKER.search(data, position):
        position, marker = found.start(), data[found.start() + 1]
        if marker == _EOI:
            return
        if marker == _TEM or marker in _RESTARTS:
            position += 2
            continue
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        yield marker, end
        position = end


_SIGNATURE_BYTES = 8
_INFLATE_BYTES = 2**16
#: Samples per pixel by colour type.
_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
#: Passes of an interlaced PNG: first column, first row, column step, row step.
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


class Header(NamedTuple):
    """The IHDR chunk."""

    width: int
    height: int
    depth: int  # bits per sample
    colour: int  # colour type: 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA
    compression: int
    filter: int
    interlace: int  # 0, or 1 for Adam7


def header(data: bytes) -> Header:
    return Header._make(struct.unpack(">IIBBBBB", next(body for kind, body, _ in _chunks(data) if kind == b"IHDR")))


def missing_bytes(image: Image.Image, data: bytes) -> int:
    """Count the bytes of pixel data that the PNG ``data`` lacks; ``image`` is what Pillow decoded from it.

    Rows are stored in order, so a last row that is not all zero proves that none is missing. Otherwise the data is
    decompressed a second time to count its bytes.
    """
    ihdr = header(data)
    last_row = image.crop((0, image.height - 1, image.width, image.height)).tobytes()
    if ihdr.interlace == 0 and last_row.strip(b"\0"):
        return 0
    bits = ihdr.depth * _SAMPLES[ihdr.colour]
    missing = 0  # of the bytes of the decompressed scanlines, each with its filter byte
    for x, y, step_x, step_y in _ADAM7 if ihdr.interlace else ((0, 0, 1, 1),):
        columns, rows = len(range(x, ihdr.width, step_x)), len(range(y, ihdr.height, step_y))
        missing += rows * (1 + (columns * bits + 7) // 8) if columns else 0
    inflate = zlib.decompressobj()
    for body in (body for kind, body, _ in _chunks(data) if kind == b"IDAT"):
        pending: bytes | memoryview = body
        while missing > 0 and len(pending):
            missing -= len(inflate.decompress(pending, _INFLATE_BYTES))
            pending = inflate.unconsumed_tail
    missing -= len(inflate.flush()) if missing > 0 else 0
    return max(missing, 0)


def damage(data: bytes) -> str | None:
    """The sign that the PNG ``data`` is damaged, a wrong checksum of pixel data or no end; or None."""
    for kind, body, checksum in _chunks(data):
        if kind == b"IEND":
            return None
        if kind == b"IDAT" and zlib.crc32(body, zlib.crc32(kind)) != checksum:
            return "a part of the PNG's pixel data does not have its checksum"
    return "the PNG has no end"


def _chunks(data: bytes) -> Iterator[tuple[bytes, memoryview, int]]:
    """Yield (type, data, checksum) of each chunk; what is cut off is shorter."""
    view = memoryview(data)
    position = _SIGNATURE_BYTES
    while position + 8 <= len(data):
        length, kind = struct.unpack(">I4s", view[position : position + 8])
        end = position + 8 + length
        yield kind, view[position + 8 : end], int.from_bytes(view[end : end + 4], "big")
        position += 12 + length
