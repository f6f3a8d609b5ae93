"""Common JPEGs decoded by simplejpeg where it is installed: the pixels of Pillow, for less CPU.

Both use libjpeg-turbo with its default transform and upsampling. Everything else than an RGB JPEG without warnings that
is decoded at its size is left to Pillow.
"""

from __future__ import annotations

import functools
import io
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, JpegImagePlugin

_PIXEL = 4  # bytes that Pillow has for an RGB pixel


def load(image: Image.Image, data: bytes) -> bool:
    """Load the pixels of a JPEG that Pillow has opened from ``data``. Returns False where Pillow must load them."""
    if not _is_common(image) or (decoder := _load_decoder()) is None:
        return False
    pixels = _decode(decoder, data, image.size)
    if pixels is None:
        return False
    image.im = pixels.im
    image.tile = []  # type: ignore[attr-defined]
    return True


def _is_common(image: Image.Image) -> bool:
    return (
        type(image) is JpegImagePlugin.JpegImageFile
        and image.mode == "RGB"
        and not image.decoderconfig  # set where it is decoded at a fraction of its size
        and "progressive" not in image.info
    )


@functools.cache
def _load_decoder() -> Any:
    """The module simplejpeg; None if it or Pillow's zero-copy import is missing, or its pixels are not Pillow's."""
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg if hasattr(Image, "fromarrow") and _equals_pillow(simplejpeg) else None


def _equals_pillow(decoder: Any) -> bool:
    values = np.arange(3 * 45 * 35, dtype=np.uint32) ** 2 * np.uint32(2654435761) >> np.uint32(24)
    image = Image.fromarray(values.astype(np.uint8).reshape(35, 45, 3))
    for subsampling in ("4:4:4", "4:2:2", "4:2:0"):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", subsampling=subsampling, quality=90)
        pixels = _decode(decoder, buffer.getvalue(), image.size)
        if pixels is None or pixels.tobytes() != Image.open(buffer).tobytes():
            return False
    return True


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
    return Image.fromarrow(pa.FixedSizeListArray.from_arrays(values, _PIXEL), "RGB", size)
