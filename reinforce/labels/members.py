"""Members of published reinforcements (DataCompDR, DFNDR, RayGen): augmentation records, captions and vectors.

A sample has ``paug.json`` (augmentation parameters), ``syn.json`` (lists of synthetic captions) and the vectors of all
teachers, concatenated, in ``npz`` or ``pth.gz``. Nothing in them is executed, and the size of what is unpacked is
bounded.
"""

from __future__ import annotations

import functools
import gzip
import io
import math
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from reinforce.config import Config
from reinforce.dataset.augment.operations import OPS
from reinforce.dataset.augment.records import Augmentation, Crop, Op, from_records
from reinforce.dataset.layers import TRUE_CAPTION, Layer
from reinforce.source.captions import clean_text, parse_json
from reinforce.source.samples import Refusal
from schemas import Reason
from teachers.published.family import PublishedTeacherSpec

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


class MemberReader:
    """Reads the members of samples for those of ``layers`` that no model computes."""

    def __init__(self, config: Config, layers: Iterable[Layer]) -> None:
        self.config, self.layers = config, [layer for layer in layers if layer.published]

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
                if not layer.kind.vectors:
                    values[layer.name] = self._captions(layer, members)
                    continue
                if layer.texts is None and records is not None:
                    self._check_crops(members, records)
                values[layer.name] = self._vectors(layer, arrays())
            except Unreadable as error:
                values[layer.name] = Refusal(key, Reason.REINFORCEMENT_BROKEN, str(error))
        return values

    def _check_crops(self, members: Members, records: Sequence[Mapping[str, Any]]) -> None:
        """Raise Unreadable if the crops of the vectors are not ``records``."""
        if [*self.augmentations(members, *LARGEST_IMAGE)] != from_records(records):
            raise Unreadable(f"the crops of its vectors, in {PARAMETERS}, are not those of the stored sample")

    def _captions(self, layer: Layer, members: Members) -> list[str]:
        """The layer's captions. Raises Unreadable."""
        name = self._list_of(str(layer.model))
        document = _json(members, CAPTIONS)
        texts = document.get(name)
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise Unreadable(f"no list {name!r} of texts in {CAPTIONS}, which has: {list_names(document)}")
        if len(texts) < layer.count:
            raise Unreadable(f"{len(texts)} captions in {name!r}, expected {layer.count}: set `captions`")
        return [clean_text(text, self.config.input.limits.caption_chars) for text in texts[: layer.count]]

    def _vectors(self, layer: Layer, arrays: Mapping[str, Floats]) -> Floats:
        """The layer's unit vectors [count, dim]: some rows and columns of one of a sample's arrays. Raises
        Unreadable."""
        name, first = self._array_of(layer, arrays)
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

    def _array_of(self, layer: Layer, arrays: Mapping[str, Floats]) -> tuple[str, int]:
        """The name of the array with a layer's vectors, and the first of its rows that has one."""
        if layer.texts in (None, TRUE_CAPTION):
            return (_IMAGES if layer.texts is None else _TEXTS), 0
        own = self._list_of(str(layer.texts))
        followed = own == _UNTAGGED and f"{own}_emb" not in arrays
        return (_TEXTS, 1) if followed else (f"{own}_emb", 0)

    def _list_of(self, captioner: str) -> str:
        """The list of synthetic captions that a captioner of the config names."""
        return str(self.config.captioners[captioner].model)


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
    return Augmentation(box, size, tuple(map(_parse_op, ops)))


def _parse_op(pair: Any) -> Op:
    if isinstance(pair, list) and len(pair) == 2:
        index, magnitude = pair
        exists = type(index) is int and 0 <= index < len(OPS)
        if exists and type(magnitude) in (int, float) and abs(magnitude) <= _MAX_MAGNITUDE:
            return Op(OPS[index], float(np.float32(magnitude)))
    raise Unreadable(f"{PARAMETERS}: {str(pair)[:80]!r} is not an operation")


def parse_vectors(name: str, data: bytes) -> dict[str, Floats]:
    """The two-dimensional float arrays of a member ``npz`` or ``pth.gz``, by name. Raises Unreadable."""
    try:
        return _parse_npz(data) if name == "npz" else _parse_pth(data)
    except Unreadable:
        raise
    except Exception as error:  # zip, gzip, numpy and torch have exceptions of their own
        raise Unreadable(f"{name} cannot be read ({type(error).__name__}: {str(error)[:200]})") from error


def _parse_npz(data: bytes) -> dict[str, Floats]:
    arrays = {}
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        _check_size(sum(info.file_size for info in file.infolist()))
        for info in file.infolist():
            with file.open(info) as member:
                array = _parse_npy(member.read(info.file_size))  # unpacks no more than the size that was checked
            if array is not None:
                arrays[info.filename.removesuffix(".npy")] = array
    return arrays


def _parse_npy(data: bytes) -> Floats | None:
    """A two-dimensional float array, or None. The header's shape counts only if the data has its size."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
    shape, column_major, dtype = read(file)
    if dtype.kind != "f" or len(shape) != 2 or math.prod(shape) * dtype.itemsize != len(data) - file.tell():
        return None
    flat = np.frombuffer(data, dtype, offset=file.tell())
    return flat.reshape(shape, order="F" if column_major else "C").astype(np.float32)


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
