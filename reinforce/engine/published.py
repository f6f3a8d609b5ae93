"""Reinforcements that others have published, as DataCompDR and DFNDR are: augmentations, captions and vectors of them.

Beside or instead of an image, a sample of such a tar has ``paug.json`` (augmentation parameters), ``syn.json`` (lists
of synthetic captions) and the teachers' vectors, those of all teachers end to end, in ``npz`` or ``pth.gz``. Nothing in
them is executed, and what is unpacked is bounded.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import math
import os
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from reinforce.config import Config
from reinforce.dataset.augment import OPS, Augmentation, Crop, Op
from reinforce.dataset.layers import SAMPLES, TRUE_CAPTION, Layer
from reinforce.errors import StorageError, UserError
from reinforce.source.shards import RawSample, Refusal, read_shard
from reinforce.source.text import clean_text, parse_json
from reinforce.source.urls import canonical
from schemas import WHOLE_SHARD, Reason

#: Name and version of how the members are read; recorded in dataset.json.
FORMAT = "datacompdr-1"

_PARAMETERS, _CAPTIONS, _SIDECAR = "paug.json", "syn.json", "json"
_VECTORS = ("npz", "pth.gz")  # in the order of precision
_IMAGES, _TEXTS = "image_emb", "text_emb"
_UNTAGGED = "syn_text"  # the list whose vectors may stand in text_emb, behind that of the true caption
_MOST_BYTES = 64 * 2**20  # of one sample's vectors when they are unpacked
_MOST_OPS = 16
_MOST_MAGNITUDE = 1e4
_NORMS = (0.9, 1.1)
_TRIED = 8
_LARGEST = (2**31, 2**31)  # of an image, which any crop fits

Floats = npt.NDArray[np.float32]
#: What a layer holds of a row, or why it is null there.
PublishedValue: TypeAlias = "list[str] | Floats | Refusal"


class Unreadable(ValueError):
    """What is told of reinforcements that cannot be read."""


class Reinforcements:
    """Those of one shard, found by key. They wait in a temporary file without a name, since images come in any order.

    ``layers`` are those that are read from them, of the first ``most`` samples or of all. ``refusals`` are what could
    not be read of the shard.
    """

    def __init__(self, url: str, config: Config, layers: Iterable[Layer], most: int | None = None) -> None:
        self._config = config
        self._layers = [layer for layer in layers if layer.published]
        self._members: dict[str, dict[str, tuple[int, int]]] = {}
        self._keys: dict[str, str] = {}  # by uid
        self._known: set[str] = set()  # keys of those that have a uid
        self._met: set[str] = set()
        self.refusals: list[Refusal] = []
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        at = 0
        for item in itertools.islice(read_shard(url, config.input.limits, images=False), most):
            if isinstance(item, Refusal):
                self.refusals.append(Refusal(item.key, item.reason, f"reinforcements: {item.detail}"))
                continue
            members = self._members[item.key] = {}
            if (uid := _uid(item.sidecars)) is not None:
                self._keys.setdefault(uid, item.key)
                self._known.add(item.key)
            for name in (_PARAMETERS, _CAPTIONS, *_VECTORS):
                if name in item.left_out:
                    self.refusals.append(item.left_out[name])
                if (data := item.sidecars.get(name)) is not None:
                    members[name] = (at, len(data))
                    with _room():
                        at += self._file.write(data)
        with _room():
            self._file.flush()

    @property
    def fault(self) -> Refusal | None:
        """Why nothing at all can be had of the shard."""
        return next((r for r in self.refusals if r.key is None and r.reason.value in WHOLE_SHARD), None)

    def close(self) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[str]:
        """The keys."""
        return iter(self._members)

    def key_of(self, raw: RawSample) -> str | None:
        """The key under which a sample of the source is reinforced: that of its ``uid``, else its own."""
        uid = _uid(raw.sidecars)
        key = raw.key if uid is None else self._keys.get(uid, uid)
        if key not in self._members and raw.key not in self._known:  # else that key is another sample's
            key = raw.key
        if key not in self._members:
            return None
        self._met.add(key)
        return key

    def without_image(self) -> Iterator[Refusal]:
        """Those that no sample of the source was met for."""
        for key in self._members:
            if key not in self._met:
                yield Refusal(key, Reason.NO_IMAGE, "reinforced, but the source's shard has no sample of this key")

    def augmentations(self, key: str, width: int, height: int) -> tuple[Augmentation, ...]:
        """The first ``augmentations.count`` records of a sample, for its image. Raises Unreadable."""
        policy = self._config.augmentations
        document = self._json(key, _PARAMETERS)
        records = document.get("param_aug")
        if isinstance(records, str):
            records = parse_json(records.encode())
        if not isinstance(records, list) or len(records) < policy.count:
            count = len(records) if isinstance(records, list) else "no"
            raise Unreadable(f"{count} augmentations in {_PARAMETERS}, want {policy.count}: set augmentations.count")
        return tuple(_augmentation(record, policy.size, width, height) for record in records[: policy.count])

    def of(self, key: str) -> dict[str, PublishedValue]:
        """What each layer holds of a sample."""
        if key not in self._members:
            gone = Refusal(key, Reason.NOT_REINFORCED, "no longer among the reinforcements")
            return {layer.name: gone for layer in self._layers}
        arrays: dict[str, Floats] = {}
        brought: dict[str, PublishedValue] = {}
        for layer in self._layers:
            try:
                if layer.kind == "captions":
                    brought[layer.name] = self._captions(key, layer)
                else:
                    with np.errstate(all="ignore"):  # what overflows is refused for its norm
                        arrays = arrays or self._vectors(key)
                        brought[layer.name] = self._part(arrays, layer)
            except Unreadable as error:
                brought[layer.name] = Refusal(key, Reason.REINFORCEMENT_BROKEN, str(error))
        return brought

    # -- members

    def _read(self, key: str, name: str) -> bytes | None:
        place = self._members[key].get(name)
        return None if place is None else os.pread(self._file.fileno(), place[1], place[0])  # threads share the file

    def _json(self, key: str, name: str) -> dict[str, Any]:
        data = self._read(key, name)
        document = None if data is None else parse_json(data)
        if not isinstance(document, dict):
            raise Unreadable(f"no member {name}" if data is None else f"{name} is no JSON object")
        return document

    def _captions(self, key: str, layer: Layer) -> list[str]:
        name = self._list_of(str(layer.model))
        document = self._json(key, _CAPTIONS)
        texts = document.get(name)
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise Unreadable(f"no list {name!r} of texts in {_CAPTIONS}, which has: {_some(document)}")
        if len(texts) < layer.count:
            raise Unreadable(f"{len(texts)} captions in {name!r}, want {layer.count}: set `captions`")
        return [clean_text(text, self._config.input.limits.caption_chars) for text in texts[: layer.count]]

    def _vectors(self, key: str) -> dict[str, Floats]:
        """The sample's arrays by name. Raises Unreadable."""
        for name in _VECTORS:
            data = self._read(key, name)
            if data is None:
                continue
            try:
                return _unpacked(data) if name == "npz" else _loaded(data)
            except Unreadable:
                raise
            except Exception as error:  # zip, gzip, numpy and torch each have their own
                raise Unreadable(f"{name} cannot be read ({type(error).__name__}: {str(error)[:200]})") from error
        raise Unreadable(f"no member {' or '.join(_VECTORS)}")

    def _part(self, arrays: Mapping[str, Floats], layer: Layer) -> Floats:
        """A layer's own vectors [count, dim], of unit norm."""
        name, first = _IMAGES, 0
        if layer.kind == "texts":
            name = _TEXTS
            if layer.texts != TRUE_CAPTION:
                own = self._list_of(str(layer.texts))
                name, first = (f"{own}_emb", 0) if f"{own}_emb" in arrays or own != _UNTAGGED else (_TEXTS, 1)
        if name not in arrays:
            raise Unreadable(f"no vectors {name!r}, only: {_some(arrays)}")
        columns = self._config.teachers[str(layer.model)].columns
        assert columns is not None
        rows, width = arrays[name].shape
        if rows < first + layer.count or width < columns[1]:
            raise Unreadable(
                f"{name} has {rows} vectors of {width} numbers, want {first + layer.count} with columns "
                f"{columns[0]} to {columns[1]} for {layer.model}"
            )
        part = arrays[name][first : first + layer.count, columns[0] : columns[1]]
        norms = np.linalg.norm(part, axis=1, keepdims=True)
        if not (np.isfinite(norms).all() and _NORMS[0] < norms.min() and norms.max() < _NORMS[1]):
            raise Unreadable(
                f"{name}: norms of {norms.min():.3g} to {norms.max():.3g} in columns {columns[0]} to {columns[1]}, "
                "want 1"
            )
        unit: Floats = part / norms
        return unit

    def _list_of(self, captioner: str) -> str:
        return str(self._config.captioners[captioner].model)


