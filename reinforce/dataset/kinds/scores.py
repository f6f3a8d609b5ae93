"""Scores: a struct of some numbers a row, and the scorers that compute them.

``Facts`` are those about a sample that no model is needed for, ``Head`` is a linear head on a teacher's embeddings of
the images, as scores of aesthetics or of unsafe content are made, and ``Similarity`` is that of images and texts by
teachers: the score by which data filtering networks choose.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

import schemas
from reinforce.dataset.layers import (
    SAMPLES,
    TRUE_CAPTION,
    Content,
    Layer,
    LayerKind,
    Recorded,
    compute_fingerprint,
    embeddings_layer,
    inputs_of,
    mapping_at,
    model_of,
)
from reinforce.dataset.vectors import own_slots
from reinforce.errors import UserError
from reinforce.source.urls import digest_of
from schemas import IMAGE_DIGEST, TRUE_CAPTIONS
from teachers import weights

if TYPE_CHECKING:
    from reinforce.config import Config, Fact, Score
    from teachers.spec import ModelInfo

Floats = npt.NDArray[np.float32]


#: The value of each row in a layer that is stored: vectors as float32 [rows, count, D], NaN where there is none.
Values: TypeAlias = "Callable[[str], Any]"


class SampleScorer(ABC):
    """Computes some scores of each sample, by an entry of the config and the most true captions of a sample.

    ``SCORERS`` has the class for each key of the entry. Making one raises ValueError or OSError that names the fix.

    Attributes:
        key: the key of the config that chooses it.
        names: of the scores, which are the columns of the layer.
        needs: the layers, besides the samples, that they are computed from.
        columns: the columns of the samples that they are computed from.
    """

    key: ClassVar[str]
    names: tuple[str, ...]
    needs: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """A JSON object that the layer's fingerprint covers besides the layers that are needed."""

    @abstractmethod
    def scores(self, tables: Mapping[str, pa.Table], values: Values) -> Mapping[str, Floats]:
        """Each score [rows]; NaN where a value that it needs is null.

        The ``tables`` of the samples, if ``columns`` names some, and ``values`` are those of one row group.
        """


_FACTS_VERSION = 1


#: The columns of the samples that a fact is computed from, by its name.
_COLUMNS: dict[Fact, tuple[str, ...]] = {
    "width": ("width",),
    "height": ("height",),
    "aspect": ("width", "height"),
    "bytes": ("image", "image_ref"),
    "characters": ("caption",),
    "words": ("caption",),
    "tokens": ("caption",),
    "digest_1": ("image", IMAGE_DIGEST),
    "digest_2": ("image", IMAGE_DIGEST),
}


