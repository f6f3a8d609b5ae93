"""The rows of a shard, ready for the models: read from the source the first time, from the samples layer afterwards.

Both paths give the same rows in the same order and the same row groups. A bounded window of rows is decoded and
augmented ahead in threads (Pillow releases the interpreter lock while it works). Memory grows with the window and the
row group, never with the shard.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
from PIL.Image import Image
from PIL.Image import new as new_image

from reinforce.config import Config
from reinforce.dataset.augment import AUGMENTATION_BACKEND, Augmentation, Crop, from_records, sample_augmentation
from reinforce.dataset.backends import load_backend
from reinforce.dataset.layer_file import LayerFile
from reinforce.engine.published import PublishedValue, Reinforcements
from reinforce.engine.published_members import Unreadable
from reinforce.prefetch import prefetch
from reinforce.source.image import ImageRefused, decode, image_policy
from reinforce.source.shards import RawSample, Refusal, read_shard, referenced_images
from reinforce.source.text import caption_of, json_error, metadata_of, why_no_caption
from schemas import Reason, image_column
from teachers.protocols import ImageSpec

#: Limits of a row group, of which the first that is reached closes it: rows, bytes of encoded images, and bytes of
#: vectors at a nominal width. Small enough to shuffle and to stream.
GROUP_ROWS = 1024
GROUP_BYTES = 32 * 2**20
_NOMINAL_VECTOR_BYTES = 1536 * 2
_PLACEHOLDER_CROP = Crop(0, 0, 8, 8)


@dataclass(frozen=True)
class NewSample:
    """A sample read from the source, as the samples layer stores it. ``left_out`` lists the parts that are missing."""

    metadata: str | None
    width: int
    height: int
    image: bytes
    offset: int
    augmentations: tuple[Augmentation, ...]
    left_out: tuple[Refusal, ...]


@dataclass(frozen=True)
class Pixels:
    """One image for the models: ``crops`` uint8 [K, S, S, 3], and for each captioner the whole image uint8
    [h, w, 3]."""

    crops: np.ndarray | None = None
    views: Mapping[ImageSpec, np.ndarray] = field(default_factory=dict)


@dataclass
class Row:
    """One sample on its way through the models.

    ``published`` holds the values of published layers, by layer, and ``group`` numbers the row group. ``sample`` is
    set only for a row from the source. ``unreadable`` is set only for a row from the samples layer: why its
    referenced image can no longer be read; its pixels are black then.
    """

    key: str
    caption: str | None
    pixels: Pixels
    published: Mapping[str, PublishedValue]
    sample: NewSample | None = None
    unreadable: Refusal | None = None
    group: int = 0


@dataclass(frozen=True)
class RowSpec:
    """What the layers of a lease need of each row: ``crops``, ``views`` and values of ``published`` reinforcements.

    ``backend`` is the augmentation backend that makes the crops.
    """

    crops: bool
    views: tuple[ImageSpec, ...] = ()
    published: Reinforcements | None = None
    backend: str = AUGMENTATION_BACKEND

    @property
    def needs_image(self) -> bool:
        return self.crops or bool(self.views)


@dataclass(frozen=True)
class _StoredRow:
    """A row of the samples layer; ``image`` is empty where no image is needed."""

    key: str
    caption: str | None
    group: int
    image: bytes
    augmentations: tuple[Augmentation, ...]


def max_group_rows(augmentations: int, group_rows: int = GROUP_ROWS) -> int:
    """Most rows of a row group. Independent of the teachers, so that one can be added later."""
    return max(1, min(group_rows, GROUP_BYTES // (augmentations * _NOMINAL_VECTOR_BYTES)))


def rows_from_source(
    config: Config, url: str, spec: RowSpec, pool: ThreadPoolExecutor, window: int, group_rows: int = GROUP_ROWS
) -> Iterator[Row | Refusal]:
    """Read a source shard. Every image is decoded, even where no layer needs it, so that broken ones are refused."""

    def prepare(item: RawSample | Refusal) -> Row | Refusal:
        return item if isinstance(item, Refusal) else _new_row(config, item, spec)

    limit = max_group_rows(config.augmentations.count, group_rows)
    group = rows = size = 0
    published = spec.published
    if published is not None and published.shard_refusal is not None:
        yield published.shard_refusal
        return
    seen: set[str] = set()  # published keys: several samples of the source may match one
    for row in prefetch(pool, prepare, read_shard(url, config.input.limits), window, _encoded_bytes):
        if isinstance(row, Row):
            assert row.sample is not None
            if row.key in seen:
                yield Refusal(row.key, Reason.DUPLICATE_KEY, "another sample has the same reinforcements; it is kept")
                continue
            if published is not None:
                seen.add(row.key)
            image_bytes = len(row.sample.image)
            if rows and (rows == limit or size + image_bytes > GROUP_BYTES):
                group, rows, size = group + 1, 0, 0
            row.group, rows, size = group, rows + 1, size + image_bytes
        yield row
    if published is not None:
        yield from published.refusals
        yield from published.unmatched()


def rows_from_samples(
    config: Config, file: LayerFile, spec: RowSpec, pool: ThreadPoolExecutor, window: int
) -> Iterator[Row]:
    """Read the rows back from the samples layer, with images only if ``spec`` needs them."""

    def prepare(stored: _StoredRow) -> Row:
        published = {} if spec.published is None else spec.published.values(stored.key)
        row = Row(stored.key, stored.caption, Pixels(), published, group=stored.group)
        if not spec.needs_image:
            return row
        augmentations = stored.augmentations
        try:
            image = decode(stored.image, config.input.limits, policy=image_policy(config))
        except ImageRefused as refused:  # only a referenced image can change after it was accepted
            row.unreadable = Refusal(stored.key, refused.reason, refused.detail)
            image = new_image("RGB", (config.augmentations.size,) * 2)
            augmentations = tuple(replace(a, crop=_PLACEHOLDER_CROP) for a in augmentations)
        row.pixels = _pixels(image, augmentations, spec)
        return row

    yield from prefetch(pool, prepare, _stored_rows(config, file, spec), window, _encoded_bytes)


def _stored_rows(config: Config, file: LayerFile, spec: RowSpec) -> Iterator[_StoredRow]:
    columns = ["key", "caption"]
    if spec.needs_image:
        columns += ["augmentations", image_column(config.images)]
    for group in range(file.num_row_groups):
        table = file.read_row_group(group, columns=columns)
        images: Iterable[bytes] = itertools.repeat(b"")
        if "image" in columns:
            images = (value.as_py() for value in table["image"])
        elif "image_ref" in columns:
            images = referenced_images(table["image_ref"].to_pylist(), config.moved)
        records = table["augmentations"].to_pylist() if spec.needs_image else itertools.repeat([])
        keys, captions = table["key"].to_pylist(), table["caption"].to_pylist()
        for key, caption, image, record in zip(keys, captions, images, records, strict=False):
            yield _StoredRow(key, caption, group, image, tuple(from_records(record)))


def _encoded_bytes(item: RawSample | Refusal | _StoredRow) -> int:
    if isinstance(item, RawSample):
        return len(item.image) + sum(map(len, item.sidecars.values()))
    return len(item.image) if isinstance(item, _StoredRow) else 0


def _new_row(config: Config, raw: RawSample, spec: RowSpec) -> Row | Refusal:
    """Decode a sample of the source, and draw its augmentations or take the published ones."""
    limits, policy, published = config.input.limits, config.augmentations, spec.published
    key = raw.key if published is None else published.match(raw)
    if key is None:
        return Refusal(raw.key, Reason.NOT_REINFORCED, "the published reinforcements have neither its key nor its uid")
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
    fields = config.input.captions
    metadata = metadata_of(raw.all_sidecars, config.input.metadata)
    caption = caption_of(raw.sidecars, fields, limits) or caption_of(raw.all_sidecars, fields, limits)
    left_out = [*_left_out(config, raw, metadata)]
    if caption is None and fields and len(raw.members) > 1:
        left_out.append(Refusal(raw.key, Reason.NO_TEXT, why_no_caption(raw.all_sidecars, fields, raw.members)))
    return Row(
        key,
        caption,
        _pixels(image, augmentations, spec),
        {} if published is None else published.values(key),
        NewSample(metadata, width, height, raw.image, raw.offset, augmentations, tuple(left_out)),
    )


def _left_out(config: Config, raw: RawSample, metadata: str | None) -> Iterator[Refusal]:
    """The sidecars that the config reads and that this sample has, but that cannot be used."""
    fields = [field.partition(":") for field in config.input.captions]
    keeps_metadata = config.input.metadata != "none"
    for extension in sorted({extension for extension, _, _ in fields} | ({"json"} if keeps_metadata else set())):
        if extension in raw.left_out:
            yield raw.left_out[extension]
    for extension in sorted(
        {extension for extension, is_json, _ in fields if is_json} | ({"json"} if keeps_metadata else set())
    ):
        data = raw.all_sidecars.get(extension)
        if data is None or (extension == "json" and metadata is not None):
            continue
        fault = json_error(data)
        if fault is None and extension == "json" and config.input.metadata == "all":
            fault = "JSON that is nested too deeply to be written"
        if fault is not None:
            yield Refusal(raw.key, Reason.SIDECAR_BROKEN, f".{extension}: {fault}")


def _pixels(image: Image, augmentations: Iterable[Augmentation], spec: RowSpec) -> Pixels:
    from teachers.pixels import fit  # imports torch, which planning does not need

    replay = load_backend(spec.backend)
    crops = np.stack([replay(image, record) for record in augmentations]) if spec.crops else None
    return Pixels(crops, {view: fit(image, view) for view in spec.views})
