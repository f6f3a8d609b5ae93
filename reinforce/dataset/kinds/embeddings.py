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
    Layer,
    LayerKind,
    PickedValues,
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
_NUMBERS = ("float16", "float32", "int8", "uint8")  # in which vectors are stored


class _Embeddings(LayerKind):
    level = 2
    columns = ("key", "embeddings")
    values = "embeddings"
    section = "teachers"
    model_key = "teacher"
    tensors: ClassVar = {"embeddings": 2, "scales": 1}
    stored_plain = ("embeddings",)
    vectors = True
    taken = True
    required = ("count", "dim", "dtype")
    unusable = "NaN or zero"

    def layers(
        self, config: Config, infos: Mapping[tuple[str, str], ModelInfo], known: Mapping[str, Layer]
    ) -> Iterable[Layer]:
        for name, teacher in config.teachers.items():
            info, codec = infos["teachers", name], _codec_of(name, teacher.storage)
            for inputs, count in self._sides(config, name, info):
                layer = embeddings_layer(name, inputs)
                needs = self.inputs(layer, {})
                codebook = {"digest": info.codebooks.get(layer), "sample": teacher.codec_sample}
                kept = codebook if codec.fitted else None
                recipe = _recipe(known[needs[-1]].fingerprint, info.identity, codec.name, kept)
                yield Layer(
                    layer,
                    self,
                    self._fingerprint(recipe),
                    needs=needs,
                    model=name,
                    texts=self._texts(inputs),
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

    def _texts(self, inputs: str) -> str | None:
        return inputs

    def _fingerprint(self, recipe: Mapping[str, Any]) -> str:
        return compute_fingerprint({**recipe, "what": self.name})

    def schema(self, layer: Layer, images: str) -> pa.Schema:
        assert layer.dim is not None
        codec = find_codec(layer.dtype)
        return schemas.embeddings_schema(
            layer.count, codec.width(_dim_of(layer.model, codec, layer.dim)), codec.numbers
        )

    def file_schemas(self) -> Iterable[pa.Schema]:
        return [schemas.embeddings_schema(1, 1, dtype) for dtype in _NUMBERS]

    def row_bytes(self, layer: Layer, sample: float) -> float | None:
        if layer.dim is None:
            return None
        return layer.count * find_codec(layer.dtype).bytes(layer.dim)

    def entry(self, layer: Layer, stated: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "teacher": layer.model,
            "texts": layer.texts,
            "count": layer.count,
            "dim": stated.get("dim") and _dim_of(layer.model, find_codec(layer.dtype), stated["dim"]),
            "dtype": layer.dtype,
            **({} if layer.codebook is None else {"codebook": dict(layer.codebook)}),
        }

    def check_entry(self, entry: Mapping[str, Any]) -> None:
        super().check_entry(entry)
        if find_codec(entry["dtype"]).fitted != (entry.get("codebook") is not None):
            raise ValueError(f"a layer in {entry['dtype']} has a codebook exactly if its codec is fitted")

    def recorded_fingerprint(self, layer: Layer, manifest: Mapping[str, Any]) -> str | None:
        model = mapping_at(manifest, self.section, layer.model, "model")
        source = manifest["layers"].get(self.inputs(layer.name, {})[-1])
        if not model or source is None:
            return None
        return self._fingerprint(_recipe(source["fingerprint"], model, layer.dtype, layer.codebook))

    def recipes(self, layer: Layer, manifest: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        before, now = super().recipes(layer, manifest)
        entry = mapping_at(manifest, "layers", layer.name)
        if "dtype" in entry:
            before["dtype"], now["dtype"] = entry["dtype"], layer.dtype
        if "codebook" in entry and layer.codebook is not None:
            before["codebook"], now["codebook"] = entry["codebook"], layer.codebook
        return before, now

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
        wrong = ~(np.abs(norms - 1) <= _norm_tolerance(table, shape)).all(axis=1)
        yield "have a vector whose norm is not 1", wrong & np.asarray(column.is_valid())

    def codec(self, layer: Layer) -> Codec:
        return find_codec(layer.dtype)

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

    def content(self, layer: Layer) -> str:
        return f"[{layer.count}, {layer.dim}] {layer.dtype}"

    def card_content(self, layer: Layer) -> str:
        return f"{self.content(layer)}, of {self._inputs_in_words}, flat"

    _inputs_in_words: str


class ImageEmbeddings(_Embeddings):
    name = "images"
    pattern = embeddings_layer("*", "images")
    unit = "images"
    producer = "embeddings:ImageEmbeddings"
    crops = True
    picks = "crop"
    _inputs_in_words = "augmented images"

    def _sides(self, config: Config, name: str, info: ModelInfo) -> Iterable[tuple[str, int]]:
        if config.teachers[name].published and config.augmentations.own:
            return []  # the crops of published vectors are unknown
        return [("images", config.augmentations.count)] if info.images else []

    def _texts(self, inputs: str) -> str | None:
        return None

    def report_content(self, layer: Layer) -> str:
        return f"images, {layer.count} \u00d7 {layer.dim} {layer.dtype}"


class TextEmbeddings(_Embeddings):
    name = "texts"
    pattern = embeddings_layer("*", "*")
    unit = "texts"
    producer = "embeddings:TextEmbeddings"
    picks = "text"
    _inputs_in_words = "texts"

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

    def report_content(self, layer: Layer) -> str:
        own = "true caption" if layer.count == 1 else "true captions"
        what = own if layer.texts == TRUE_CAPTION else f"captions of {layer.texts}"
        return f"{what}, {layer.count} \u00d7 {layer.dim} {layer.dtype}"


def _codec_of(teacher: str, name: str) -> Codec:
    """The codec of a teacher's vectors. Raises UserError if there is none of the name."""
    try:
        return find_codec(name)
    except ValueError as error:
        raise UserError(f"teachers.{teacher}.codec: {error}") from None


def _dim_of(teacher: str | None, codec: Codec, dim: int) -> int:
    """Length of the decoded vectors of a teacher. Raises UserError if its codec cannot store them."""
    try:
        return codec.dim(dim)
    except ValueError as error:
        raise UserError(f"teachers.{teacher}.codec: {error}") from None


def _recipe(
    source: str, model: Mapping[str, Any], dtype: str | None, codebook: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What the fingerprint covers besides the kind: that of the layer it is computed from, the identity of the
    teacher, and the codec, with its codebook if it has one."""
    fitted = {} if codebook is None else {"codebook": dict(codebook)}
    return {"source": source, "model": model, "dtype": dtype, **fitted}


def _norm_tolerance(table: pa.Table, shape: list[int]) -> Any:
    """How far the norm of a stored vector may be from 1; for int8 [rows, count], from the step of each vector."""
    if "scales" not in table.column_names:
        return vectors.NORM_TOLERANCE + _FLOAT_ERROR
    return vectors.NORM_TOLERANCE + vectors.tensor_rows(table["scales"])[0] * (0.5 * np.sqrt(shape[1]))