class Facts(SampleScorer):
    """Sizes of the image, and lengths of the true caption, which are null where there is none.

    ``tokens`` are those of the whole caption, without the marks at its start and end.
    """

    key = "facts"

    def __init__(self, spec: Score, captions: int) -> None:
        from teachers.open_clip.catalog import model_config

        self._facts, self._tokenizer = spec.facts or [], spec.tokenizer
        self.names = tuple(self._facts)
        self.columns = tuple(dict.fromkeys(column for name in self._facts for column in _COLUMNS[name]))
        if "tokens" in self._facts:
            model_config(self._tokenizer)  # raises what is wrong with the name
        elif "tokenizer" in spec.model_fields_set:
            raise ValueError("tokenizer: used only for the fact `tokens`; remove it")

    def identity(self) -> dict[str, Any]:
        tokenizer = {"tokenizer": self._tokenizer} if "tokens" in self._facts else {}
        return {"facts": [*self.names], "version": _FACTS_VERSION, **tokenizer}

    def scores(self, tables: Mapping[str, pa.Table], values: Values) -> Mapping[str, Floats]:
        samples = tables[SAMPLES]
        found = {name: pc.cast(self._fact(name, samples), pa.float32(), safe=False) for name in self._facts}
        return {name: pc.fill_null(numbers, np.nan).to_numpy() for name, numbers in found.items()}

    def _fact(self, name: Fact, samples: pa.Table) -> Any:
        """The numbers of a fact [rows]."""
        embedded = "image" in samples.column_names
        if name in ("width", "height"):
            found = samples[name]
        elif name == "aspect":
            width, height = (pc.cast(samples[side], pa.float64()) for side in ("width", "height"))
            found = pc.divide(pc.max_element_wise(width, height), pc.min_element_wise(width, height))
        elif name == "bytes":
            found = pc.binary_length(samples["image"]) if embedded else pc.struct_field(samples["image_ref"], "length")
        elif name == "characters":
            found = pc.utf8_length(samples["caption"])
        elif name == "words":
            found = pc.list_value_length(pc.utf8_split_whitespace(samples["caption"]))
        elif name == "tokens":
            texts = samples["caption"].to_pylist()
            found = pa.array([None if text is None else self._count_tokens(text) for text in texts], pa.int64())
        else:  # the first or second 24 bits, which float32 holds, of the digest of the encoded image
            if embedded:
                digests = pa.array([digest_of(image.as_buffer()) for image in samples["image"]], pa.uint64())
            else:
                digests = samples[IMAGE_DIGEST]
            place = pa.scalar(0 if name == "digest_1" else 24, pa.uint64())
            found = pc.bit_wise_and(pc.shift_right(digests, place), pa.scalar(2**24 - 1, pa.uint64()))
        return found

    @cached_property
    def _count_tokens(self) -> Callable[[str], int]:
        """The number of tokens of a text. Raises OSError or ValueError if the tokenizer cannot be loaded."""
        import open_clip

        tokenizer = open_clip.get_tokenizer(self._tokenizer)
        if isinstance(tokenizer, open_clip.SimpleTokenizer):
            return lambda text: len(tokenizer.encode(text))
        return lambda text: len(tokenizer.tokenizer.encode(tokenizer.clean_fn(text), add_special_tokens=False))


class Head(SampleScorer):
    """``weight`` [N, D] or [D] and ``bias`` [N] of a safetensors file, applied to each augmented image of a row.

    Each output gives its mean and its maximum over the augmentations: ``score_mean`` and ``score_max``.
    """

    key = "head"

    def __init__(self, spec: Score, captions: int) -> None:
        assert spec.head is not None
        assert spec.teacher is not None
        self._file, self._teacher, self._outputs = spec.head, spec.teacher, spec.names
        self.names = tuple(f"{name}_{statistic}" for name in self._outputs for statistic in ("mean", "max"))
        self.needs = (embeddings_layer(spec.teacher, "images"),)

    def identity(self) -> dict[str, Any]:
        return {"head": weights.identity(self._file), "teacher": self._teacher, "names": self._outputs}

    @cached_property
    def _parameters(self) -> tuple[Floats, Floats]:
        """Weights [N, D] and biases [N]. Raises ValueError."""
        from safetensors.numpy import load_file

        tensors = load_file(weights.fetch(self._file))
        if "weight" not in tensors or tensors.keys() - {"weight", "bias"}:
            found = ", ".join(sorted(tensors)[:5])
            raise ValueError(f"{self._file} must have `weight` [N, D], and may have `bias` [N]; it has {found}")
        weight = np.atleast_2d(tensors["weight"].astype(np.float32))
        bias = np.atleast_1d(tensors.get("bias", np.zeros(len(weight))).astype(np.float32))
        if weight.ndim != 2 or bias.shape != (len(weight),) or len(weight) != len(self._outputs):
            raise ValueError(
                f"{self._file}: weight {list(tensors['weight'].shape)} and bias {list(bias.shape)} do not give "
                f"{len(self._outputs)} outputs; set `names` to one name for each output"
            )
        return weight, bias

    def scores(self, tables: Mapping[str, pa.Table], values: Values) -> Mapping[str, Floats]:
        weight, bias = self._parameters
        vectors = values(self.needs[0])
        if vectors.shape[2] != weight.shape[1]:
            raise ValueError(f"{self._file} is for vectors of {weight.shape[1]} numbers, not {vectors.shape[2]}")
        outputs = vectors @ weight.T + bias
        means, largest = outputs.mean(axis=1), outputs.max(axis=1)
        found: dict[str, Floats] = {}
        for n, name in enumerate(self._outputs):
            found |= {f"{name}_mean": means[:, n], f"{name}_max": largest[:, n]}
        return found


