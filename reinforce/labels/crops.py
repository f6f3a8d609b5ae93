"""What labels have of one sample: augmentation records, fitted to an own image of another size, and values."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from reinforce.datacompdr.members import Unreadable, parse_augmentation
from reinforce.datacompdr.values import PublishedValue
from reinforce.dataset.augment.records import Augmentation, Crop
from reinforce.dataset.augment.tables import OPS
from reinforce.dataset.kinds.registry import encodes_texts
from reinforce.dataset.layers import TRUE_CAPTION, captions_layer, inputs_of
from reinforce.source.samples import Refusal
from schemas import Reason


@dataclass(frozen=True)
class LabelCrops:
    """An image of ``width`` x ``height`` pixels that was labelled, with its augmentation records if these are taken,
    and the kind of agreement that joined it with an own image."""

    records: tuple[Augmentation, ...]
    width: int
    height: int
    joined: str

    def fitted(self, width: int, height: int) -> tuple[Augmentation, ...]:
        """The records for an own image of this size, scaled if it differs. Raises Unreadable if its shape differs."""
        if (width, height) == (self.width, self.height):
            return self.records
        # Both sides of a resized image are rounded by at most a pixel.
        if abs(width * self.height - height * self.width) > self.width + self.height:
            raise Unreadable(
                f"labelled at {self.width} x {self.height} pixels, {width} x {height} here: a cut or another image"
            )
        return tuple(replace(one, crop=self._scaled(one.crop, width, height)) for one in self.records)

    def note(self, width: int, height: int) -> str:
        """What joined the images, and the size that crops are scaled from."""
        scaled = f", scaled from {self.width} x {self.height}" if (width, height) != (self.width, self.height) else ""
        return f"{self.joined}{scaled}"

    def _scaled(self, crop: Crop, width: int, height: int) -> Crop:
        top, rows = _scaled(crop.top, crop.height, self.height, height)
        left, columns = _scaled(crop.left, crop.width, self.width, width)
        return Crop(top, left, rows, columns)


@dataclass(frozen=True)
class RowLabels:
    """What one set of labels, ``name``, has of a sample: its image with the augmentation records, None if it has none,
    the value of each layer, or why it has none, and its true ``captions``, of which ``count`` are wanted: 0 without
    layers of them. Only name and image are sent to decode processes."""

    name: str
    image: LabelCrops | None = None
    values: Mapping[str, PublishedValue] = field(default_factory=dict)
    captions: Sequence[str] = ()
    count: int = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "image": self.image, "values": {}, "captions": (), "count": 0}

    def values_of(self, key: str, captions: Sequence[str], refusal: Refusal | None) -> dict[str, PublishedValue]:
        """The values for a sample with these true captions, or ``refusal``, for which it has none. Vectors of texts
        are of the texts of the same labels; of true captions, those of the sample's."""
        if refusal is not None:
            return dict.fromkeys(self.values, refusal)
        found = dict(self.values)
        for layer, value in self.values.items():
            if isinstance(value, Refusal) or not encodes_texts(layer):
                continue
            own = self.values.get(captions_layer(inputs_of(layer)))
            if isinstance(own, Refusal):
                found[layer] = own
            elif inputs_of(layer) == TRUE_CAPTION and captions and {*captions} <= {*self.captions[: len(value)]}:
                texts = itertools.islice(itertools.cycle(captions), self.count)  # as a run encodes them
                found[layer] = np.stack([value[self.captions.index(text)] for text in texts])
            elif inputs_of(layer) == TRUE_CAPTION:
                detail = "labels: its vector is of another caption than the sample's"
                found[layer] = Refusal(key, Reason.NOT_REINFORCED, detail)
        return found


def _scaled(start: int, length: int, before: int, now: int) -> tuple[int, int]:
    """Start and length of an interval in a side of ``before`` pixels, in one of ``now``: at least a pixel of it."""
    first = min(round(start * now / before), now - 1)
    last = round((start + length) * now / before)
    return first, max(1, min(last, now) - first)


def parse_records(
    stored: Sequence[Mapping[str, Any]] | None, count: int, size: int, width: int, height: int
) -> tuple[Augmentation, ...]:
    """The first ``count`` records of a row of labels, for an image of its size. Raises Unreadable."""
    records = stored or ()
    if len(records) < count:
        raise Unreadable(f"{len(records)} augmentation records, expected {count}")
    return tuple(_parse(record, size, width, height) for record in records[:count])


def _parse(record: Mapping[str, Any], size: int, width: int, height: int) -> Augmentation:
    if record["size"] != size:
        raise Unreadable(f"crops of size {record['size']}, expected {size}")
    crop, ops = record["crop"], record["ops"]
    if ops is not None:
        ops = [[OPS.index(op["name"]) if op["name"] in OPS else None, op["magnitude"]] for op in ops]
    return parse_augmentation([[crop["top"], crop["left"], crop["height"], crop["width"]], ops], size, width, height)
