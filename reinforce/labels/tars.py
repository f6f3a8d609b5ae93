"""Labels in the tars of DataCompDR, DFNDR and RayGen: one tar for each shard of the source, which may be that shard."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from reinforce.config import Config
from reinforce.dataset.augment.records import Augmentation
from reinforce.dataset.layers import REINFORCEMENTS, SAMPLES, TRUE_CAPTION, Layer, inputs_of
from reinforce.errors import StorageError, UserError
from reinforce.images.policy import reads_crops
from reinforce.labels.identities import KEY, KINDS, identity_of
from reinforce.labels.interface import UNCONFIRMED, LabelSet, RowLabels, Wanted, describe_counts
from reinforce.labels.joining import Joined, TarRows
from reinforce.labels.members import (
    CAPTIONS,
    LARGEST_IMAGE,
    PARAMETERS,
    VECTORS,
    LabelValue,
    MemberReader,
    Members,
    Unreadable,
)
from reinforce.source.formats.tar import read_shard
from reinforce.source.samples import Refusal
from reinforce.source.urls import canonical
from schemas import WHOLE_SHARD, Reason

_CHECKED_SAMPLES = 8


@dataclass(frozen=True)
class PackedLabels(RowLabels):
    """The ``members`` of a sample, and the augmentation ``records`` of one that is stored already."""

    members: Members = field(default_factory=dict)
    records: Sequence[Mapping[str, Any]] | None = None

    def crops(self, reader: MemberReader | None, width: int, height: int) -> Sequence[Augmentation]:
        assert reader is not None
        return reader.augmentations(self.members, width, height) if reads_crops(reader.config) else ()

    def to_unpack(self, records: Sequence[Mapping[str, Any]]) -> RowLabels | None:
        return replace(self, records=records)

    def unpacked(self, reader: MemberReader | None, key: str) -> Mapping[str, LabelValue]:
        assert reader is not None
        return reader.values(key, self.members, self.records)

    def values_of(self, key: str, captions: Sequence[str], values: Mapping[str, LabelValue]) -> dict[str, LabelValue]:
        """The vector of the true caption is that of the sample's, if it has one."""
        none = Refusal(key, Reason.NO_TEXT, "no caption that the published vector could belong to")
        lost = [layer for layer in values if inputs_of(layer) == TRUE_CAPTION and not captions]
        return {**values} | {layer: none for layer in lost if not isinstance(values[layer], Refusal)}


class TarLabels(LabelSet):
    """The labels in one tar.

    Members are copied to an unnamed temporary file, since the source may have its images in another order. ``limit``
    bounds the samples.
    """

    at_once = 32
    decides_rows = True

    def __init__(self, url: str, config: Config, layers: Iterable[Layer], limit: int | None = None) -> None:
        super().__init__(REINFORCEMENTS)
        self.member_reader = self._reader = MemberReader(config, layers)
        self._url, self._join = url, config.join or "url"
        self._rows = TarRows(self._join)
        self._members: list[dict[str, tuple[int, int]]] = []  # offset and length of each row's, by name
        self._matched: set[int] = set()
        self._refusals: list[Refusal] = []
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        offset = 0
        for item in islice(read_shard(url, config.input.limits, images=False), limit):
            if isinstance(item, Refusal):
                self._refusals.append(Refusal(item.key, item.reason, f"reinforcements: {item.detail}"))
                continue
            members: dict[str, tuple[int, int]] = {}
            self._members.append(members)
            self._rows.add(item.key, identity_of(item.sidecars))
            for name in (PARAMETERS, CAPTIONS, *VECTORS):
                if name in item.left_out:
                    self._refusals.append(item.left_out[name])
                if (data := item.sidecars.get(name)) is not None:
                    members[name] = (offset, len(data))
                    with _disk_errors():
                        offset += self._file.write(data)
        with _disk_errors():
            self._file.flush()
        self.shard_refusal = next((r for r in self._refusals if r.key is None and r.reason.value in WHOLE_SHARD), None)

    def close(self) -> None:
        self._file.close()

    def find(self, samples: Sequence[Wanted]) -> Iterator[RowLabels]:
        for sample, found in zip(samples, self._rows.match(samples), strict=True):
            if isinstance(found, Joined):
                self.counts[found.kind] += 1
                self._matched.add(found.row)
                yield self._labels(found.row, found.kind)
            else:
                self.counts[found.what] += 1
                refusal = Refusal(sample.key, Reason.NOT_REINFORCED, f"published reinforcements: {found.detail}")
                values = dict.fromkeys([layer.name for layer in self._reader.layers], refusal)
                yield RowLabels(self.name, values, refusal=refusal)

    def _labels(self, row: int, joined: str) -> PackedLabels:
        places = self._members[row].items()
        members = {name: os.pread(self._file.fileno(), size, offset) for name, (offset, size) in places}
        return PackedLabels(self.name, joined=joined, key=self._rows.identities[row][KEY], members=members)

    def left_over(self) -> Iterator[Refusal]:
        yield from self._refusals
        for row, stated in enumerate(self._rows.identities):
            if row not in self._matched:
                detail = "reinforced, but no sample of the source's shard is of its image"
                yield Refusal(stated[KEY], Reason.NO_IMAGE, detail)

    def _check(self) -> None:
        """Raise UserError if some layer is unreadable in all of the first samples."""
        errors = [self._errors(self._labels(row, KEY)) for row in range(min(_CHECKED_SAMPLES, len(self._members)))]
        for layer in errors[0] if errors else ():
            if all(layer in others for others in errors):
                raise UserError(
                    f"{layer}: cannot be read from any of the first {len(errors)} samples of {canonical(self._url)}: "
                    f"{errors[0][layer]}"
                )

    def _errors(self, labels: PackedLabels) -> dict[str, str]:
        """Values of a sample that cannot be read, by layer, independently of its image."""
        values = labels.unpacked(self._reader, "")
        errors = {name: value.detail for name, value in values.items() if isinstance(value, Refusal)}
        try:
            labels.crops(self._reader, *LARGEST_IMAGE)
        except Unreadable as error:
            return {SAMPLES: str(error), **errors}
        return errors

    def preview(self, samples: Sequence[Wanted], where: str) -> list[str]:
        self._check()
        refused = [one.refusal for one in self.find(samples) if one.refusal is not None]
        if not samples or not self._members:
            return []
        first = f"the first {len(samples)} samples of {where}"
        example = f"{refused[0].key}: {refused[0].detail}" if refused else ""
        if self.counts[UNCONFIRMED] and self._join != KEY and not any(self.counts[kind] for kind in KINDS):
            raise UserError(
                f"reinforcements: none of {first} is proven to be the image that was labelled. {example}. Keep `uid`, "
                "`sha256` or `url` in the json member of the source's samples; or, if you know that equal keys are "
                "equal images and neither side states anything else, set `join: key`."
            )
        joined = f"{first} join the first {len(self._members)} published ones: {describe_counts(self.counts)}"
        return [f"reinforcements: {joined}" + (f"; {example}" if example else "")]


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    """Turn an error of the temporary file into a StorageError with the fix."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"reinforcements cannot be copied to {tempfile.gettempdir()}: {error}; make room there, or set TMPDIR."
        ) from error