_SIMILARITY_VERSION = 1
_EACH_CAPTION_ONCE = 2  # the version of layers over several true captions


class Similarity(SampleScorer):
    """Cosines of a row's augmented images and its texts.

    For each kind of texts, such as ``caption``: ``caption_mean`` and ``caption_max`` over augmentations and texts,
    both averaged over the teachers, and with several teachers ``caption_spread``, the standard deviation of their
    means. Of several true captions, each counts once.
    """

    key = "similarity"

    def __init__(self, spec: Score, captions: int) -> None:
        self._teachers, self._texts = spec.similarity or [], spec.texts
        several = captions > 1 and TRUE_CAPTION in spec.texts
        self._version = _EACH_CAPTION_ONCE if several else _SIMILARITY_VERSION
        self.columns = (TRUE_CAPTIONS,) if self._version == _EACH_CAPTION_ONCE else ()
        statistics = ("mean", "max", "spread")[: 3 if len(self._teachers) > 1 else 2]
        self.names = tuple(f"{texts}_{statistic}" for texts in self._texts for statistic in statistics)
        self.needs = tuple(embeddings_layer(t, inputs) for t in self._teachers for inputs in ("images", *self._texts))

    def identity(self) -> dict[str, Any]:
        return {"similarity": self._teachers, "texts": self._texts, "version": self._version}

    def scores(self, tables: Mapping[str, pa.Table], values: Values) -> Mapping[str, Floats]:
        found: dict[str, Floats] = {}
        for texts in self._texts:
            cosines = []  # [rows, K, N] of vectors with unit norm, by teacher
            for teacher in self._teachers:
                images, encoded = (values(embeddings_layer(teacher, inputs)) for inputs in ("images", texts))
                cosines.append(np.matmul(images, encoded.transpose(0, 2, 1)))
            if self._version == _EACH_CAPTION_ONCE and texts == TRUE_CAPTION:
                own = own_slots(tables[SAMPLES], cosines[0].shape[2])[:, None]
                means = np.stack([of.mean(axis=(1, 2), where=np.broadcast_to(own, of.shape)) for of in cosines])
            else:
                means = np.stack([of.mean(axis=(1, 2)) for of in cosines])
            found[f"{texts}_mean"] = means.mean(axis=0)
            found[f"{texts}_max"] = np.stack([of.max(axis=(1, 2)) for of in cosines]).mean(axis=0)
            if len(cosines) > 1:
                found[f"{texts}_spread"] = means.std(axis=0)
        return found


#: The scorers by the key of a config that chooses them.
SCORERS: dict[str, Callable[[Score, int], SampleScorer]] = {
    Similarity.key: Similarity,
    Head.key: Head,
    Facts.key: Facts,
}


def make_scorer(spec: Score, captions: int = 1) -> SampleScorer:
    """The scorer of an entry of ``scores`` of a dataset with at most ``captions`` true captions a sample. Raises
    ValueError or OSError that names the fix."""
    scorer = next(scorer for key, scorer in SCORERS.items() if getattr(spec, key) is not None)
    return scorer(spec, captions)


