"""Published reinforcements such as DataCompDR and DFNDR: augmentations, captions and vectors for existing images.

A sample of such a tar has ``paug.json`` (augmentation parameters), ``syn.json`` (lists of synthetic captions) and the
vectors of all teachers, concatenated, in ``npz`` or ``pth.gz``. It may have an image or not.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np

from reinforce.config import Config
from reinforce.dataset.augment import Augmentation
from reinforce.dataset.layers import SAMPLES, TRUE_CAPTION, Layer
from reinforce.engine.published_members import (
    CAPTIONS,
    PARAMETERS,
    VECTORS,
    Floats,
    Unreadable,
    list_names,
    parse_augmentation,
    parse_vectors,
)
from reinforce.errors import StorageError, UserError
from reinforce.source.shards import RawSample, Refusal, read_shard
from reinforce.source.text import clean_text, parse_json
from reinforce.source.urls import canonical
from schemas import WHOLE_SHARD, Reason

_SIDECAR = "json"
_IMAGES, _TEXTS = "image_emb", "text_emb"  # names of arrays
_UNTAGGED = "syn_text"  # the list whose vectors may follow that of the true caption in text_emb
_NORM_RANGE = (0.9, 1.1)
_CHECKED_SAMPLES = 8
_LARGEST_IMAGE = (2**31, 2**31)  # any crop fits into it

#: Value of a row in a published layer: captions, embeddings [count, dim], or why it is null there.
PublishedValue: TypeAlias = "list[str] | Floats | Refusal"


class Reinforcements:
    """The published reinforcements of one shard, by key.

    The members are copied to an unnamed temporary file, since the source may have its images in another order.
    ``layers`` are the layers that are read from them; ``limit`` bounds the samples. ``refusals`` lists what could not
    be read of the shard. Methods that take a key can be called from several threads.
    """

    def __init__(self, url: str, config: Config, layers: Iterable[Layer], limit: int | None = None) -> None:
        self._config = config
        self._layers = [layer for layer in layers if layer.published]
        self._members: dict[str, dict[str, tuple[int, int]]] = {}  # offset and length, by key and name
        self._keys: dict[str, str] = {}  # by uid
        self._keys_with_uid: set[str] = set()
        self._matched: set[str] = set()
        self.refusals: list[Refusal] = []
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        offset = 0
        for item in itertools.islice(read_shard(url, config.input.limits, images=False), limit):
            if isinstance(item, Refusal):
                self.refusals.append(Refusal(item.key, item.reason, f"reinforcements: {item.detail}"))
                continue
            members = self._members[item.key] = {}
            if (uid := _uid(item.sidecars)) is not None:
                self._keys.setdefault(uid, item.key)
                self._keys_with_uid.add(item.key)
            for name in (PARAMETERS, CAPTIONS, *VECTORS):
                if name in item.left_out:
                    self.refusals.append(item.left_out[name])
                if (data := item.sidecars.get(name)) is not None:
                    members[name] = (offset, len(data))
                    with _disk_errors():
                        offset += self._file.write(data)
        with _disk_errors():
            self._file.flush()

    @property
    def shard_refusal(self) -> Refusal | None:
        """Why the shard as a whole cannot be read, or None."""
        return next((r for r in self.refusals if r.key is None and r.reason.value in WHOLE_SHARD), None)

    def close(self) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[str]:
        """The keys."""
        return iter(self._members)

    def match(self, raw: RawSample) -> str | None:
        """The key of a source sample's reinforcements, found by its ``uid``, else by its own key; None without any."""
        uid = _uid(raw.sidecars)
        key = raw.key if uid is None else self._keys.get(uid, uid)
        # A key whose reinforcements have a uid belongs to the sample of that uid.
        if key not in self._members and raw.key not in self._keys_with_uid:
            key = raw.key
        if key not in self._members:
            return None
        self._matched.add(key)
        return key

    def unmatched(self) -> Iterator[Refusal]:
        """Refusals of the reinforcements that no source sample has matched."""
        for key in self._members:
            if key not in self._matched:
                yield Refusal(key, Reason.NO_IMAGE, "reinforced, but the source's shard has no sample of this key")

    def augmentations(self, key: str, width: int, height: int) -> tuple[Augmentation, ...]:
        """The first ``augmentations.count`` records of a sample, for an image of this size. Raises Unreadable."""
        policy = self._config.augmentations
        records = self._json(key, PARAMETERS).get("param_aug")
        if isinstance(records, str):
            records = parse_json(records.encode())
        if not isinstance(records, list) or len(records) < policy.count:
            count = len(records) if isinstance(records, list) else "no"
            raise Unreadable(f"{count} augmentations in {PARAMETERS}, expected {policy.count}: set augmentations.count")
        return tuple(parse_augmentation(record, policy.size, width, height) for record in records[: policy.count])

    def values(self, key: str) -> dict[str, PublishedValue]:
        """The value of a sample in each layer."""
        if key not in self._members:
            refusal = Refusal(key, Reason.NOT_REINFORCED, "no longer among the reinforcements")
            return {layer.name: refusal for layer in self._layers}
        arrays: dict[str, Floats] = {}
        values: dict[str, PublishedValue] = {}
        for layer in self._layers:
            try:
                if layer.kind == "captions":
                    values[layer.name] = self._captions(key, layer)
                else:
                    with np.errstate(all="ignore"):  # overflow is refused by the norm
                        arrays = arrays or self._arrays(key)
                        values[layer.name] = self._vectors(arrays, layer)
            except Unreadable as error:
                values[layer.name] = Refusal(key, Reason.REINFORCEMENT_BROKEN, str(error))
        return values

    # -- members

    def _read(self, key: str, name: str) -> bytes | None:
        place = self._members[key].get(name)
        return None if place is None else os.pread(self._file.fileno(), place[1], place[0])  # threads share the file

    def _json(self, key: str, name: str) -> dict[str, Any]:
        data = self._read(key, name)
        document = None if data is None else parse_json(data)
        if not isinstance(document, dict):
            raise Unreadable(f"no member {name}" if data is None else f"{name} is not a JSON object")
        return document

    def _captions(self, key: str, layer: Layer) -> list[str]:
        name = self._list_of(str(layer.model))
        document = self._json(key, CAPTIONS)
        texts = document.get(name)
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise Unreadable(f"no list {name!r} of texts in {CAPTIONS}, which has: {list_names(document)}")
        if len(texts) < layer.count:
            raise Unreadable(f"{len(texts)} captions in {name!r}, expected {layer.count}: set `captions`")
        return [clean_text(text, self._config.input.limits.caption_chars) for text in texts[: layer.count]]

    def _arrays(self, key: str) -> dict[str, Floats]:
        for name in VECTORS:
            if (data := self._read(key, name)) is not None:
                return parse_vectors(name, data)
        raise Unreadable(f"no member {' or '.join(VECTORS)}")

    def _vectors(self, arrays: Mapping[str, Floats], layer: Layer) -> Floats:
        """The layer's unit vectors [count, dim]: rows and columns of one of a sample's arrays. Raises Unreadable."""
        name, first = _IMAGES, 0
        if layer.kind == "texts":
            name = _TEXTS
            if layer.texts != TRUE_CAPTION:
                own = self._list_of(str(layer.texts))
                name, first = (f"{own}_emb", 0) if f"{own}_emb" in arrays or own != _UNTAGGED else (_TEXTS, 1)
        if name not in arrays:
            raise Unreadable(f"no vectors {name!r}, only: {list_names(arrays)}")
        columns = self._config.teachers[str(layer.model)].columns
        assert columns is not None
        rows, width = arrays[name].shape
        if rows < first + layer.count or width < columns[1]:
            raise Unreadable(
                f"{name} has {rows} vectors of {width} numbers, expected {first + layer.count} with columns "
                f"{columns[0]} to {columns[1]} for {layer.model}"
            )
        part = arrays[name][first : first + layer.count, columns[0] : columns[1]]
        norms = np.linalg.norm(part, axis=1, keepdims=True)
        if not (np.isfinite(norms).all() and _NORM_RANGE[0] < norms.min() and norms.max() < _NORM_RANGE[1]):
            raise Unreadable(
                f"{name}: norms of {norms.min():.3g} to {norms.max():.3g} in columns {columns[0]} to {columns[1]}, "
                "expected 1"
            )
        unit: Floats = part / norms
        return unit

    def _list_of(self, captioner: str) -> str:
        """The list of synthetic captions that a captioner of the config names."""
        return str(self._config.captioners[captioner].model)


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    """Turn an error of the temporary file into a StorageError that says what to do."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"reinforcements cannot be copied to {tempfile.gettempdir()}: {error}; make room there, or set TMPDIR."
        ) from error


def check_reinforcements(url: str, config: Config, layers: Iterable[Layer]) -> None:
    """Raise UserError if the config does not fit these reinforcements: some layer is unreadable in all of the first
    samples of a shard."""
    with contextlib.closing(Reinforcements(url, config, layers, _CHECKED_SAMPLES)) as reinforcements:
        errors = [_layer_errors(reinforcements, key) for key in reinforcements]
    for layer in errors[0] if errors else ():
        if all(layer in others for others in errors):
            raise UserError(
                f"{layer}: cannot be read from any of the first {len(errors)} samples of {canonical(url)}: "
                f"{errors[0][layer]}"
            )


def _layer_errors(reinforcements: Reinforcements, key: str) -> dict[str, str]:
    """What cannot be read of a sample, by layer, independently of its image."""
    errors = {}
    try:
        reinforcements.augmentations(key, *_LARGEST_IMAGE)
    except Unreadable as error:
        errors[SAMPLES] = str(error)
    return errors | {
        name: value.detail for name, value in reinforcements.values(key).items() if isinstance(value, Refusal)
    }


def _uid(sidecars: Mapping[str, bytes]) -> str | None:
    document = parse_json(sidecars[_SIDECAR]) if _SIDECAR in sidecars else None
    uid = document.get("uid") if isinstance(document, dict) else None
    return uid if isinstance(uid, str) else None