@contextlib.contextmanager
def _room() -> Iterator[None]:
    """Say what to do where a temporary file finds none. Raises StorageError."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"reinforcements cannot wait in {tempfile.gettempdir()}: {error}; make room, or set TMPDIR."
        ) from error


def check_reinforcements(url: str, config: Config, layers: Iterable[Layer]) -> None:
    """Raise UserError where the config cannot be meant for these reinforcements, by the first samples of a shard."""
    with contextlib.closing(Reinforcements(url, config, layers, _TRIED)) as some:
        faults = [_faults(some, key) for key in some]
    for place in faults[0] if faults else ():
        if all(place in others for others in faults):
            raise UserError(
                f"{place}: it can be read in none of the first {len(faults)} samples of {canonical(url)}: "
                f"{faults[0][place]}"
            )


def _faults(some: Reinforcements, key: str) -> dict[str, str]:
    """What cannot be read of a sample, by layer, whatever its image is."""
    found = {}
    try:
        some.augmentations(key, *_LARGEST)
    except Unreadable as error:
        found[SAMPLES] = str(error)
    return found | {name: value.detail for name, value in some.of(key).items() if isinstance(value, Refusal)}


def _uid(sidecars: Mapping[str, bytes]) -> str | None:
    document = parse_json(sidecars[_SIDECAR]) if _SIDECAR in sidecars else None
    uid = document.get("uid") if isinstance(document, dict) else None
    return uid if isinstance(uid, str) else None


def _augmentation(record: Any, size: int, width: int, height: int) -> Augmentation:
    """``[[top, left, height, width], [[op, magnitude], ...] or null]`` of an image. Raises Unreadable."""
    crop, ops = (*record, None)[:2] if isinstance(record, list) and record else (None, None)
    if not isinstance(crop, list) or len(crop) != 4 or not all(type(side) is int for side in crop):
        raise Unreadable(f"{_PARAMETERS}: {str(record)[:80]!r} has no crop")
    box = Crop(*crop)
    if min(crop) < 0 or min(crop[2:]) < 1 or box.top + box.height > height or box.left + box.width > width:
        raise Unreadable(
            f"{box} does not fit this image of {width} x {height}: it is another one, or was resized on its way here"
        )
    if ops is None:
        return Augmentation(box, size, None)
    if not isinstance(ops, list) or len(ops) > _MOST_OPS:
        raise Unreadable(f"{_PARAMETERS}: {str(ops)[:80]!r} are no operations")
    return Augmentation(box, size, tuple(map(_op, ops)))


def _op(pair: Any) -> Op:
    if isinstance(pair, list) and len(pair) == 2:
        which, magnitude = pair
        known = type(which) is int and 0 <= which < len(OPS)
        if known and type(magnitude) in (int, float) and abs(magnitude) <= _MOST_MAGNITUDE:
            return Op(OPS[which], float(np.float32(magnitude)))
    raise Unreadable(f"{_PARAMETERS}: {str(pair)[:80]!r} is no operation")


def _unpacked(data: bytes) -> dict[str, Floats]:
    """The float arrays of two dimensions in an npz. Nothing else of it is looked at."""
    arrays = {}
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        _check_size(sum(info.file_size for info in file.infolist()))
        for info in file.infolist():
            with file.open(info) as member:  # asked for so many bytes, it unpacks no more
                array = _array(member.read(info.file_size))
            if array is not None:
                arrays[info.filename.removesuffix(".npy")] = array
    return arrays


def _array(data: bytes) -> Floats | None:
    """A npy file; what its header says is believed only where the data is there."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
    shape, by_column, dtype = read(file)
    if dtype.kind != "f" or len(shape) != 2 or math.prod(shape) * dtype.itemsize != len(data) - file.tell():
        return None
    flat = np.frombuffer(data, dtype, offset=file.tell())
    return flat.reshape(shape, order="F" if by_column else "C").astype(np.float32)


