from __future__ import annotations

import io

from PIL import Image


def scan_bomb(scans: int, side: int = 4096) -> bytes:
    """A progressive JPEG of a few kilobytes that repeats a scan over all of its blocks."""
    buffer = io.BytesIO()
    Image.new("L", (side, side), 200).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    start = data.rindex(b"\xff\xc4")  # the tables of the last scan, the scan, the end mark
    return data[:-2] + data[start:-2] * scans + b"\xff\xd9"
