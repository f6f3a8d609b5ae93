"""Interface of labels of the rows of a shard, from a dataset or from tars of DataCompDR."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from reinforce.dataset.augment.records import Augmentation
from reinforce.labels.identities import KEY, KINDS, Identity
from reinforce.labels.members import LabelValue, MemberReader
from reinforce.source.samples import Refusal

#: Names of counts besides kinds and KEY: of another image; without a counterpart; with the key of one, but nothing
#: that confirms it; with several that nothing distinguishes; with labels that cannot be read.
OTHER_IMAGE, ABSENT, UNCONFIRMED, BROKEN = "other_image", "absent", "unconfirmed", "broken"
AMBIGUOUS = "ambiguous"
#: Prefix of the names of the counts of `labels`: ``labels.NAME.WHAT``.
PREFIX = "labels."


@dataclass(frozen=True)
class Wanted:
    """A sample whose labels are wanted: its key, what it states, and its encoded image or the digest of that."""

    key: str
    identity: Identity
    image: bytes | int | None = None


@dataclass(frozen=True)
class RowLabels:
    """Labels ``name`` of a sample: the value of each layer, or why it has none.

    ``joined`` is what joined it, None if nothing did. Of a set that decides rows, ``key`` is that of the row, and
    ``refusal`` why the sample is none. Decode processes receive it without values.
    """

    name: str
    values: Mapping[str, LabelValue] = field(default_factory=dict)
    joined: str | None = None
    key: str | None = None
    refusal: Refusal | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "values": {}}

    def crops(self, reader: MemberReader | None, width: int, height: int) -> Sequence[Augmentation]:
        """The augmentation records for an own image of this size, if these are taken. Raises Unreadable."""
        return ()

    def note(self, width: int, height: int) -> str | None:
        """The record of the join in the samples layer, for a local image of this size, or None."""
        return None

    def why_other(self, width: int, height: int, records: Sequence[Mapping[str, Any]]) -> str | None:
        """Why it is not of a stored sample with an image of this size and these augmentation records, or None."""
        return None

    def to_unpack(self, records: Sequence[Mapping[str, Any]]) -> RowLabels | None:
        """What a decode process reads for a stored sample with these augmentation records, None if nothing."""
        return None

    def unpacked(self, reader: MemberReader | None, key: str) -> Mapping[str, LabelValue]:
        """The values that a decode process reads with ``reader``."""
        return {}

    def values_of(self, key: str, captions: Sequence[str], values: Mapping[str, LabelValue]) -> dict[str, LabelValue]:
        """The ``values`` as a sample with these true captions takes them."""
        return {**values}


class LabelSet(ABC):
    """One set of labels.

    Attributes:
        counts: samples by what joined them, or why nothing did.
        unread: its files that could not be read, with the reason.
        at_once: samples that are looked up together.
        decides_rows: whether samples without labels are refused, and others have the keys of their labels.
        has_digests: whether digests of images join it.
        member_reader: reads packed values in decode processes, if it has some.
        shard_refusal: why it cannot be read as a whole.
    """

    at_once: ClassVar[int] = 512
    decides_rows: ClassVar[bool] = False
    has_digests = False
    member_reader: MemberReader | None = None
    shard_refusal: Refusal | None = None

    def __init__(self, name: str) -> None:
        self.name = name
        self.counts: Counter[str] = Counter()
        self.unread: dict[str, str] = {}

    @abstractmethod
    def preview(self, samples: Sequence[Wanted], where: str) -> list[str]:
        """Notes on how the first samples of a shard join. Raises UserError if the first labels lack what the config
        takes, or if nothing but keys agrees."""

    @abstractmethod
    def find(self, samples: Sequence[Wanted]) -> Iterable[RowLabels]:
        """The labels of samples, in their order. Raises UserError if an index is damaged, and what the storage
        raises."""

    def left_over(self) -> Iterable[Refusal]:
        """Why labels that no sample of the source's shard received are refused, and others could not be read."""
        return ()

    @abstractmethod
    def close(self) -> None:
        """Close its files."""


class LabelReader:
    """The sets of labels that the layers of a lease need, none by default."""

    def __init__(self, sets: Iterable[LabelSet] = ()) -> None:
        self.sets = [*sets]
        self.at_once = min((one.at_once for one in self.sets), default=1)
        self.decides_rows = any(one.decides_rows for one in self.sets)
        self.needs_digests = any(one.has_digests for one in self.sets)
        self.member_reader = next((one.member_reader for one in self.sets if one.member_reader is not None), None)
        self.shard_refusal = next((one.shard_refusal for one in self.sets if one.shard_refusal is not None), None)

    @property
    def counts(self) -> dict[str, int]:
        """The counts of each set: those of labels with a name have it before them."""
        prefixes = {one: f"{PREFIX}{one.name}." if one.name else "" for one in self.sets}
        return {f"{prefix}{what}": n for one, prefix in prefixes.items() for what, n in (+one.counts).items()}

    @property
    def unread(self) -> dict[str, dict[str, str]]:
        """The files of each set that could not be read, with the reason."""
        return {one.name: one.unread for one in self.sets}

    def find(self, samples: Sequence[Wanted]) -> Iterator[tuple[RowLabels, ...]]:
        """The labels of samples, in their order, of each set; raises as these."""
        return zip(*(one.find(samples) for one in self.sets), strict=True)

    def left_over(self) -> Iterator[Refusal]:
        for one in self.sets:
            yield from one.left_over()

    def refuse(self, labels: RowLabels) -> None:
        """Count labels that were joined as those of another image."""
        counts = next(one.counts for one in self.sets if one.name == labels.name)
        counts[str(labels.joined)] -= 1
        counts[OTHER_IMAGE] += 1

    def close(self) -> None:
        for one in self.sets:
            one.close()


def describe_counts(counts: Mapping[str, int]) -> str:
    """The counts of samples by what joined them, or why nothing did, for people; '' without any."""
    words = {kind: f"by {kind}" for kind in KINDS} | {
        KEY: "by key alone (join: key)",
        OTHER_IMAGE: "not (another image)",
        ABSENT: "not (no counterpart)",
        UNCONFIRMED: "not (by key alone, which nothing confirms)",
        AMBIGUOUS: "not (ambiguous: several rows state the same)",
        BROKEN: "not (labels that cannot be read)",
    }
    return ", ".join(f"{counts[name]:,} {word}" for name, word in words.items() if counts.get(name))
