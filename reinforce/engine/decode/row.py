"""One row of a shard, and what a decode process computes of it: its image decoded, augmented and fitted into a cell.

Imports neither torch nor Ray, so that the processes start fast and stay small.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from PIL.Image import Image
from PIL.Image import new as new_image

from reinforce.config import Config
from reinforce.dataset.augment.backends import load_backend, sample_augmentation
from reinforce.dataset.augment.records import Augmentation, Crop, from_records, to_records
from reinforce.engine.decode.cells import PixelCells, PixelLayout
from reinforce.images.policy import ImageRefused, decode, image_policy
from reinforce.labels.interface import RowLabels
from reinforce.labels.members import LabelValue, MemberReader, Unreadable
from reinforce.source.captions import json_error, metadata_of
from reinforce.source.references import LostImage
from reinforce.source.samples import RawSample, Refusal
from schemas import Reason

_PLACEHOLDER_CROP = Crop(0, 0, 8, 8)


@dataclass(frozen=True)
class DecodeSpec:
    """How the images of a lease are decoded. The bytes from ``start`` to ``stop`` of the pixel memory are its cells;
    ``reader`` reads values of labels that are packed."""

    config: Config
    layout: PixelLayout
    start: int = 0
    stop: int = 0
    reader: MemberReader | None = None


@dataclass(frozen=True)
class StoredImage:
    """The encoded image of a row of the samples layer, or why it is lost, and its augmentations as dicts."""

    image: bytes | LostImage
    records: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Decoded:
    """What a decode process returns of a row; ``values`` are those of labels that it has read, by layer.

    ``records``, ``caption`` with ``more`` of them, ``metadata`` and the size in pixels are set for a sample of the
    source only; ``left_out`` lists its parts that are missing. ``joined`` is what joined its augmentations with labels,
    and ``unlabelled`` why labels are of another image, by their name. ``unreadable`` is set only for a row of the
    samples layer: why its referenced image can no longer be read; its pixels are black then.
    """

    values: Mapping[str, LabelValue] = field(default_factory=dict)
    caption: str | None = None
    metadata: str | None = None
    width: int = 0
    height: int = 0
    records: Sequence[Mapping[str, Any]] = ()
    left_out: tuple[Refusal, ...] = ()
    unreadable: Refusal | None = None
    more: Sequence[str] = ()
    joined: str | None = None
    unlabelled: Mapping[str, Refusal] = field(default_factory=dict)


#: What a decode process returns for a row; a text is that of an unexpected exception.
Outcome: TypeAlias = "Decoded | Refusal | str"
_NOTHING = Decoded()


@dataclass(eq=False)
class Row:
    """One row on its way from its encoded image through the models to the tables.

    ``sample`` is what is decoded: a sample of the source, which stays without its sidecars, or the image of a row of
    the samples layer. The pixels are in the ``cell`` of the lease, None where none are needed, and ``group`` numbers
    the row group. ``more`` are true captions besides ``caption``. ``labels`` are those of a sample of the source, or
    packed ones, and ``values`` what labels have of layers.
    """

    key: str
    caption: str | None = None
    cell: int | None = None
    group: int = 0
    sample: RawSample | StoredImage | None = None
    decoded: Decoded = _NOTHING
    more: Sequence[str] = ()
    labels: Sequence[RowLabels] = ()
    values: Mapping[str, LabelValue] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "values": {}}  # no decode process needs them

    @property
    def captions(self) -> list[str]:
        return [self.caption, *self.more] if self.caption else []

    @property
    def size(self) -> int:
        """Encoded bytes."""
        if self.sample is None:
            return 0
        sidecars = self.sample.sidecars.values() if isinstance(self.sample, RawSample) else ()
        return (0 if isinstance(self.sample.image, LostImage) else len(self.sample.image)) + sum(map(len, sidecars))

    @property
    def source_key(self) -> str:
        """The key in the source, which a refusal names."""
        return self.sample.key if isinstance(self.sample, RawSample) else self.key

    @property
    def unreadable(self) -> Refusal | None:
        return self.decoded.unreadable

    def finish(self, decoded: Decoded) -> None:
        """Take what was decoded. What no table needs is released: memory is bounded by the images of a row group."""
        self.decoded = decoded
        if isinstance(self.sample, RawSample):
            self.caption, self.more = decoded.caption, decoded.more
            self.sample = replace(self.sample, sidecars={}, of_image={})
        else:
            self.sample = None
        for one in self.labels:
            values, why = {**one.values, **decoded.values}, decoded.unlabelled.get(one.name)
            found = one.values_of(self.key, self.captions, values) if why is None else dict.fromkeys(values, why)
            self.values = {**self.values, **found}
        self.labels = [RowLabels(one.name, joined=one.joined) for one in self.labels]


def decode_row(spec: DecodeSpec, cells: PixelCells, row: Row) -> Outcome:
    """Decode one row and write its pixels. A sample of the source that cannot be used gives its Refusal."""
    try:
        if isinstance(row.sample, RawSample):
            return _decode_new(spec, cells, row, row.sample)
        return _decode_stored(spec, cells, row, row.sample)
    except Exception as error:  # the parent raises it where the row's turn is
        return f"{type(error).__name__}: {error}"


def _decode_new(spec: DecodeSpec, cells: PixelCells, row: Row, raw: RawSample) -> Decoded | Refusal:
    """Decode a sample of the source, and draw its augmentations or take the published ones."""
    config, key = spec.config, row.key
    limits, policy = config.input.limits, config.augmentations
    try:
        image = decode(raw.image, limits, strict=True, policy=image_policy(config))
        width, height = image.size
        joined, records, unlabelled = _fit_labels(spec, row, width, height)
        augmentations = records or [
            sample_augmentation(policy, config.seed, key, k, width, height) for k in range(policy.count)
        ]
    except ImageRefused as refused:
        return Refusal(raw.key, refused.reason, refused.detail)
    except Unreadable as error:
        return Refusal(key, Reason.REINFORCEMENT_BROKEN, str(error))
    _write(cells, row, image, augmentations, policy.backend)
    fields = config.input.caption_fields
    metadata = metadata_of(raw.all_sidecars, config.input.metadata)
    captions = raw.captions(config.input)
    left_out = [*_left_out(config, raw, metadata)]
    if not captions and fields and min(len(raw.members), len(raw.columns or raw.members)) > 1:  # than an image
        left_out.append(Refusal(raw.key, Reason.NO_TEXT, raw.why_no_caption(fields)))
    return Decoded(
        _unpacked(spec, row),
        next(iter(captions), None),
        metadata,
        width,
        height,
        to_records(augmentations),
        tuple(left_out),
        more=captions[1:],
        joined=joined,
        unlabelled=unlabelled,
    )


def _fit_labels(
    spec: DecodeSpec, row: Row, width: int, height: int
) -> tuple[str | None, Sequence[Augmentation], Mapping[str, Refusal]]:
    """The identity that matched a sample to labels with augmentation records, these records for its image, and by name
    of labels why they are of another image. Raises Unreadable for labels without which it is no row."""
    joined: str | None = None
    records: Sequence[Augmentation] = ()
    unlabelled = {}
    for one in row.labels:
        try:
            if found := one.crops(spec.reader, width, height):
                records, joined = found, one.note(width, height)
        except Unreadable as error:
            if one.key is not None:
                raise
            unlabelled[one.name] = Refusal(row.key, Reason.NOT_REINFORCED, f"labels: {error}")
    return joined, records, unlabelled


def _decode_stored(spec: DecodeSpec, cells: PixelCells, row: Row, stored: StoredImage | None) -> Decoded:
    """Decode a row of the samples layer again. An image that cannot be used any more gives black pixels."""
    config, values = spec.config, _unpacked(spec, row)
    if stored is None:
        return Decoded(values)
    augmentations: Sequence[Augmentation] = from_records(stored.records)
    unreadable = None
    try:
        if isinstance(stored.image, LostImage):
            raise ImageRefused(stored.image.reason, stored.image.detail)
        image = decode(stored.image, config.input.limits, policy=image_policy(config))
    except ImageRefused as refused:  # only a referenced image can change after it was accepted
        unreadable = Refusal(row.key, refused.reason, refused.detail)
        image = new_image("RGB", (config.augmentations.size,) * 2)
        augmentations = [replace(augmentation, crop=_PLACEHOLDER_CROP) for augmentation in augmentations]
    _write(cells, row, image, augmentations, config.augmentations.backend)
    return Decoded(values, unreadable=unreadable)


def _unpacked(spec: DecodeSpec, row: Row) -> dict[str, LabelValue]:
    """The values of labels that are read here."""
    return {name: value for one in row.labels for name, value in one.unpacked(spec.reader, row.key).items()}


def _write(cells: PixelCells, row: Row, image: Image, augmentations: Sequence[Augmentation], backend: str) -> None:
    assert row.cell is not None
    cells.write(row.cell, image, augmentations, load_backend(backend))


def _left_out(config: Config, raw: RawSample, metadata: str | None) -> Iterator[Refusal]:
    """The sidecars that the config reads and that this sample has, but that cannot be used."""
    fields = [field.partition(":") for field in config.input.caption_fields]
    of_metadata = set() if config.input.metadata == "none" else {"json"}
    for extension in sorted(of_metadata | {extension for extension, _, _ in fields}):
        if extension in raw.left_out:
            yield raw.left_out[extension]
    for extension in sorted(of_metadata | {extension for extension, is_json, _ in fields if is_json}):
        data = raw.all_sidecars.get(extension)
        if data is None or (extension == "json" and metadata is not None):
            continue
        fault = json_error(data)
        if fault is None and extension == "json" and config.input.metadata == "all":
            fault = "JSON that is nested too deeply to be written"
        if fault is not None:
            yield Refusal(raw.key, Reason.SIDECAR_BROKEN, f".{extension}: {fault}")
