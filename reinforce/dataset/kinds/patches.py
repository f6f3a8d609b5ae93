"""Patch features of a teacher: for each augmented image the grid of its patch vectors, standardised by channel.

A row has [K, N * width] stored numbers: for each of K crops its N = rows * columns patches, row by row from the top
left, each in ``width`` numbers of the codec. The codebook has the statistics, and those of the codec.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

import schemas
from reinforce.dataset import vectors
from reinforce.dataset.codecs.base import Codec
from reinforce.dataset.codecs.codebooks import Codebook, codebook_of, find_codec
from reinforce.dataset.codecs.plain import MEAN, Standardised
from reinforce.dataset.layers import (
    SAMPLES,
    Comparison,
    Content,
    Layer,
    LayerKind,
    PickedValues,
    Recorded,
    TargetEncoder,
    TargetTensor,
    compute_fingerprint,
    mapping_at,
)
from reinforce.errors import UserError

if TYPE_CHECKING:
    from reinforce.config import Config
    from teachers.spec import ModelInfo

Floats = npt.NDArray[np.float32]
_NUMBERS = {"float16": pa.float16(), "uint8": pa.uint8()}
_COMPARED_ROWS = 16  # that are decoded at a time
_BYTES = {"float16": 2, "uint8": 1}


@dataclass(frozen=True)
class PatchGrids:
    """The stored grids of a row, [K, N * width], which are decoded one at a time."""

    stored: npt.NDArray[Any]
    codebook: Codebook

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, crop: int) -> Floats:
        """The standardised patch vectors of a crop, float32 [rows, columns, D]."""
        return _decoded(self.stored[crop], self.codebook)


@dataclass(frozen=True)
class PickedGrid:
    """The stored grid of a crop, [N * width], as an array float16 [h, w, D] that is decoded when it is used."""

    stored: npt.NDArray[Any]
    codebook: Codebook

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codebook.facts["grid"], len(self.codebook.arrays[MEAN]))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return _decoded(self.stored, self.codebook).astype(dtype or np.float16)


def _schema(numbers: str, count: int, width: int) -> pa.Schema:
    text = "patches of each augmented image, row by row: standardised values, or codes"
    return schemas.tensors_schema(("patches", _NUMBERS[numbers], [count, width], text))


class PatchFeatures(LayerKind):
    name = "patches"
    pattern = "patches/*"
    level = 2
    columns = ("key", "patches")
    values = "patches"
    unit = "images"
    producer = "patches:PatchFeaturesProducer"
    section = "teachers"
    model_key = "teacher"
    required = ("teacher", "count", "dim", "dtype", "grid", "codebook")
    tensors: ClassVar = {"patches": 2}
    stored_plain = kept_as_stored = ("patches",)
    crops = True
    picks = "crop"
    target_section = "patches"
    unusable = "NaN"
    codec_key = "patches.codec"
    sample_key = "patches.sample"
    file_schemas = (_schema("float16", 1, 1), _schema("uint8", 1, 1))

    def layers(
        self, config: Config, infos: Mapping[tuple[str, str], ModelInfo], known: Mapping[str, Layer]
    ) -> Iterable[Layer]:
        for name, teacher in config.teachers.items():
            patches, info = teacher.patches, infos["teachers", name]
            if patches is None:
                continue
            if not info.images:
                raise UserError(f"teachers.{name}.patches: this teacher encodes no images; remove it")
            layer = f"patches/{name}"
            codebook = {"digest": info.codebooks.get(layer), "sample": patches.sample}
            settings: dict[str, Any] = {"grid": [*patches.shape], "codec": patches.codec, "codebook": codebook}
            if patches.picked is not None:
                settings |= {"codec": "float16", "picked": patches.picked}
                del settings["codebook"]
            recipe = {"samples": known[SAMPLES].fingerprint, "model": info.identity, "patches": settings}
            found = Layer(
                layer,
                self,
                compute_fingerprint(recipe),
                needs=(SAMPLES,),
                model=name,
                count=config.augmentations.count,
                dtype=patches.codec,
                codebook=settings.get("codebook"),
                recipe=recipe,
                code=info.code,
                sees="crops",
            )
            self.codec(found)  # raises what is wrong
            yield found

    def encoder(self, model: Any, device: Any) -> TargetEncoder:
        from teachers.image_encoder import patches_of

        found = patches_of(model, device)
        entry = {"grid": [found.rows, found.columns], "dim": found.dim}
        return TargetEncoder("patches", found.image, found.encode_patches, entry)

    def codec(self, layer: Layer) -> Codec:
        try:
            codec = Standardised(find_codec(layer.dtype))
            codec.facts = {"grid": layer.recipe["patches"]["grid"]}
            return codec
        except ValueError as error:
            raise UserError(f"teachers.{layer.model}.patches.codec: {error}") from None

    def vectors_to_fit(self, layer: Layer, table: pa.Table) -> npt.NDArray[np.float16]:
        """The patches that a run has picked."""
        from teachers.spec import Patches

        stored, valid = vectors.tensor_rows(table["patches"])
        picked = Patches(grid=tuple(layer.recipe["patches"]["grid"])).fewer
        return np.asarray(stored[valid].reshape(-1, stored.shape[2] // picked), np.float16)

    def schema(self, layer: Layer, images: str) -> pa.Schema:
        assert layer.dim is not None
        settings = layer.recipe["patches"]
        if layer.codebook is None:
            return _schema("float16", layer.count, settings["picked"] * layer.dim)
        codec = self.codec(layer)
        return _schema(codec.numbers, layer.count, math.prod(settings["grid"]) * codec.width(layer.dim))

    def row_bytes(self, layer: Layer, sample: float) -> float | None:
        if layer.dim is None and not find_codec(layer.dtype).fitted:
            return None
        codec = self.codec(layer)
        vector = codec.width(layer.dim or 0) * _BYTES[codec.numbers]
        return layer.count * math.prod(layer.recipe["patches"]["grid"]) * vector

    def entry(self, layer: Layer, stated: Mapping[str, Any]) -> dict[str, Any]:
        settings, dim = layer.recipe["patches"], stated.get(self.name, stated).get("dim")
        own = {"grid": settings["grid"], "codebook": settings.get("codebook")}
        picked = {"picked": settings["picked"]} if "picked" in settings else {}
        return {"teacher": layer.model, "count": layer.count, "dim": dim, "dtype": layer.dtype, **own, **picked}

    def stored(self, name: str, entry: Mapping[str, Any]) -> Layer:
        found, grid = super().stored(name, entry), entry["grid"]
        if not (
            isinstance(grid, list) and len(grid) == 2 and all(type(side) is int and 0 < side <= 1024 for side in grid)
        ):
            raise ValueError("grid must be [rows, columns]")
        if (entry["codebook"] is None) != ("picked" in entry):
            raise ValueError("a layer of patches without codebook")
        settings = {"grid": grid, "codec": entry["dtype"], "codebook": entry["codebook"]}
        return replace(found, recipe={"patches": settings})

    def recorded(self, layer: Layer, manifest: Mapping[str, Any]) -> Recorded:
        _, before, now = super().recorded(layer, manifest)
        entry, samples = (mapping_at(manifest, "layers", name) for name in (layer.name, SAMPLES))
        fingerprint = None
        if before and samples and layer.codebook is not None:
            recipe = {"samples": samples.get("fingerprint"), "model": {**before}, "patches": layer.recipe["patches"]}
            fingerprint = compute_fingerprint(recipe)
        if "grid" in entry:
            before["patches"] = {"grid": entry["grid"], "codec": entry["dtype"], "codebook": entry["codebook"]}
            now["patches"] = layer.recipe["patches"]
        return Recorded(fingerprint, before, now)

    def wrong_rows(self, layer: Layer, table: pa.Table, records: int | None) -> Iterator[tuple[str, Any]]:
        if layer.codebook is None:
            return
        type_, codec = table["patches"].type, self.codec(layer)
        width = type_.shape[1] // math.prod(layer.recipe["patches"]["grid"])
        shape = [layer.count, math.prod(layer.recipe["patches"]["grid"]) * codec.width(layer.dim or width)]
        if [*type_.shape] != shape or type_.value_type != _NUMBERS[codec.numbers]:
            every = np.ones(table.num_rows, np.bool_)
            yield f"have patches of shape {[*type_.shape]} in {type_.value_type}, dataset.json states {shape}", every

    def decode(self, table: pa.Table) -> list[PatchGrids | None]:
        stored, valid = vectors.tensor_rows(table["patches"])
        codebook = _codebook(table)
        return [PatchGrids(row, codebook) if one else None for row, one in zip(stored, valid, strict=True)]

    def compare(self, first: pa.Table, second: pa.Table) -> Comparison:
        (one, valid), (other, also) = (vectors.tensor_rows(table["patches"]) for table in (first, second))
        found = Comparison(len(first), nulls=int((valid != also).sum()))
        if one.shape[:2] != other.shape[:2]:
            return found
        codebooks, both = (_codebook(first), _codebook(second)), np.flatnonzero(valid & also)
        found.equal = int((~(valid | also)).sum())
        for start in range(0, len(both), _COMPARED_ROWS):
            rows = both[start : start + _COMPARED_ROWS]
            left, right = (_decoded(of[rows], book) for of, book in zip((one, other), codebooks, strict=True))
            if left.shape != right.shape:
                return found
            flat = [side.reshape(len(rows), -1, side.shape[-1]) for side in (left, right)]
            found.add_cosines(vectors.cosines(*flat), (left == right).reshape(len(rows), -1).all(axis=1))
            found.difference = max(found.difference or 0.0, float(np.abs(left - right).max()))
            found.equal += int((left == right).reshape(len(rows), -1).all(axis=1).sum())
        return found

    def target_tensors(self, entry: Mapping[str, Any]) -> tuple[TargetTensor, ...]:
        return (TargetTensor("patches", "float16", (*entry["grid"], entry["dim"])),)

    def pick(self, table: pa.Table, index: npt.NDArray[np.intp]) -> PickedValues:
        """The standardised grid of one crop of each row, float16 [h, w, D], which NumPy decodes when it is used: an
        example that waits for its batch holds the stored numbers."""

        stored, valid = vectors.tensor_rows(table["patches"])
        picked, codebook = stored[np.arange(len(index)), index], _codebook(table)
        grids: Any = [PickedGrid(one, codebook) for one in picked]
        return PickedValues((grids,), valid, valid & np.isfinite(picked).all(axis=1))

    def content(self, layer: Layer) -> Content:
        rows, columns = layer.recipe["patches"]["grid"]
        short = f"[{layer.count}, {rows}, {columns}, {layer.dim}] {layer.dtype}"
        report = f"patches of images, {layer.count} × {rows} × {columns} × {layer.dim} {layer.dtype}"
        return Content(short, f"{short}, patches of augmented images, flat", report)

    def pictures(self, value: Any, count: int) -> npt.NDArray[np.uint8]:
        """Grids as colours: the first three principal components of the patches of these crops, each from its 1st to
        its 99th percentile. Signs are those with which most of a component's weight is positive."""
        if value is None:
            return super().pictures(value, count)
        grids = np.stack([value[crop] for crop in range(min(count, len(value)))])
        rows = np.nan_to_num(grids.reshape(-1, grids.shape[-1]))
        rows = rows - rows.mean(axis=0)
        _, directions = np.linalg.eigh(rows.T @ rows)
        directions = directions[:, :-4:-1]  # of the largest eigenvalues
        found = rows @ (directions * np.where(directions.sum(axis=0) < 0, -1, 1))
        low, high = np.percentile(found, [1, 99], axis=0)
        levels = 255 * np.clip((found - low) / np.maximum(high - low, 1e-6), 0, 1)
        colours = np.zeros((len(rows), 3), np.uint8)
        colours[:, : levels.shape[1]] = levels.round()
        return colours.reshape(*grids.shape[:-1], 3)


def _codebook(table: pa.Table) -> Codebook:
    found = codebook_of(table.schema.metadata)
    if found is None or "grid" not in found.facts:
        raise ValueError("a column of patches without the place of its codebook")
    return found


def _decoded(stored: npt.NDArray[Any], codebook: Codebook) -> Floats:
    """Standardised values [..., h, w, D] of stored grids [..., N * width]."""
    rows, columns = codebook.facts["grid"]
    codes = stored.reshape(*stored.shape[:-1], rows * columns, stored.shape[-1] // (rows * columns))
    values = codebook.decode(codes)
    return values.reshape(*stored.shape[:-1], rows, columns, values.shape[-1])
