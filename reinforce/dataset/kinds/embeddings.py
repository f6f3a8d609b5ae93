"""Embeddings of a teacher: of the augmented images [K, D], or of the texts of a row [1 or N, D]."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

import schemas
from reinforce.dataset import vectors
from reinforce.dataset.codecs.base import Codec
from reinforce.dataset.codecs.codebooks import find_codec
from reinforce.dataset.layers import (
    SAMPLES,
    TRUE_CAPTION,
    Comparison,
    Content,
    Layer,
    LayerKind,
    PickedValues,
    Recorded,
    TargetTensor,
    captions_layer,
    compute_fingerprint,
    embeddings_layer,
    inputs_of,
    mapping_at,
)
from reinforce.errors import UserError
from reinforce.source.config import IMAGES_ALONE

if TYPE_CHECKING:
    from reinforce.config import Config
    from teachers.spec import ModelInfo

_FLOAT_ERROR = 2e-3  # of the norm of a vector that is stored in float16


class _Embeddings(LayerKind):
    level = 2
    columns = ("key", "embeddings")
    values = "embeddings"
    section = target_section = "teachers"
    model_key = "teacher"
    tensors: ClassVar = {"embeddings": 2, "scales": 1}
    stored_plain = ("embeddings",)
    vectors = True
    taken = True
    required = ("count", "dim", "dtype")
    unusable = "NaN or zero"
    file_schemas = tuple(schemas.embeddings_schema(1, 1, dtype) for dtype in ("float16", "float32", "int8", "uint8"))

    def layers(
        self, config: Config, infos: Mapping[tuple[str, str], ModelInfo], known: Mapping[str, Layer]
    ) -> Iterable[Layer]:
        for name, teacher in config.teachers.items():
            info = infos["teachers", name]
            try:
                codec = find_codec(teacher.codec)
            except ValueError as error:
                raise UserError(f"teachers.{name}.codec: {error}") from None
            for inputs, count in self._sides(config, name, info):
                layer = embeddings_layer(name, inputs)
                needs = self.inputs(layer, {})
                codebook = {"digest": info.codebooks.get(layer), "sample": teacher.codec_sample}
                kept = codebook if codec.fitted else None
                recipe = {"source": known[needs[-1]].fingerprint, "model": info.identity, "dtype": codec.name}
                recipe |= {"codebook": dict(codebook)} if codec.fitted else {}
                yield Layer(
                    layer,
                    self,
                    compute_fingerprint({**recipe, "what": self.name}),
                    needs=needs,
                    model=name,
                    texts=None if self.crops else inputs,
                    count=count,
                    dim=None if info.dim is None else _dim_of(name, codec, info.dim),
                    dtype=codec.name,
                    codebook=kept,
                    published=teacher.published,
                    recipe=recipe,
                    code=info.code,
                    sees="crops" if self.crops else None,
                )

    @abstractmethod
    def _sides(self, config: Config, name: str, info: ModelInfo) -> Iterable[tuple[str, int]]:
        """What a teacher, by its name, encodes in layers of this kind, and the number of vectors of a row."""

    def schema(self, layer: Layer, images: str) -> pa.Schema:
        assert layer.dim is not None
        codec = find_codec(layer.dtype)
        return schemas.embeddings_schema(
            layer.count, codec.width(_dim_of(layer.model, codec, layer.dim)), codec.numbers
        )

    def entry(self, layer: Layer, stated: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "teacher": layer.model,
            "texts": layer.texts,
            "count": layer.count,
            "dim": stated.get("dim") and _dim_of(layer.model, find_codec(layer.dtype), stated["dim"]),
            "dtype": layer.dtype,
            **({} if layer.codebook is None else {"codebook": dict(layer.codebook)}),
        }

    def stored(self, name: str, entry: Mapping[str, Any]) -> Layer:
        found = super().stored(name, entry)
        if find_codec(entry["dtype"]).fitted != (entry.get("codebook") is not None):
            raise ValueError(f"a layer in {entry['dtype']} has a codebook exactly if its codec is fitted")
        return found

    def recorded(self, layer: Layer, manifest: Mapping[str, Any]) -> Recorded:
        _, before, now = super().recorded(layer, manifest)
        source = mapping_at(manifest, "layers", self.inputs(layer.name, {})[-1])
        fingerprint = None
        if before and source:
            recipe = {"source": source.get("fingerprint"), "model": {**before}, "dtype": layer.dtype, "what": self.name}
            recipe |= {} if layer.codebook is None else {"codebook": dict(layer.codebook)}
            fingerprint = compute_fingerprint(recipe)
        entry = mapping_at(manifest, "layers", layer.name)
        if "dtype" in entry:
            before["dtype"], now["dtype"] = entry["dtype"], layer.dtype
        if "codebook" in entry and layer.codebook is not None:
            before["codebook"], now["codebook"] = entry["codebook"], layer.codebook
        return Recorded(fingerprint, before, now)

    def wrong_rows(self, layer: Layer, table: pa.Table, records: int | None) -> Iterator[tuple[str, Any]]:
        column = table["embeddings"]
        shape, names = [*column.type.shape], {"halffloat": "float16", "float": "float32"}
        found = names.get(str(column.type.value_type), str(column.type.value_type))
        codec = find_codec(layer.dtype)
        width = None if layer.dim is None else codec.width(layer.dim)
        if shape != [layer.count, width or shape[1]] or found != codec.numbers:
            stated = f"{codec.numbers} {[layer.count, width]}"
            every = np.ones(table.num_rows, np.bool_)
            yield f"have {found} vectors of shape {shape}, dataset.json states {stated}", every
            return
        if codec.fitted:  # every code has a vector, which is decoded at unit norm
            return
        values = vectors.decode(table)
        norms = np.sqrt(np.einsum("rcd,rcd->rc", values, values))
        tolerance: Any = vectors.NORM_TOLERANCE + _FLOAT_ERROR
        if "scales" in table.column_names:  # [rows, count], from the step of each vector
            tolerance = vectors.NORM_TOLERANCE + vectors.tensor_rows(table["scales"])[0] * (0.5 * np.sqrt(shape[1]))
        wrong = ~(np.abs(norms - 1) <= tolerance).all(axis=1)
        yield "have a vector whose norm is not 1", wrong & np.asarray(column.is_valid())

    def vectors_to_fit(self, layer: Layer, table: pa.Table) -> npt.NDArray[np.float16]:
        found = vectors.decode(table)
        return found[~np.isnan(found).any(axis=(1, 2))].reshape(-1, found.shape[2]).astype(np.float16)

    def decode(self, table: pa.Table) -> npt.NDArray[np.float32]:
        return vectors.decode(table)

    def compare(self, first: pa.Table, second: pa.Table) -> Comparison:
        one, other = vectors.decode(first), vectors.decode(second)
        found = Comparison.of_numbers(one, other)
        if one.shape == other.shape:
            both = ~(np.isnan(one) | np.isnan(other)).any(axis=(1, 2))
            one, other = one[both], other[both]
            found.add_cosines(vectors.cosines(one, other), (one == other).all(axis=(1, 2)))
        return found

    def target_tensors(self, entry: Mapping[str, Any]) -> tuple[TargetTensor, ...]:
        return (TargetTensor("", "float32", (entry["dim"],)),)

    def pick(self, table: pa.Table, index: npt.NDArray[np.intp]) -> PickedValues:
        picked, stored, unit = vectors.pick(table, index)
        return PickedValues((picked,), stored, unit)

    def content(self, layer: Layer) -> Content:
        short = f"[{layer.count}, {layer.dim}] {layer.dtype}"
        of = "images" if self.crops else f"captions of {layer.texts}"
        if layer.texts == TRUE_CAPTION:
            of = "true caption" if layer.count == 1 else "true captions"
        card = f"{short}, of {'augmented images' if self.crops else 'texts'}, flat"
        return Content(short, card, f"{of}, {layer.count} \u00d7 {layer.dim} {layer.dtype}")


class ImageEmbeddings(_Embeddings):
    name = "images"
    pattern = embeddings_layer("*", "images")
    unit = "images"
    producer = "embeddings:ImageEmbeddingsProducer"
    crops = True
    picks = "crop"

    def _sides(self, config: Config, name: str, info: ModelInfo) -> Iterable[tuple[str, int]]:
        if config.teachers[name].published and config.augmentations.own:
            return []  # the crops of published vectors are unknown
        return [("images", config.augmentations.count)] if info.images else []


class TextEmbeddings(_Embeddings):
    name = "texts"
    pattern = embeddings_layer("*", "*")
    unit = "texts"
    producer = "embeddings:TextEmbeddingsProducer"
    picks = "text"

    def inputs(self, name: str, entry: Mapping[str, Any]) -> tuple[str, ...]:
        texts = inputs_of(name)
        return (SAMPLES,) if texts == TRUE_CAPTION else (SAMPLES, captions_layer(texts))

    def _sides(self, config: Config, name: str, info: ModelInfo) -> Iterable[tuple[str, int]]:
        from teachers.published import PublishedTeacherSpec

        if not info.texts:
            return []
        teacher = config.teachers[name]
        synthetic = [
            (captioner, spec.count)
            for captioner, spec in config.captioners.items()
            if spec.published or not teacher.published
        ]
        most = config.input.captions_per_sample or 1
        if most > 1 and isinstance(teacher, PublishedTeacherSpec):
            raise UserError("input.captions_per_sample: published vectors are of one true caption. Remove it.")
        if not info.images and not synthetic:
            config.input.require_captions(f"teachers.{name}")
        if config.input.captions == IMAGES_ALONE:
            return synthetic
        return [(TRUE_CAPTION, most), *synthetic]


def _dim_of(teacher: str | None, codec: Codec, dim: int) -> int:
    """Length of the decoded vectors of a teacher. Raises UserError if its codec cannot store them."""
    try:
        return codec.dim(dim)
    except ValueError as error:
        raise UserError(f"teachers.{teacher}.codec: {error}") from None
