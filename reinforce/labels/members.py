"""Members of published reinforcements (DataCompDR, DFNDR, RayGen): augmentation records, captions and vectors.

A sample has ``paug.json`` (augmentation parameters), ``syn.json`` (lists of synthetic captions) and the vectors of all
teachers, concatenated, in ``npz`` or ``pth.gz``. Nothing in them is executed, and the size of what is unpacked is
bounded.
"""

from __future__ import annotations

import functools
import gzip
import io
import itertools
import math
import zipfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

from reinforce.config import Config
from reinforce.dataset.kinds.registry import kind_of
from reinforce.dataset.layers import TRUE_CAPTION, Layer, captions_layer, inputs_of
from reinforce.images.policy import reads_crops
from reinforce.images.records import OPS, Augmentation, Crop, Op, from_records
from reinforce.labels.index import KEY, KINDS, Identity
from reinforce.source.samples import Refusal, clean_text, parse_json
from schemas import Reason
from teachers.published import PublishedTeacherSpec

PARAMETERS, CAPTIONS = "paug.json", "syn.json"
VECTORS = ("npz", "pth.gz")  # the more precise one first
_MAX_BYTES = 64 * 2**20  # of one sample's unpacked vectors
MAX_OPS = 16  # of one record
_MAX_MAGNITUDE = 1e4

_IMAGES, _TEXTS = "image_emb", "text_emb"  # names of arrays
_UNTAGGED = "syn_text"  # the list whose vectors may follow that of the true caption in text_emb
_NORM_RANGE = (0.9, 1.1)
LARGEST_IMAGE = (2**31, 2**31)  # any crop fits into it

Floats = npt.NDArray[np.float32]
#: Value of a row in a layer: captions, embeddings [count, dim], or why it is null there.
LabelValue: TypeAlias = "list[str] | Floats | Refusal"
#: The encoded members of a sample, by name.
Members: TypeAlias = "Mapping[str, bytes]"


class Unreadable(ValueError):
    """A member that is missing or cannot be used; the message is the detail of the refusal."""


