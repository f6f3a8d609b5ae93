"""The augmentation records of labels that are a dataset, fitted to a local image of another size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from reinforce.dataset.augment.operations import OPS
from reinforce.dataset.augment.records import Augmentation, Crop
from reinforce.labels.members import Unreadable, parse_augmentation


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
        fitted = []
        for one in self.records:
            top, rows = _scaled(one.crop.top, one.crop.height, self.height, height)
            left, columns = _scaled(one.crop.left, one.crop.width, self.width, width)
            fitted.append(replace(one, crop=Crop(top, left, rows, columns)))
        return tuple(fitted)


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
