"""Encoded images by their place, in any order: ranges of tars, and of a copy of what stands in Parquet files."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq

from reinforce.captioning.pairs import Place
from reinforce.source.urls import canonical, filesystem
from teachers.weights import cache_folder, locked

_log = logging.getLogger(__name__)


def read_images(places: Sequence[Place]) -> list[bytes]:
    """The encoded image at each place, all of one storage asked for at once.

    One image of a Parquet file cannot be had without the row group around it, so a node that reads such a file keeps
    its images end to end in its cache (``REINFORCE_CACHE``), as many bytes as they are. Raises what the storage
    raises: that is worth another attempt.
    """
    located = [filesystem(_flat(place.url) if place.url.endswith(".parquet") else place.url) for place in places]
    images: list[bytes] = [b""] * len(places)
    by_system: dict[int, list[int]] = {}
    for index, (fs, _) in enumerate(located):
        by_system.setdefault(id(fs), []).append(index)
    for rows in by_system.values():
        fs = located[rows[0]][0]
        starts = [places[row].offset for row in rows]
        ends = [places[row].offset + places[row].length for row in rows]
        for row, data in zip(rows, fs.cat_ranges([located[row][1] for row in rows], starts, ends), strict=True):
            if isinstance(data, Exception):  # some file systems return what others raise
                raise data
            images[row] = bytes(data)
    return images


@functools.cache
def _flat(url: str) -> str:
    """A local file with the images of a samples file end to end, made once a node."""
    fs, path = filesystem(url)
    name = hashlib.sha256(f"{canonical(url)}\0{fs.ukey(path)}".encode()).hexdigest()[:16]
    target = cache_folder() / "images" / f"{name}.bin"
    if not target.exists():
        with locked(str(target)):
            if not target.exists():
                _flatten(url, target)
    return str(target)


def _flatten(url: str, target: Path) -> None:
    fs, path = filesystem(url)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=".images-")
    try:
        with os.fdopen(handle, "wb") as out, fs.open(path, "rb") as source:
            file = pq.ParquetFile(source)
            for index in range(file.num_row_groups):
                for image in file.read_row_group(index, columns=["image"])["image"]:
                    out.write(image.as_buffer())
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
    _log.info("copied the images of %s to %s", canonical(url), target)
