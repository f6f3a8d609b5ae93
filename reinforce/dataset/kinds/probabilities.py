"""Probabilities of classes: the k most likely classes of each crop, or of the image as a whole, and the rest's sum."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

import schemas
from reinforce.dataset import vectors
from reinforce.dataset.layers import (
    SAMPLES,
    Comparison,
    Content,
    Layer,
    LayerKind,
    PickedValues,
    Recorded,
    TargetTensor,
    compute_fingerprint,
    mapping_at,
)
from teachers.protocols import LEAST_TEMPERATURE, MOST_TEMPERATURE

if TYPE_CHECKING:
    from reinforce.config import Config
    from teachers.spec import ModelInfo

Floats = npt.NDArray[np.float32]

#: How far the sum of a cell may be from 1, since probabilities are stored in float16.
_SUM_ERROR = 2e-3
#: Keys of an entry that the fingerprint covers, besides the model.
_SETTINGS = ("top", "temperature", "sees")


class Probabilities(NamedTuple):
    """The most likely classes, the most likely first, their probabilities, and the sum of those of all other classes.

    Of rows: int32 [rows, K, k], float32 [rows, K, k], float32 [rows, K], and a mask [rows] of the rows that are not
    null; the others are arbitrary. K cells are those of the augmentation records, or one of the image as a whole.
    """

    classes: npt.NDArray[np.int32]
    values: Floats
    rest: Floats
    valid: npt.NDArray[np.bool_]


def read(data: pa.Table | pa.RecordBatch) -> Probabilities:
    """The probabilities of rows in columns of the layer."""
    (classes, first), (values, second), (rest, third) = (
        vectors.tensor_rows(data.column(name)) for name in ("classes", "probabilities", "rest")
    )
    return Probabilities(classes, values.astype(np.float32), rest, first & second & third)


def _schema(count: int, top: int) -> pa.Schema:
    return schemas.tensors_schema(
        ("classes", pa.int32(), [count, top], "the most likely classes, the most likely first"),
        ("probabilities", pa.float16(), [count, top], "their probabilities"),
        ("rest", pa.float32(), [count], "sum of the probabilities of all other classes"),
    )


class ClassProbabilities(LayerKind):
    name = "probabilities"
    pattern = "probabilities/*"
    level = 1
    columns = ("key", "classes", "probabilities", "rest")
    values = "probabilities"
    unit = "images"
    producer = "probabilities:ClassProbabilitiesProducer"
    section = target_section = "classifiers"
    model_key = "classifier"
    required = ("classifier", "count", "dim", "model", *_SETTINGS)
    tensors: ClassVar = {"classes": 2, "probabilities": 2, "rest": 1}
    crops = True
    picks = "crop"
    unusable = "no distribution"
    file_schemas = (_schema(1, 1),)

    def layers(
        self, config: Config, infos: Mapping[tuple[str, str], ModelInfo], known: Mapping[str, Layer]
    ) -> Iterable[Layer]:
        for name, classifier in config.classifiers.items():
            info = infos[self.section, name]
            settings = {"top": classifier.k, "temperature": classifier.temperature, "sees": classifier.sees}
            recipe = {"samples": known[SAMPLES].fingerprint, "model": dict(info.identity), **settings}
            yield Layer(
                f"probabilities/{name}",
                self,
                compute_fingerprint(recipe),
                needs=(SAMPLES,),
                model=name,
                count=config.augmentations.count if classifier.sees == "crops" else 1,
                dim=info.dim,
                recipe=recipe,
                code=info.code,
                sees=classifier.sees,
            )

    def schema(self, layer: Layer, images: str) -> pa.Schema:
        return _schema(layer.count, layer.recipe["top"])

    def entry(self, layer: Layer, stated: Mapping[str, Any]) -> dict[str, Any]:
        names = {"names": [*stated["names"]]} if stated.get("names") else {}
        settings = {key: layer.recipe[key] for key in ("model", *_SETTINGS)}
        return {"classifier": layer.model, "count": layer.count, "dim": stated.get("dim"), **settings, **names}

    def stored(self, name: str, entry: Mapping[str, Any]) -> Layer:
        found = super().stored(name, entry)
        top, temperature = entry["top"], entry["temperature"]
        if type(top) is not int or not 1 <= top <= (entry["dim"] or math.inf):
            raise ValueError("top must be a number of classes, at most dim")
        for key, right in (("classifier", str), ("model", Mapping), ("sees", str)):
            if not isinstance(entry[key], right):
                raise ValueError(f"{key} must be a {right.__name__}")
        if type(temperature) not in (int, float) or not LEAST_TEMPERATURE <= temperature <= MOST_TEMPERATURE:
            raise ValueError(f"temperature must be a number from {LEAST_TEMPERATURE:g} to {MOST_TEMPERATURE:g}")
        return replace(found, recipe={key: entry[key] for key in ("model", *_SETTINGS)})

    def recorded(self, layer: Layer, manifest: Mapping[str, Any]) -> Recorded:
        entry, samples = (mapping_at(manifest, "layers", name) for name in (layer.name, SAMPLES))
        keys = ("model", *_SETTINGS)
        before, now = ({key: of[key] for key in keys if key in of} for of in (entry, layer.recipe))
        whole = len(before) == len(keys) and samples
        fingerprint = compute_fingerprint({"samples": samples.get("fingerprint"), **before}) if whole else None
        return Recorded(fingerprint, before, now if before else {})

    def differs(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
        if before.get("dim") not in (None, now.get("dim")):
            return f"it has {now.get('dim')} classes, before {before['dim']}"
        names, found = before.get("names"), now.get("names")
        if not names or names == found:
            return None
        if not found:
            return f"its classes have no names, before {len(names):,}, the first {names[0]!r}"
        pairs = [*itertools.zip_longest(names, found)]
        places = [place for place, (one, other) in enumerate(pairs) if one != other]
        one, other = pairs[places[0]]
        return (
            f"{len(places):,} of its {len(pairs):,} classes have other names than before, such as class {places[0]}: "
            f"{other!r}, before {one!r}"
        )

    def wrong_rows(self, layer: Layer, table: pa.Table, records: int | None) -> Iterator[tuple[str, Any]]:
        expected = self.schema(layer, "")
        if differing := [name for name in self.columns if table[name].type != expected.field(name).type]:
            types = f"{table[differing[0]].type}, dataset.json states {expected.field(differing[0]).type}"
            yield f"have {differing[0]} of type {types}", np.ones(table.num_rows, np.bool_)
            return
        found = read(table)
        nulls = np.stack([np.asarray(table[name].is_null()) for name in self.tensors])
        yield "are null in some columns only", nulls.any(axis=0) & ~nulls.all(axis=0)
        cells = np.concatenate([found.values, found.rest[..., None]], axis=2)
        in_range = (found.classes >= 0) & (found.classes < (layer.dim or np.inf))
        right_cells = {
            "have a probability that is not between 0 and 1": (cells >= 0) & (cells <= 1),
            "have probabilities whose sum is not 1": np.abs(cells.sum(axis=2) - 1) <= _SUM_ERROR,
            "do not have the most likely class first": found.values[..., 1:] <= found.values[..., :-1],
            f"have a class that is not one of {layer.dim}": in_range,
            "have a class twice": np.diff(np.sort(found.classes, axis=2), axis=2) != 0,
        }
        for what, right in right_cells.items():
            yield what, found.valid & ~right.reshape(len(right), -1).all(axis=1)

    def decode(self, table: pa.Table) -> list[Probabilities | None]:
        rows = zip(*read(table), strict=True)
        return [Probabilities(*row) if row[-1] else None for row in rows]

    def numbers(self, table: pa.Table) -> Mapping[str, Floats]:
        found = read(table)
        numbers = {"largest": found.values[..., :1].mean(axis=(1, 2)), "rest": found.rest.mean(axis=1)}
        return {name: np.where(found.valid, values, np.float32(np.nan)) for name, values in numbers.items()}

    def compare(self, first: pa.Table, second: pa.Table) -> Comparison:
        one, other = read(first), read(second)
        result = Comparison(len(first), nulls=int((one.valid != other.valid).sum()))
        if one.values.shape != other.values.shape:
            return result
        both = one.valid & other.valid
        same = both & np.all(
            [(a == b).reshape(len(a), -1).all(axis=1) for a, b in zip(one, other, strict=True)], axis=0
        )
        result.equal = int((same | ~(one.valid | other.valid)).sum())
        if both.any():
            one, other = (Probabilities._make(column[both] for column in side) for side in (one, other))
            # Cosines [rows, K], with the rest as one more class; a class counts as 0 where it is not stored.
            shared = one.classes[..., :, None] == other.classes[..., None, :]
            dot = np.einsum("rki,rkij,rkj->rk", one.values, shared, other.values) + one.rest * other.rest
            norms = [np.sqrt((side.values**2).sum(axis=2) + side.rest**2) for side in (one, other)]
            cosines = dot / np.maximum(norms[0] * norms[1], np.finfo(np.float32).tiny)
            result.add_cosines(cosines.astype(np.float32), same[both])
            differences = (np.abs(one.values - other.values).max(), np.abs(one.rest - other.rest).max())
            result.difference = float(max(differences))
        return result

    def target_tensors(self, entry: Mapping[str, Any]) -> tuple[TargetTensor, ...]:
        top = entry["top"]
        return (
            TargetTensor("classes", "int32", (top,), entry["dim"]),
            TargetTensor("probabilities", "float32", (top,)),
            TargetTensor("rest", "float32", ()),
        )

    def pick(self, table: pa.Table, index: npt.NDArray[np.intp]) -> PickedValues:
        found = read(table)
        cell = np.arange(len(index)), index if found.rest.shape[1] > 1 else 0  # that of the image as a whole
        classes, values, rest = found.classes[cell], found.values[cell], found.rest[cell]
        cells = np.concatenate([values, rest[:, None]], axis=1)
        right = (cells >= 0).all(axis=1) & (np.abs(cells.sum(axis=1) - 1) <= _SUM_ERROR)
        return PickedValues((classes, values, rest), found.valid, found.valid & right)

    def content(self, layer: Layer) -> Content:
        of = "crops" if layer.recipe["sees"] == "crops" else "images"
        many = f"{of}, {layer.count} × the {layer.recipe['top']} most likely of {layer.dim} classes"
        return Content(f"[{layer.count}, {layer.recipe['top']}] of {layer.dim} classes", many, many)