def _loaded(data: bytes) -> dict[str, Floats]:
    """The float tensors of two dimensions in what ``torch.save`` wrote and gzip packed."""
    import torch

    with gzip.GzipFile(fileobj=io.BytesIO(data)) as packed:
        plain = packed.read(_MOST_BYTES + 1)
    _check_size(len(plain))
    with zipfile.ZipFile(io.BytesIO(plain)) as file:  # else torch would believe older files' sizes
        _check_size(sum(info.file_size for info in file.infolist()))
    found = torch.load(io.BytesIO(plain), map_location="cpu", weights_only=True)
    if not isinstance(found, dict):
        raise Unreadable("pth.gz holds no mapping")
    tensors = {
        name: value for name, value in found.items() if isinstance(name, str) and isinstance(value, torch.Tensor)
    }
    wanted = {name: value for name, value in tensors.items() if value.ndim == 2 and value.is_floating_point()}
    _check_size(4 * sum(value.numel() for value in wanted.values()))
    return {name: value.float().numpy() for name, value in wanted.items()}


def _check_size(count: int) -> None:
    if count > _MOST_BYTES:
        raise Unreadable(f"vectors of {count:,} bytes, more than {_MOST_BYTES:,}")


def _some(names: Iterable[object]) -> str:
    return ", ".join(map(str, list(names)[:10]))[:200] or "nothing"
