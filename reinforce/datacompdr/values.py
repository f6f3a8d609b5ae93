"""Augmentations, captions and vectors of one published sample, read from its members by the layers of a config."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np

from reinforce.config import Config
from reinforce.datacompdr.members import (
    CAPTIONS,
    PARAMETERS,
    VECTORS,
    Floats,
    Unreadable,
    list_names,
    parse_augmentation,
    parse_vectors,
)
from reinforce.dataset.augment.records import Augmentation, from_records
from reinforce.dataset.layers import TRUE_CAPTION, Layer
from reinforce.source.captions import clean_text, parse_json
from reinforce.source.samples import Refusal
from schemas import Reason
from teachers.published.family import PublishedTeacherSpec

_IMAGES, _TEXTS = "image_emb", "text_emb"  # names of arrays
_UNTAGGED = "syn_text"  # the list whose vectors may follow that of the true caption in text_emb
_NORM_RANGE = (0.9, 1.1)
LARGEST_IMAGE = (2**31, 2**31)  # any crop fits into it

#: Value of a row in a published layer: captions, embeddings [count, dim], or why it is null there.
PublishedValue: TypeAlias = "list[str] | Floats | Refusal"
#: The encoded members of a published sample, by name.
Members: TypeAlias = "Mapping[str, bytes]"


class PublishedReader:
    """Reads the members of samples for those of ``layers`` that are published."""

    def __init__(self, config: Config, layers: Iterable[Layer]) -> None:
        self._config = config
        self._layers = [layer for layer in layers if layer.published]

    def augmentations(self, members: Members, width: int, height: int) -> tuple[Augmentation, ...]:
        """The first ``augmentations.count`` records of a sample, for an image of this size. Raises Unreadable."""
        return _augmentations(self._config, members, width, height)

    def values(
        self, key: str, members: Members | Refusal, records: Sequence[Mapping[str, Any]] | None = None
    ) -> dict[str, PublishedValue]:
        """The value of a sample in each layer; ``members`` may be why it has none. ``records`` are the augmentations of
        a sample that is stored already: vectors of images must belong to them."""
        if isinstance(members, Refusal):
            return {layer.name: members for layer in self._layers}
        sample = _Sample(self._config, members, records)
        values: dict[str, PublishedValue] = {}
        for layer in self._layers:
            try:
                values[layer.name] = layer.kind.published_value(layer, sample)
            except Unreadable as error:
                values[layer.name] = Refusal(key, Reason.REINFORCEMENT_BROKEN, str(error))
        return values


class _Sample:
    """The values of a sample's members, by layer. All raise Unreadable."""

    def __init__(self, config: Config, members: Members, records: Sequence[Mapping[str, Any]] | None) -> None:
        self._config, self._members, self._records = config, members, records

    def captions(self, layer: Layer) -> list[str]:
        name = self._list_of(str(layer.model))
        document = _json(self._members, CAPTIONS)
        texts = document.get(name)
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise Unreadable(f"no list {name!r} of texts in {CAPTIONS}, which has: {list_names(document)}")
        if len(texts) < layer.count:
            raise Unreadable(f"{len(texts)} captions in {name!r}, expected {layer.count}: set `captions`")
        return [clean_text(text, self._config.input.limits.caption_chars) for text in texts[: layer.count]]

    def image_vectors(self, layer: Layer) -> Floats:
        if self._records is not None:
            published = _augmentations(self._config, self._members, *LARGEST_IMAGE)
            if [*published] != from_records(self._records):
                raise Unreadable(f"the crops of its vectors, in {PARAMETERS}, are not those of the stored sample")
        return self._vectors(layer, _IMAGES, 0)

    def text_vectors(self, layer: Layer) -> Floats:
        if layer.texts == TRUE_CAPTION:
            return self._vectors(layer, _TEXTS, 0)
        own = self._list_of(str(layer.texts))
        followed = own == _UNTAGGED and f"{own}_emb" not in self._arrays
        return self._vectors(layer, _TEXTS, 1) if followed else self._vectors(layer, f"{own}_emb", 0)

    @cached_property
    def _arrays(self) -> Mapping[str, Floats]:
        with np.errstate(all="ignore"):  # overflow is refused by the norm
            return _arrays(self._members)

    def _vectors(self, layer: Layer, name: str, first: int) -> Floats:
        """The layer's unit vectors [count, dim]: rows from ``first`` on and columns of one of a sample's arrays."""
        arrays = self._arrays
        if name not in arrays:
            raise Unreadable(f"no vectors {name!r}, only: {list_names(arrays)}")
        teacher = self._config.teachers[str(layer.model)]
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

    def _list_of(self, captioner: str) -> str:
        """The list of synthetic captions that a captioner of the config names."""
        return str(self._config.captioners[captioner].model)


def checked_norms(values: Floats, where: str) -> Floats:
    """The norms [count, 1] of somebody else's vectors [count, dim]. Raises Unreadable unless all are nearly 1."""
    with np.errstate(all="ignore"):
        norms = np.linalg.norm(values, axis=1, keepdims=True)
    if not (np.isfinite(norms).all() and _NORM_RANGE[0] < norms.min() and norms.max() < _NORM_RANGE[1]):
        raise Unreadable(f"{where}: norms of {norms.min():.3g} to {norms.max():.3g}, expected 1")
    return norms


def _augmentations(config: Config, members: Members, width: int, height: int) -> tuple[Augmentation, ...]:
    policy = config.augmentations
    records = _json(members, PARAMETERS).get("param_aug")
    if isinstance(records, str):
        records = parse_json(records.encode())
    if not isinstance(records, list) or len(records) < policy.count:
        count = len(records) if isinstance(records, list) else "no"
        raise Unreadable(f"{count} augmentations in {PARAMETERS}, expected {policy.count}: set augmentations.count")
    return tuple(parse_augmentation(record, policy.size, width, height) for record in records[: policy.count])


def _json(members: Members, name: str) -> dict[str, Any]:
    data = members.get(name)
    document = None if data is None else parse_json(data)
    if not isinstance(document, dict):
        raise Unreadable(f"no member {name}" if data is None else f"{name} is not a JSON object")
    return document


def _arrays(members: Members) -> dict[str, Floats]:
    for name in VECTORS:
        if (data := members.get(name)) is not None:
            return parse_vectors(name, data)
    raise Unreadable(f"no member {' or '.join(VECTORS)}")
