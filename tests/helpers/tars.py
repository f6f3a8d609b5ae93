"""Small tars, built in memory, and the result of reading them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable

import fsspec
import pyarrow as pa

from reinforce.source.config import Limits
from reinforce.source.formats.tar import read_shard
from reinforce.source.samples import RawSample, Refusal

Member = tuple[str, bytes]


def tar_bytes(members: Iterable[Member], format: int = tarfile.GNU_FORMAT, end: bool = True) -> bytes:
    """A tar of regular files in the given order; ``end=False`` omits the zero blocks at the end."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format, errors="surrogateescape") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        length = tar.offset
    return buffer.getvalue() if end else buffer.getvalue()[:length]


def sample_members(key: str, image: bytes = b"pixels") -> list[Member]:
    """The members ``jpg``, ``txt`` and ``json`` of one sample; ``image`` is not decoded."""
    return [(f"{key}.jpg", image), (f"{key}.txt", f"photo {key}".encode()), (f"{key}.json", b'{"uid": 1}')]


KEYS = ["a", "b", "c"]
BODY = tar_bytes([member for key in KEYS for member in sample_members(key, key.encode() * 700)], end=False)
TAR = BODY + bytes(1024)  # the samples of KEYS
LIMITS = Limits(image_bytes=5_000, sidecar_bytes=300)


def read(data: bytes, name: str = "x.tar", limits: Limits = LIMITS) -> list[RawSample | Refusal]:
    fsspec.filesystem("memory").pipe(f"/source/{name}", data)
    return list(read_shard(f"memory://source/{name}", limits))


def outcomes(rows: list[RawSample | Refusal]) -> list[tuple[str | None, str]]:
    """Return (key, image or reason) of each row."""
    return [(row.key, row.image.decode() if isinstance(row, RawSample) else row.reason.value) for row in rows]


def zstd(data: bytes) -> bytes:
    return pa.compress(data, "zstd", asbytes=True)