class Scores(LayerKind):
    name = "scores"
    pattern = "scores/*"
    level = 3
    columns = ("key", "scores")
    values = None  # a score is null where one of its inputs is, which says why in the quarantine of its layer
    unit = "samples"
    producer = "scores:ScoresProducer"
    section = target_section = "scores"
    required = ("names", "needs", "score")
    file_schemas = (schemas.scores_schema(()),)

    def layers(
        self, config: Config, infos: Mapping[tuple[str, str], ModelInfo], known: Mapping[str, Layer]
    ) -> Iterable[Layer]:
        for name, spec in config.scores.items():
            info = infos.get((self.section, name))
            if info is not None:
                identity, names, inputs = info.identity, tuple(info.identity["names"]), info.identity["inputs"]
                wanted = tuple(one for one in inputs if "/" in one)
            else:
                try:
                    scorer = make_scorer(spec, config.input.captions_per_sample or 1)
                    identity, names, wanted = scorer.identity(), scorer.names, scorer.needs
                    inputs = (*wanted, *scorer.columns)
                except (ValueError, OSError) as error:
                    raise UserError(f"scores.{name}: {error}") from error
            if TRUE_CAPTION in map(inputs_of, inputs):
                config.input.require_captions(f"scores.{name}")
            missing = [need for need in wanted if need not in known]
            for need in missing:
                if model_of(need) in config.teachers and (side := inputs_of(need)) in ("images", TRUE_CAPTION):
                    what = "images" if side == "images" else "texts"
                    raise UserError(f"scores.{name}: teacher {model_of(need)} encodes no {what}. Name one that does.")
            if missing:
                raise UserError(
                    f"scores.{name}: {', '.join(missing)} is no layer of this config. Name its teacher in `teachers`, "
                    "and the captioner of its texts in `captioners`."
                )
            needs = (SAMPLES, *wanted)
            recipe = {"sources": {need: known[need].fingerprint for need in needs}, "score": dict(identity)}
            yield Layer(
                name=f"scores/{name}",
                kind=self,
                fingerprint=compute_fingerprint(recipe),
                needs=needs,
                model=None if info is None else name,
                names=names,
                recipe=recipe,
                code=None if info is None else info.code,
                sees="image" if info is not None and info.images else None,
            )

    def schema(self, layer: Layer, images: str) -> pa.Schema:
        return schemas.scores_schema(layer.names)

    def entry(self, layer: Layer, stated: Mapping[str, Any]) -> dict[str, Any]:
        return {"names": [*layer.names], "needs": [*layer.needs], "score": layer.recipe["score"]}

    def recorded(self, layer: Layer, manifest: Mapping[str, Any]) -> Recorded:
        layers, before = mapping_at(manifest, "layers"), mapping_at(manifest, "layers", layer.name, "score")
        fingerprint = None
        if all(need in layers for need in layer.needs):
            sources = {need: layers[need]["fingerprint"] for need in layer.needs}
            fingerprint = compute_fingerprint({"sources": sources, "score": dict(before)})
        return Recorded(fingerprint, dict(before), dict(layer.recipe.get("score", {})) if before else {})

    def wrong_rows(self, layer: Layer, table: pa.Table, records: int | None) -> Iterator[tuple[str, Any]]:
        expected = self.schema(layer, "").field("scores").type
        if table["scores"].type != expected:
            found = f"{table['scores'].type}, dataset.json states {expected}"
            yield f"have scores of type {found}", np.ones(table.num_rows, np.bool_)
            return
        for name in layer.names:
            wrong = pc.invert(pc.is_finite(pc.struct_field(table["scores"], name)))
            yield f"have a score {name} that is NaN or infinite", pc.fill_null(wrong, False).to_numpy()

    def decode(self, table: pa.Table) -> list[dict[str, float | None]]:
        found: list[dict[str, float | None]] = table["scores"].to_pylist()
        return found

    def numbers(self, table: pa.Table) -> Mapping[str, npt.NDArray[np.float32]]:
        scores = table["scores"].combine_chunks()
        names = [field.name for field in scores.type]
        return {name: pc.fill_null(one, np.nan).to_numpy() for name, one in zip(names, scores.flatten(), strict=True)}

    def content(self, layer: Layer) -> Content:
        return Content(", ".join(layer.names))
