"""Random access to encoded images: byte ranges of tars, and of local copies of the images in Parquet files."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from reinforce.captioning.pairs import ImageLocation
from reinforce.config import Input
from reinforce.dataset.files.layer_file import LayerFile
from reinforce.dataset.reading.aligned import read_errors
from reinforce.evaluation.reading import raise_on_damage
from reinforce.source.formats.base import Shard
from reinforce.source.reading import read_samples
from reinforce.source.samples import RawSample
from reinforce.source.urls import canonical, filesystem, shard_name
from reinforce.source.whole_reads import open_whole
from teachers.weights import cache_folder, locked, replacing

_log = logging.getLogger(__name__)


def read_images(locations: Sequence[ImageLocation]) -> list[bytes]:
    """Return the encoded image at each location, with one request per file system.

    An image in a Parquet or jsonl file cannot be read alone. So each node copies the images of such a file to its
    cache (``REINFORCE_CACHE``), concatenated, and reads ranges of the copy. Web servers cannot redirect references of a
    dataset. Raises the errors of the storage, which callers may retry.
    """
    located = [_locate(spot) for spot in locations]
    images: list[bytes] = [b""] * len(locations)
    by_system: dict[int, list[int]] = {}
    for index, (fs, _) in enumerate(located):
        by_system.setdefault(id(fs), []).append(index)
    for rows in by_system.values():
        fs = located[rows[0]][0]
        starts = [locations[row].offset for row in rows]
        ends = [locations[row].offset + locations[row].length for row in rows]
        for row, data in zip(rows, fs.cat_ranges([located[row][1] for row in rows], starts, ends), strict=True):
            if isinstance(data, Exception):  # some file systems return errors instead of raising them
                raise data
            images[row] = bytes(data)
    return images


def _locate(spot: ImageLocation) -> tuple[Any, str]:
    if spot.input is not None or (spot.url.endswith(".parquet") and not spot.referenced):
        return filesystem(_local_copy(spot.url, spot.input))
    return filesystem(spot.url, redirects=not spot.referenced)


@functools.cache
def _local_copy(url: str, spec: str | None) -> str:
    """Return a local file with the concatenated images of a samples file or table; it is written once per node."""
    fs, path = filesystem(url)
    state = f"{canonical(url)}\0{fs.ukey(path)}" + ("" if spec is None else f"\0{spec}")
    name = hashlib.sha256(state.encode()).hexdigest()[:16]
    target = cache_folder() / "images" / f"{name}.bin"
    if not target.exists():
        with locked(str(target)):
            if not target.exists():
                _copy_images(url, spec, target)
    return str(target)


def _copy_images(url: str, spec: str | None, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as temporary, temporary.open("wb") as out:
        for image in _samples_images(url) if spec is None else _table_images(url, spec):
            out.write(image)
    _log.info("copied the images of %s to %s", canonical(url), target)


def _samples_images(url: str) -> Iterator[Any]:
    fs, path = filesystem(url)
    with open_whole(fs, path) as source, read_errors(canonical(url)):
        file = LayerFile(source, source.size)
        for index in range(file.num_row_groups):
            for image in file.read_row_group(index, columns=["image"])["image"]:
                yield image.as_buffer()


def _table_images(url: str, spec: str) -> Iterator[bytes]:
    """The images that a table holds, as ``scan`` counts them."""
    parsed = Input.model_validate_json(spec)
    shard = Shard(url, shard_name(url), str(parsed.format))
    for item in raise_on_damage(read_samples(shard, parsed), url, "data"):
        if isinstance(item, RawSample) and item.url is None:
            yield item.image
