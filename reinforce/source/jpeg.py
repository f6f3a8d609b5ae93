"""Whether a JPEG has all of its scan data: libjpeg paints what it lacks grey and only warns, which Pillow hides."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

_MARKER = re.compile(rb"\xff[^\x00\xff]")
_SOS, _EOI, _TEM, _DRI = 0xDA, 0xD9, 0x01, 0xDD
_RESTARTS = range(0xD0, 0xD8)
#: Noise without a marker in it. Decoded as scan data, it paints something else than grey.
_NOISE = bytes(1 + (i * i * 31 + i * 17) % 253 for i in range(64))


def lacks_scan_data(image: Image.Image, data: bytes, decoded: Callable[[bytes], Image.Image]) -> bool:
    """Whether scan data is missing from the JPEG ``data``, whose pixels in its own mode ``image`` holds.

    Where data ends early, libjpeg reads zeros: the blocks become flat, at the middle of the range. An image that has
    such a block is decoded once more with noise behind its data: a whole one does not change, since nothing is read
    beyond its last block. ``decoded`` decodes. Not told are later scans of a progressive JPEG that are missing: it is
    blurred then, as one that was meant so.
    """
    if not _has_flat_block(image, restarts=_has_restarts(data)):
        return False
    try:
        return decoded(_noisy(data)).tobytes() != image.tobytes()
    except Exception:  # whatever the noise led to, it was read
        return True


def _has_flat_block(image: Image.Image, restarts: bool) -> bool:
    """Whether a block may be one that lacks data: the last one, or with restart markers any."""
    if not restarts:
        pixel = image.getpixel((image.width - 1, image.height - 1))
        return all(_is_middle(value) for value in (pixel if isinstance(pixel, tuple) else (pixel,)))
    pixels = np.asarray(image).reshape(image.height, image.width, -1)[4::8, 4::8]
    return bool(((pixels == 127) | (pixels == 128)).all(axis=-1).any()) or _has_flat_block(image, restarts=False)


def _is_middle(value: float | None) -> bool:
    return value in (127, 128)  # inverted, as in CMYK, or not


def _noisy(data: bytes) -> bytes:
    """The JPEG with noise behind each piece of scan data, and at the end of each scan behind further restarts."""
    parts: list[bytes] = []
    copied = restarts = 0
    for end, marker in _scan_ends(data):
        parts += [data[copied:end], _NOISE]
        if marker in _RESTARTS:
            restarts += 1
        else:
            parts += [bytes((0xFF, _RESTARTS[(restarts + i) % 8])) + _NOISE for i in range(8)]
            restarts = 0
        copied = end
    return b"".join([*parts, data[copied:]])


def _has_restarts(data: bytes) -> bool:
    return any(marker == _DRI for marker, _ in _segments(data))


def _scan_ends(data: bytes) -> Iterator[tuple[int, int]]:
    """Where each piece of scan data ends, and the marker that ends it."""
    for marker, begin in _segments(data):
        if marker == _SOS:
            for found in _MARKER.finditer(data, begin):
                yield found.start(), data[found.start() + 1]
                if data[found.start() + 1] not in _RESTARTS:
                    break


def _segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Marker and end of each segment up to the end of the image; scan data is passed over."""
    at = 2
    while found := _MARKER.search(data, at):
        at, marker = found.start(), data[found.start() + 1]
        if marker == _EOI:
            return
        if marker == _TEM or marker in _RESTARTS:
            at += 2
            continue
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        yield marker, end
        at = end