@dataclass(frozen=True)
class MemberReader:
    """Reads the members of samples for ``layers``, which no model computes."""

    config: Config
    layers: Sequence[Layer]

    def augmentations(self, members: Members, width: int, height: int) -> tuple[Augmentation, ...]:
        """The first ``augmentations.count`` records of a sample, for an image of this size. Raises Unreadable."""
        policy = self.config.augmentations
        records = _json(members, PARAMETERS).get("param_aug")
        if isinstance(records, str):
            records = parse_json(records.encode())
        if not isinstance(records, list) or len(records) < policy.count:
            count = len(records) if isinstance(records, list) else "no"
            raise Unreadable(f"{count} augmentations in {PARAMETERS}, expected {policy.count}: set augmentations.count")
        return tuple(parse_augmentation(record, policy.size, width, height) for record in records[: policy.count])

    def values(
        self, key: str, members: Members, records: Sequence[Mapping[str, Any]] | None = None
    ) -> dict[str, LabelValue]:
        """The value of a sample in each layer. ``records`` are the augmentations of a sample that is stored already:
        vectors of images must belong to them."""
        values: dict[str, LabelValue] = {}
        arrays = functools.cache(functools.partial(_arrays, members))
        for layer in self.layers:
            try:
                if layer.kind.vectors:
                    crops = layer.texts is None and records is not None
                    if crops and [*self.augmentations(members, *LARGEST_IMAGE)] != from_records(records or ()):
                        text = f"the crops of its vectors, in {PARAMETERS}, are not those of the stored sample"
                        raise Unreadable(text)
                    if layer.texts == TRUE_CAPTION and _TEXTS not in arrays():
                        detail = f"published without a caption: no vectors {_TEXTS!r}, only: {list_names(arrays())}"
                        values[layer.name] = Refusal(key, Reason.NOT_REINFORCED, detail)
                        continue
                    values[layer.name] = self._vectors(layer, arrays())
                    continue
                name, document = str(self.config.captioners[str(layer.model)].model), _json(members, CAPTIONS)
                texts = document.get(name)
                if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                    raise Unreadable(f"no list {name!r} of texts in {CAPTIONS}, which has: {list_names(document)}")
                if len(texts) < layer.count:
                    raise Unreadable(f"{len(texts)} captions in {name!r}, expected {layer.count}: set `captions`")
                most = self.config.input.limits.caption_chars
                values[layer.name] = [clean_text(text, most) for text in texts[: layer.count]]
            except Unreadable as error:
                values[layer.name] = Refusal(key, Reason.REINFORCEMENT_BROKEN, str(error))
        return values

    def _vectors(self, layer: Layer, arrays: Mapping[str, Floats]) -> Floats:
        """The layer's unit vectors [count, dim]: some rows and columns of one of a sample's arrays. Raises
        Unreadable."""
        name, first = (_IMAGES if layer.texts is None else _TEXTS), 0
        if layer.texts not in (None, TRUE_CAPTION):
            own = str(self.config.captioners[str(layer.texts)].model)
            followed = own == _UNTAGGED and f"{own}_emb" not in arrays  # they follow that of the true caption
            name, first = (_TEXTS, 1) if followed else (f"{own}_emb", 0)
        if name not in arrays:
            raise Unreadable(f"no vectors {name!r}, only: {list_names(arrays)}")
        teacher = self.config.teachers[str(layer.model)]
        assert isinstance(teacher, PublishedTeacherSpec)
        assert teacher.columns is not None
        columns = teacher.columns
        rows, width = arrays[name].shape
        if rows < first + layer.count or width < columns[1]:
            raise Unreadable(
                f"{name} has {rows} vectors of {width} numbers, expected {first + layer.count} with columns "
                f"{columns[0]} to {columns[1]} for {layer.model}"
            )
        part = arrays[name][first : first + layer.count, columns[0] : columns[1]]
        unit: Floats = part / checked_norms(part, f"{name}, columns {columns[0]} to {columns[1]}")
        return unit


def checked_norms(values: Floats, where: str) -> Floats:
    """The norms [count, 1] of published vectors [count, dim]. Raises Unreadable unless all are nearly 1."""
    with np.errstate(all="ignore"):
        norms = np.linalg.norm(values, axis=1, keepdims=True)
    if not (np.isfinite(norms).all() and _NORM_RANGE[0] < norms.min() and norms.max() < _NORM_RANGE[1]):
        raise Unreadable(f"{where}: norms of {norms.min():.3g} to {norms.max():.3g}, expected 1")
    return norms


def _json(members: Members, name: str) -> dict[str, Any]:
    data = members.get(name)
    document = None if data is None else parse_json(data)
    if not isinstance(document, dict):
        raise Unreadable(f"no member {name}" if data is None else f"{name} is not a JSON object")
    return document


def _arrays(members: Members) -> dict[str, Floats]:
    for name in VECTORS:
        if (data := members.get(name)) is not None:
            with np.errstate(all="ignore"):  # overflow is refused by the norm
                return parse_vectors(name, data)
    raise Unreadable(f"no member {' or '.join(VECTORS)}")


