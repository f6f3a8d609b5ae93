"""Small tars for tests, built in memory."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable

Member = tuple[str, bytes]


def tar_bytes(members: Iterable[Member], format: int = tarfile.GNU_FORMAT, end: bool = True) -> bytes:
    """A tar of regular files in the given order; ``end=False`` leaves the zero blocks off."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format, errors="surrogateescape") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        length = tar.offset
    return buffer.getvalue() if end else buffer.getvalue()[:length]


def sample_members(key: str, image: bytes = b"pixels") -> list[Member]:
    """The members ``jpg``, ``txt`` and ``json`` of one sample; the image need not be one to be read."""
    return [(f"{key}.jpg", image), (f"{key}.txt", f"photo {key}".encode()), (f"{key}.json", b'{"uid": 1}')]
