"""Labels of one sample: values, and augmentation records fitted to a local image of another size."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from reinforce.dataset.augment.operations import OPS
from reinforce.dataset.augment.records import Augmentation, Crop, from_records
from reinforce.dataset.kinds.registry import encodes_texts
from reinforce.dataset.layers import TRUE_CAPTION, captions_layer, inputs_of
from reinforce.labels.interface import RowLabels
from reinforce.labels.members import LabelValue, MemberReader, Unreadable, parse_augmentation
from reinforce.source.samples import Refusal
from schemas import Reason


@dataclass(frozen=True)
class LabelCrops:
    """An image of ``width`` x ``height`` pixels that was labelled, with its augmentation records if these are taken."""

    records: tuple[Augmentation, ...]
    width: int
    height: int

    def fitted(self, width: int, height: int) -> tuple[Augmentation, ...]:
        """The records for an own image of this size, scaled if it differs. Raises Unreadable if its shape differs."""
        if (width, height) == (self.width, self.height):
            return self.records
        # Both sides of a resized image are rounded by at most a pixel.
        if abs(width * self.height - height * self.width) > self.width + self.height:
            raise Unreadable(
                f"labelled at {self.width} x {self.height} pixels, {width} x {height} here: a crop or another image"
            )
        return tuple(replace(one, crop=self._scaled(one.crop, width, height)) for one in self.records)

    def _scaled(self, crop: Crop, width: int, height: int) -> Crop:
        top, rows = _scaled(crop.top, crop.height, self.height, height)
        left, columns = _scaled(crop.left, crop.width, self.width, width)
        return Crop(top, left, rows, columns)


@dataclass(frozen=True)
class StoredLabels(RowLabels):
    """What a dataset has of a sample: also its image with the augmentation records, and its true ``captions``, of which
    ``count`` are wanted: 0 without layers of them."""

    image: LabelCrops = field(kw_only=True)
    captions: Sequence[str] = ()
    count: int = 0

    def crops(self, reader: MemberReader | None, width: int, height: int) -> Sequence[Augmentation]:
        return self.image.fitted(width, height)

    def note(self, width: int, height: int) -> str | None:
        """The identity that matched the images, and the size that crops are scaled from."""
        own = (self.image.width, self.image.height)
        return f"{self.joined}, scaled from {own[0]} x {own[1]}" if own != (width, height) else self.joined

    def why_other(self, width: int, height: int, records: Sequence[Mapping[str, Any]]) -> str | None:
        try:
            fitted = self.crops(None, width, height)
        except Unreadable as error:
            return str(error)
        same = not fitted or [*fitted] == [*from_records(records)]
        return None if same else "its crops are not those of the stored sample"

    def values_of(self, key: str, captions: Sequence[str], values: Mapping[str, LabelValue]) -> dict[str, LabelValue]:
        """Vectors of texts are of the texts of the same labels; of true captions, those of the sample's."""
        found = {**values}
        for layer, value in values.items():
            if isinstance(value, Refusal) or not encodes_texts(layer):
                continue
            own = values.get(captions_layer(inputs_of(layer)))
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