def parse_augmentation(record: Any, size: int, width: int, height: int) -> Augmentation:
    """``[[top, left, height, width], [[op, magnitude], ...] or null]`` of an image. Raises Unreadable."""
    crop, ops = (*record, None)[:2] if isinstance(record, list) and record else (None, None)
    if not isinstance(crop, list) or len(crop) != 4 or not all(type(side) is int for side in crop):
        raise Unreadable(f"{PARAMETERS}: {str(record)[:80]!r} has no crop")
    box = Crop(*crop)
    if min(crop) < 0 or min(crop[2:]) < 1 or box.top + box.height > height or box.left + box.width > width:
        raise Unreadable(
            f"{box} does not fit this image of {width} x {height}: the image was resized, or is not the published one"
        )
    if ops is None:
        return Augmentation(box, size, None)
    if not isinstance(ops, list) or len(ops) > MAX_OPS:
        raise Unreadable(f"{PARAMETERS}: {str(ops)[:80]!r} is not a list of operations")
    parsed = []
    for pair in ops:
        both: Any = pair if isinstance(pair, list) and len(pair) == 2 else (None, None)
        index, magnitude = both
        exists = type(index) is int and 0 <= index < len(OPS)
        if not exists or type(magnitude) not in (int, float) or not abs(magnitude) <= _MAX_MAGNITUDE:
            raise Unreadable(f"{PARAMETERS}: {str(pair)[:80]!r} is not an operation")
        parsed.append(Op(OPS[index], float(np.float32(magnitude))))
    return Augmentation(box, size, tuple(parsed))


def parse_vectors(name: str, data: bytes) -> dict[str, Floats]:
    """The two-dimensional float arrays of a member ``npz`` or ``pth.gz``, by name. Raises Unreadable."""
    try:
        return _parse_npz(data) if name == "npz" else _parse_pth(data)
    except Unreadable:
        raise
    except Exception as error:  # zip, gzip, numpy and torch have exceptions of their own
        raise Unreadable(f"{name} cannot be read ({type(error).__name__}: {str(error)[:200]})") from error


def _parse_npz(data: bytes) -> dict[str, Floats]:
    """The two-dimensional float arrays. A header's shape counts only if the data has its size."""
    arrays = {}
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        _check_size(sum(info.file_size for info in file.infolist()))
        for info in file.infolist():
            with file.open(info) as member:
                content = io.BytesIO(member.read(info.file_size))  # unpacks no more than the size that was checked
            shape, column_major, dtype = readers[np.lib.format.read_magic(content)](content)
            start, size = content.tell(), len(content.getbuffer())
            if dtype.kind == "f" and len(shape) == 2 and math.prod(shape) * dtype.itemsize == size - start:
                flat = np.frombuffer(content.getbuffer(), dtype, offset=start)
                array = flat.reshape(shape, order="F" if column_major else "C").astype(np.float32)
                arrays[info.filename.removesuffix(".npy")] = array
    return arrays


def _parse_pth(data: bytes) -> dict[str, Floats]:
    """Tensors that ``torch.save`` wrote and gzip compressed."""
    import torch

    with gzip.GzipFile(fileobj=io.BytesIO(data)) as packed:
        unpacked = packed.read(_MAX_BYTES + 1)
    _check_size(len(unpacked))
    with zipfile.ZipFile(io.BytesIO(unpacked)) as file:  # torch's older format, whose sizes are unchecked, is no zip
        _check_size(sum(info.file_size for info in file.infolist()))
    found = torch.load(io.BytesIO(unpacked), map_location="cpu", weights_only=True)
    if not isinstance(found, dict):
        raise Unreadable("pth.gz does not hold a mapping of names to tensors")
    tensors = {name: one for name, one in found.items() if isinstance(name, str) and isinstance(one, torch.Tensor)}
    matrices = {name: value for name, value in tensors.items() if value.ndim == 2 and value.is_floating_point()}
    _check_size(4 * sum(value.numel() for value in matrices.values()))
    return {name: value.float().numpy() for name, value in matrices.items()}


def _check_size(count: int) -> None:
    if count > _MAX_BYTES:
        raise Unreadable(f"vectors of {count:,} bytes, more than the limit of {_MAX_BYTES:,}")


