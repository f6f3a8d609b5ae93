"""Images for tests, drawn and encoded in memory."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

#: Options with which JPEGs are written.
JPEGS: list[dict[str, Any]] = [{}, {"subsampling": 0}, {"restart_marker_blocks": 3}, {"optimize": True, "quality": 95}]


def noise(width: int = 40, height: int = 30, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def encode(image: Image.Image, format_: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def raw_png(
    width: int, height: int, depth: int, colour: int, scanlines: bytes, *extra: bytes, interlace: int = 0
) -> bytes:
    """A PNG of raw scanlines, each with its filter byte; ``extra`` chunks precede the pixel data."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    chunks = [
        png_chunk(b"IHDR", header), *extra, png_chunk(b"IDAT", zlib.compress(scanlines)), png_chunk(b"IEND", b"")
    ]  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def scan_of(data: bytes) -> tuple[int, int]:
    """Offsets of the first scan data of a JPEG and of its end mark."""
    start = data.index(b"\xff\xda")
    return start + 2 + int.from_bytes(data[start + 2 : start + 4], "big"), len(data) - 2


def without_scan_data(data: bytes, share: float) -> bytes:
    """The JPEG with that share of its scan data, and an end mark."""
    start, end = scan_of(data)
    return data[: start + int((end - start) * share)] + b"\xff\xd9"
