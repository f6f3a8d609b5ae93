"""Rows of a shard, ready for the models: read from the source the first time, from the samples layer ever after.

Both ways give the same rows in the same order and the same row groups. A bounded window of rows is decoded and
augmented ahead in threads (Pillow frees the interpreter lock while it works); memory grows with the window and the
row group, never with the shard.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow.parquet as pq
from PIL.Image import Image
from PIL.Image import new as new_image

from reinforce.config import Config
from reinforce.dataset.augment import Augmentation, Crop, from_records, replay, sample_augmentation
from reinforce.engine.published import PublishedValue, Reinforcements, Unreadable
from reinforce.prefetch import prefetch
from reinforce.source.image import ImageRefused, decode, image_policy
from reinforce.source.shards import RawSample, Refusal, read_shard, referenced_images
from reinforce.source.text import caption_of, json_error, metadata_of
from schemas import Reason, image_column
from teachers.protocols import ImageSpec

#: Row groups close at this many bytes of images, or of vectors at this width: small enough to shuffle and to stream.
GROUP_BYTES = 32 * 2**20
GROUP_ROWS = 1024
_NOMINAL_VECTOR_BYTES = 1536 * 2
_WHOLE = Crop(0, 0, 8, 8)


@dataclass
class Row:
    """One sample on its way through the models. ``group`` numbers its row group.

    ``crops`` is uint8 [K, S, S, 3], ``views`` the whole image as each captioner wants it, uint8 [h, w, 3], ``brought``
    what published layers hold of it. ``refusal`` says why a stored row's image can no longer be read; its pixels are
    black then. ``notes`` say what of the sample was left out when it was read from the source.
    """

    key: str
    caption: str | None
    group: int = 0
    metadata: str | None = None
    width: int = 0
    height: int = 0
    image: bytes = b""
    offset: int = 0
    augmentations: tuple[Augmentation, ...] = ()
    crops: np.ndarray | None = None
    views: dict[ImageSpec, np.ndarray] = field(default_factory=dict)
    brought: Mapping[str, PublishedValue] = field(default_factory=dict)
    refusal: Refusal | None = None
    notes: tuple[Refusal, ...] = ()


@dataclass(frozen=True)
class Wanted:
    """What the layers of a lease want of each image; nothing wanted, nothing decoded."""

    crops: bool
    views: tuple[ImageSpec, ...] = ()
    published: Reinforcements | None = None

    @property
    def pixels(self) -> bool:
        return self.crops or bool(self.views)


def group_rows(count: int) -> int:
    """Most rows of a row group. Depends on the augmentations alone, so that a teacher added later fits."""
    return max(1, min(GROUP_ROWS, GROUP_BYTES // (count * _NOMINAL_VECTOR_BYTES)))


def rows_from_source(
    config: Config, url: str, wanted: Wanted, pool: ThreadPoolExecutor, window: int
) -> Iterator[Row | Refusal]:
    """Read a source shard; every image is decoded, so that what cannot be is refused here and nowhere else."""

    def prepare(item: RawSample | Refusal) -> Row | Refusal:
        if isinstance(item, Refusal):
            return item
        return _first_time(config, item, wanted)

    limit = group_rows(config.augmentations.count)
    group = rows = size = 0
    published = wanted.published
    if published is not None and published.fault is not None:
        yield published.fault
        return
    seen: set[str] = set()  # published keys, which those of the source may share
    for row in prefetch(pool, prepare, read_shard(url, config.input.limits), window, _encoded_bytes):
        if isinstance(row, Row):
            if row.key in seen:
                yield Refusal(row.key, Reason.DUPLICATE_KEY, "another sample has these reinforcements; it is kept")
                continue
            if published is not None:
                seen.add(row.key)
            if rows and (rows == limit or size + len(row.image) > GROUP_BYTES):
                group, rows, size = group + 1, 0, 0
            row.group, rows, size = group, rows + 1, size + len(row.image)
        yield row
    if published is not None:
        yield from published.refusals
        yield from published.without_image()


def rows_from_samples(
    config: Config, file: pq.ParquetFile, wanted: Wanted, pool: ThreadPoolExecutor, window: int
) -> Iterator[Row]:
    """Read the rows back from the samples layer, images only where they are wanted."""
    columns = ["key", "caption"]
    if wanted.pixels:
        columns += ["augmentations", image_column(config.images)]

    def stored() -> Iterator[Row]:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=columns)
            images: Iterable[bytes] = itertools.repeat(b"")
            if "image" in columns:
                images = (value.as_py() for value in table["image"])
            elif "image_ref" in columns:
                images = referenced_images(table["image_ref"].to_pylist())
            records = table["augmentations"].to_pylist() if wanted.pixels else itertools.repeat([])
            captions = table["caption"].to_pylist()
            for key, caption, image, record in zip(table["key"].to_pylist(), captions, images, records, strict=False):
                yield Row(key, caption, group, image=image, augmentations=tuple(from_records(record)))

    def prepare(row: Row) -> Row:
        if wanted.published is not None:
            row.brought = wanted.published.of(row.key)
        if not wanted.pixels:
            return row
        try:
            image = decode(row.image, config.input.limits, policy=image_policy(config))
        except ImageRefused as refused:  # only a referenced image can change after it was accepted
            row.refusal = Refusal(row.key, refused.reason, refused.detail)
            image = new_image("RGB", (config.augmentations.size,) * 2)
            row.augmentations = tuple(replace(a, crop=_WHOLE) for a in row.augmentations)
        _pixels(row, image, wanted)
        row.image = b""
        return row

    yield from prefetch(pool, prepare, stored(), window, _encoded_bytes)


def _encoded_bytes(item: RawSample | Refusal | Row) -> int:
    if isinstance(item, RawSample):
        return len(item.image) + sum(map(len, item.sidecars.values()))
    return len(item.image) if isinstance(item, Row) else 0


def _first_time(config: Config, raw: RawSample, wanted: Wanted) -> Row | Refusal:
    limits, policy, published = config.input.limits, config.augmentations, wanted.published
    key = raw.key if published is None else published.key_of(raw)
    if key is None:
        return Refusal(raw.key, Reason.NOT_REINFORCED, "nothing of this key, or of its uid, among the reinforcements")
    try:
        image = decode(raw.image, limits, strict=True, policy=image_policy(config))
        width, height = image.size
        if published is None:
            augmentations = tuple(
                sample_augmentation(policy, config.seed, key, k, width, height) for k in range(policy.count)
            )
        else:
            augmentations = published.augmentations(key, width, height)
    except ImageRefused as refused:
        return Refusal(raw.key, refused.reason, refused.detail)
    except Unreadable as error:
        return Refusal(key, Reason.REINFORCEMENT_BROKEN, str(error))
    metadata = metadata_of(raw.sidecars, config.input.metadata)
    row = Row(
        key,
        caption_of(raw.sidecars, config.input.captions, limits),
        metadata=metadata,
        width=width,
        height=height,
        image=raw.image,
        offset=raw.offset,
        augmentations=augmentations,
        brought={} if published is None else published.of(key),
        notes=tuple(_left_out(config, raw, metadata)),
    )
    _pixels(row, image, wanted)
    return row


def _left_out(config: Config, raw: RawSample, metadata: str | None) -> Iterator[Refusal]:
    """What the config reads of a sample's sidecars and could not be had."""
    fields = [field.partition(":") for field in config.input.captions]
    keeps = config.input.metadata != "none"
    for extension in sorted({extension for extension, _, _ in fields} | ({"json"} if keeps else set())):
        if extension in raw.left_out:
            yield raw.left_out[extension]
    for extension in sorted(
        {extension for extension, is_json, _ in fields if is_json} | ({"json"} if keeps else set())
    ):
        data = raw.sidecars.get(extension)
        if data is None or (extension == "json" and metadata is not None):
            continue
        fault = json_error(data)
        if fault is None and extension == "json" and config.input.metadata == "all":
            fault = "JSON that is nested too deeply to be written"
        if fault is not None:
            yield Refusal(raw.key, Reason.SIDECAR_BROKEN, f".{extension}: {fault}")


def _pixels(row: Row, image: Image, wanted: Wanted) -> None:
    from teachers.pixels import fit  # imports torch, which planning does without

    if wanted.crops:
        row.crops = np.stack([np.asarray(replay(image, record)) for record in row.augmentations])
    row.views = {spec: fit(image, spec) for spec in wanted.views}