def list_names(names: Iterable[object]) -> str:
    """The first few names, for messages."""
    return ", ".join(map(str, list(names)[:10]))[:200] or "nothing"


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

    Of a tar it has the ``members`` of a sample, the true caption if the tar states it, and the augmentation ``records``
    of one that is stored already. Of a dataset it has the ``image`` with its augmentation records, and the true
    ``captions``, of which ``count`` are wanted: 0 without layers of them.
    """

    name: str
    values: Mapping[str, LabelValue] = field(default_factory=dict)
    joined: str | None = None
    key: str | None = None
    refusal: Refusal | None = None
    members: Members | None = None
    records: Sequence[Mapping[str, Any]] | None = None
    image: LabelCrops | None = None
    captions: Sequence[str] = ()
    count: int = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "values": {}}

    def crops(self, reader: MemberReader | None, width: int, height: int) -> Sequence[Augmentation]:
        """The augmentation records for an own image of this size, if these are taken. Raises Unreadable."""
        if self.members is None:
            return () if self.image is None else self.image.fitted(width, height)
        assert reader is not None
        return reader.augmentations(self.members, width, height) if reads_crops(reader.config) else ()

    def note(self, width: int, height: int) -> str | None:
        """The record of the join in the samples layer, for a local image of this size, or None: the identity that
        matched the images, and the size that crops are scaled from."""
        if self.image is None or (self.image.width, self.image.height) == (width, height):
            return None if self.image is None else self.joined
        return f"{self.joined}, scaled from {self.image.width} x {self.image.height}"

    def why_other(self, width: int, height: int, records: Sequence[Mapping[str, Any]]) -> str | None:
        """Why it is not of a stored sample with an image of this size and these augmentation records, or None."""
        if self.image is None:
            return None
        try:
            fitted = self.image.fitted(width, height)
        except Unreadable as error:
            return str(error)
        same = not fitted or [*fitted] == [*from_records(records)]
        return None if same else "its crops are not those of the stored sample"

    def unpacked(self, reader: MemberReader | None, key: str) -> Mapping[str, LabelValue]:
        """The values that a decode process reads with ``reader``."""
        if self.members is None:
            return {}
        assert reader is not None
        return reader.values(key, self.members, self.records)

    def values_of(self, key: str, captions: Sequence[str], values: Mapping[str, LabelValue]) -> dict[str, LabelValue]:
        """The ``values`` as a sample with these true captions takes them.

        Vectors of texts are of the texts of the same labels; of true captions, those of the sample's. A tar that
        states no caption is taken to have that of the sample.
        """
        found = {**values}
        for layer, value in values.items():
            true = inputs_of(layer) == TRUE_CAPTION
            broken = isinstance(value, Refusal) and value.reason is not Reason.NOT_REINFORCED
            if broken or (self.members is None and self.image is None):
                continue
            if true and not captions:  # as a run that computes the layer has it
                found[layer] = Refusal(key, Reason.NO_TEXT, "no caption that the published vector could belong to")
                continue
            if isinstance(value, Refusal) or kind_of(layer).picks != "text":
                continue
            if self.members is not None:
                if true and self.captions and [*captions[:1]] != [*self.captions]:
                    detail = "published reinforcements: the vector is of another caption than the sample's"
                    found[layer] = Refusal(key, Reason.NOT_REINFORCED, detail)
                continue
            own = values.get(captions_layer(inputs_of(layer)))
            if isinstance(own, Refusal):
                found[layer] = own
            elif true and {*captions} <= {*self.captions[: len(value)]}:
                texts = itertools.islice(itertools.cycle(captions), self.count)  # as a run encodes them
                found[layer] = np.stack([value[self.captions.index(text)] for text in texts])
            elif true:
                detail = "labels: its vector is of another caption than the sample's"
                found[layer] = Refusal(key, Reason.NOT_REINFORCED, detail)
        return found


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
    found = []
    for record in records[:count]:
        if record["size"] != size:
            raise Unreadable(f"crops of size {record['size']}, expected {size}")
        crop, ops = record["crop"], record["ops"]
        if ops is not None:
            ops = [[OPS.index(op["name"]) if op["name"] in OPS else None, op["magnitude"]] for op in ops]
        box = [crop["top"], crop["left"], crop["height"], crop["width"]]
        found.append(parse_augmentation([box, ops], size, width, height))
    return tuple(found)
