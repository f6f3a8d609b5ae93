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


def noise(width: int = 40, height: int = 30, mode: str = "RGB", seed: int = 0, saturated: bool = False) -> Image.Image:
    """Random pixels; ``saturated`` ones are 0 or 255, so that filters overshoot."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values // 128 * 255 if saturated else values).convert(mode)


def natural(width: int, height: int, seed: int = 0) -> Image.Image:
    """RGB pixels with the spectrum of a photograph."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3))
    for octave in range(2, 7):
        cells = rng.normal(size=(2**octave, 2**octave, 3)).astype(np.float32)
        for channel in range(3):
            layer = Image.fromarray(cells[..., channel]).resize((width, height), Image.Resampling.BICUBIC)
            pixels[..., channel] += np.asarray(layer) / 2**octave
    pixels = 128 + pixels * (50 / pixels.std()) + rng.normal(0, 4, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


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
