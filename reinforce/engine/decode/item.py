"""What a decode process computes: it decodes images, and augments and fits them into their pixel cells.

Imports neither torch nor Ray, so that the processes start fast and stay small.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from PIL.Image import new as new_image

from reinforce.config import Config
from reinforce.datacompdr.members import Unreadable
from reinforce.datacompdr.values import Members, PublishedReader, PublishedValue
from reinforce.dataset.augment.backends import load_backend
from reinforce.dataset.augment.records import Augmentation, Crop, from_records, sample_augmentation, to_records
from reinforce.engine.decode.cells import PixelCells, PixelLayout
from reinforce.images.policy import ImageRefused, decode, image_policy
from reinforce.source.captions import json_error, metadata_of
from reinforce.source.samples import RawSample, Refusal
from schemas import Reason

_PLACEHOLDER_CROP = Crop(0, 0, 8, 8)


@dataclass(frozen=True)
class DecodeSpec:
    """How the images of a lease are decoded. The bytes from ``start`` to ``stop`` of the pixel memory are its cells;
    ``published`` reads published reinforcements."""

    config: Config
    layout: PixelLayout
    start: int = 0
    stop: int = 0
    published: PublishedReader | None = None


@dataclass(frozen=True)
class SourceItem:
    """A sample of the source. ``key`` is that of its row, ``members`` are those of published reinforcements."""

    key: str
    raw: RawSample
    members: Members | None = None

    @property
    def size(self) -> int:
        """Encoded bytes."""
        return len(self.raw.image) + sum(map(len, self.raw.sidecars.values()))


@dataclass(frozen=True)
class StoredItem:
    """A row of the samples layer, in row group ``group``; ``records`` are its augmentations as dicts. ``image`` is None
    where none is needed."""

    key: str
    caption: str | None
    group: int
    image: bytes | None
    records: Sequence[Mapping[str, Any]]
    members: Members | None = None

    @property
    def size(self) -> int:
        """Encoded bytes."""
        return len(self.image or b"")


@dataclass(frozen=True)
class Decoded:
    """A row whose pixels are in its cell.

    ``records``, ``caption``, ``metadata`` and the size in pixels are set for a sample of the source only; ``left_out``
    lists its parts that are missing. ``unreadable`` is set only for a row of the samples layer.
    """

    published: Mapping[str, PublishedValue] = field(default_factory=dict)
    caption: str | None = None
    metadata: str | None = None
    width: int = 0
    height: int = 0
    records: Sequence[Mapping[str, Any]] = ()
    left_out: tuple[Refusal, ...] = ()
    unreadable: Refusal | None = None


@dataclass(frozen=True)
class Failed:
    """An unexpected exception, as text."""

    error: str


Item: TypeAlias = "SourceItem | StoredItem"
Outcome: TypeAlias = "Decoded | Refusal | Failed"


def decode_item(spec: DecodeSpec, cells: PixelCells, cell: int, item: Item) -> Outcome:
    """Decode one item and write its pixels. A sample of the source that cannot be used gives its Refusal."""
    decode_one = _decode_stored if isinstance(item, StoredItem) else _decode_new
    try:
        return decode_one(spec, cells, cell, item)  # type: ignore[arg-type]
    except Exception as error:  # the parent raises it where the item's turn is
        return Failed(f"{type(error).__name__}: {error}")


def _decode_new(spec: DecodeSpec, cells: PixelCells, cell: int, item: SourceItem) -> Decoded | Refusal:
    """Decode a sample of the source, and draw its augmentations or take the published ones."""
    config, raw, key = spec.config, item.raw, item.key
    limits, policy = config.input.limits, config.augmentations
    try:
        image = decode(raw.image, limits, strict=True, policy=image_policy(config))
        width, height = image.size
        augmentations: Sequence[Augmentation]
        if spec.published is None:
            augmentations = [
                sample_augmentation(policy, config.seed, key, k, width, height) for k in range(policy.count)
            ]
        else:
            augmentations = spec.published.augmentations(item.members or {}, width, height)
    except ImageRefused as refused:
        return Refusal(raw.key, refused.reason, refused.detail)
    except Unreadable as error:
        return Refusal(key, Reason.REINFORCEMENT_BROKEN, str(error))
    cells.write(cell, image, augmentations, load_backend(policy.backend))
    fields = config.input.captions
    metadata = metadata_of(raw.all_sidecars, config.input.metadata)
    caption = raw.caption(fields, limits)
    left_out = [*_left_out(config, raw, metadata)]
    if caption is None and fields and len(raw.members) > 1:
        left_out.append(Refusal(raw.key, Reason.NO_TEXT, raw.why_no_caption(fields)))
    return Decoded(
        {} if spec.published is None else spec.published.values(key, item.members),
        caption,
        metadata,
        width,
        height,
        to_records(augmentations),
        tuple(left_out),
    )


def _decode_stored(spec: DecodeSpec, cells: PixelCells, cell: int, item: StoredItem) -> Decoded:
    """Decode a row of the samples layer again. An image that cannot be used any more gives black pixels."""
    config = spec.config
    published = {} if spec.published is None else spec.published.values(item.key, item.members)
    if item.image is None:
        return Decoded(published)
    augmentations: Sequence[Augmentation] = from_records(item.records)
    unreadable = None
    try:
        image = decode(item.image, config.input.limits, policy=image_policy(config))
    except ImageRefused as refused:  # only a referenced image can change after it was accepted
        unreadable = Refusal(item.key, refused.reason, refused.detail)
        image = new_image("RGB", (config.augmentations.size,) * 2)
        augmentations = [replace(augmentation, crop=_PLACEHOLDER_CROP) for augmentation in augmentations]
    cells.write(cell, image, augmentations, load_backend(config.augmentations.backend))
    return Decoded(published, unreadable=unreadable)


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
