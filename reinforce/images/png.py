"""Detect PNGs whose pixel data ends early or is damaged: Pillow leaves missing rows at zero, and checks no checksum.

The chunks are those of the PNG specification (W3C), sections 5.3 and 11.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from PIL import Image

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
    missing = _expected_bytes(ihdr)
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


def _expected_bytes(ihdr: Header) -> int:
    """Bytes of the decompressed scanlines, each with its filter byte."""
    bits = ihdr.depth * _SAMPLES[ihdr.colour]
    total = 0
    for x, y, step_x, step_y in _ADAM7 if ihdr.interlace else ((0, 0, 1, 1),):
        columns, rows = len(range(x, ihdr.width, step_x)), len(range(y, ihdr.height, step_y))
        total += rows * (1 + (columns * bits + 7) // 8) if columns else 0
    return total


def _chunks(data: bytes) -> Iterator[tuple[bytes, memoryview, int]]:
    """Yield (type, data, checksum) of each chunk; what is cut off is shorter."""
    view = memoryview(data)
    position = _SIGNATURE_BYTES
    while position + 8 <= len(data):
        length, kind = struct.unpack(">I4s", view[position : position + 8])
        end = position + 8 + length
        yield kind, view[position + 8 : end], int.from_bytes(view[end : end + 4], "big")
        position += 12 + length
