"""Layers: their names, what describes them, and what a kind of layers must offer.

A fingerprint covers all that determines a layer's content. Fingerprints form a chain: each layer's recipe includes the
fingerprint of ``samples`` (rows, images, augmentation records), and that of embeddings of synthetic captions includes
the fingerprint of the captions. Settings that change no stored number (logit scales, batch sizes, workers) are in none.
"""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

import schemas
from reinforce.dataset.codecs.base import Codec
from reinforce.dataset.codecs.codebooks import Place, find_codec
from reinforce.errors import UserError
from reinforce.settings import LAYER_NAME

if TYPE_CHECKING:
    from reinforce.config import Config
    from teachers.spec import ModelInfo


class TargetTensor(NamedTuple):
    """A tensor that a training example takes from a layer: its name in a batch, NumPy dtype and shape.

    With no name, it is named after what it is of: ``image``, ``caption`` or ``synthetic``. Values of one that is
    ``below`` a number are indices, from 0 on.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    below: int | None = None


class PickedValues(NamedTuple):
    """One value of every row: arrays [rows, *shape] of each target tensor, arbitrary in unusable rows.

    ``stored`` [rows] are not null, and ``usable`` [rows] can be trained on.
    """

    arrays: tuple[npt.NDArray[Any], ...]
    stored: npt.NDArray[np.bool_]
    usable: npt.NDArray[np.bool_]


class Content(NamedTuple):
    """What a row of a layer holds, in ``reinforce plan`` and ``status``; on the ``card`` of a published dataset, and in
    the ``report`` of ``reinforce inspect``, by default the same."""

    plan: str
    card: str = ""
    report: str = ""


class Recorded(NamedTuple):
    """What dataset.json states of how a layer was computed.

    It has the ``fingerprint`` of all of it, None if it does not state everything, and the settings without the
    fingerprints of other layers: those ``before``, and the layer's ``now``, if a config made it.
    """

    fingerprint: str | None
    before: dict[str, Any]
    now: dict[str, Any]


class TargetEncoder(NamedTuple):
    """What computes a target of images from a loaded model that has other layers, too.

    It has the ``name`` of the tensor in a batch, the preprocessing of its ``image``, a function that encodes pixels
    [B, 3, H, W], and the ``entry`` of a layer in dataset.json as far as the model decides it.
    """

    name: str
    image: Any
    encode: Callable[[Any], Any]
    entry: Mapping[str, Any]


#: The smallest cosine of a stored vector and the one that is computed again that counts as rounding.
MIN_COSINE = 0.99


@dataclass
class Comparison:
    """Values of ``rows`` rows on two sides. ``equal`` rows have no difference, ``nulls`` are null on one side alone.

    ``difference`` is the largest one of a number, ``cosine`` the smallest of two vectors; None for what is no
    number or vector.
    """

    rows: int = 0
    equal: int = 0
    nulls: int = 0
    difference: float | None = None
    cosine: float | None = None

    @classmethod
    def of_numbers(cls, first: npt.NDArray[np.float32], second: npt.NDArray[np.float32]) -> Comparison:
        """Compare numbers [rows, ...], NaN where one is null. Those of another shape are not equal."""
        if first.shape != second.shape:
            return cls(len(first))
        first, second = first.reshape(len(first), -1), second.reshape(len(second), -1)
        null = np.isnan(first), np.isnan(second)
        both = ~(null[0] | null[1])
        equal = int(((first == second) | (null[0] & null[1])).all(axis=1).sum())
        difference = float(np.abs(first[both] - second[both]).max()) if both.any() else None
        return cls(len(first), equal, int((null[0] != null[1]).any(axis=1).sum()), difference)

    def add_cosines(self, cosines: npt.NDArray[np.float32], same: npt.NDArray[np.bool_]) -> None:
        """Add the cosines [rows, N] of rows that are not null, of which the ``same`` ones [rows] are equal."""
        cosines[same] = 1.0
        self.cosine = float(cosines.min()) if cosines.size else None

    def add(self, other: Comparison) -> None:
        for name in ("rows", "equal", "nulls"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.cosine = min((one for one in (self.cosine, other.cosine) if one is not None), default=None)
        self.difference = max((one for one in (self.difference, other.difference) if one is not None), default=None)

    @property
    def fits(self) -> bool:
        """Whether values that were computed again differ by rounding at most."""
        return not self.nulls and (self.cosine is None or self.cosine >= MIN_COSINE)

    def line(self, layer: str) -> str:
        """How values of a layer that were computed again differ from the stored ones."""
        parts = [f"{layer}: {self.equal:,} of {self.rows:,} rows are equal when computed again"]
        if self.nulls:
            parts.append(f"{self.nulls:,} rows are null on one side only")
        if self.cosine is not None:
            parts.append(f"largest difference {self.difference:.2g}, smallest cosine {self.cosine:.6f}")
        return ", ".join(parts) + ("" if self.fits else ": not what the model computes")


SAMPLES = "samples"
#: ``images`` in the dataset.json of published labels, which have none, and the key with what these labels are of.
NO_IMAGES, LABELS = "none", "labels"
#: Name of the labels that are the config's ``reinforcements``, which have none.
REINFORCEMENTS = ""
#: Name of the true caption among the texts that teachers encode; the other names are captioners.
TRUE_CAPTION = "caption"


#: Sections of dataset.json with an entry for each model. Other models are described in the entries of their layers.
MODEL_SECTIONS = ("teachers", "captioners")


def captions_layer(captioner: str) -> str:
    return f"captions/{captioner}"


def embeddings_layer(teacher: str, inputs: str) -> str:
    """Name of a teacher's layer. ``inputs`` is ``images``, ``caption`` (the true one) or a captioner's name."""
    return f"embeddings/{teacher}/{inputs}"


def model_of(name: str) -> str:
    """The model, or the entry of ``scores``, in the name of a layer; empty for samples."""
    return "".join(parts_of(name)[1:2])


def inputs_of(name: str) -> str:
    """What a teacher encodes in an embeddings layer of this name: ``images``, ``caption`` or a captioner's name."""
    return parts_of(name)[-1]


def parts_of(name: str) -> list[str]:
    """The names of the folders from the dataset down to that of a layer."""
    return name.split("/")


def matches(name: str, pattern: str) -> bool:
    """Whether a name fits a kind's pattern, in which ``*`` stands for the name of a model or of its inputs."""
    parts, wanted = parts_of(name), parts_of(pattern)
    return len(parts) == len(wanted) and all(
        LAYER_NAME.fullmatch(part) and one in ("*", part) for part, one in zip(parts, wanted, strict=True)
    )


@dataclass(frozen=True)
class Layer:
    """One product for all shards.

    Attributes:
        name: its folder in the dataset.
        needs: names of the layers it is computed from.
        model: captioner, teacher or class of a score that makes it.
        texts: what a teacher encodes in a layer of texts: ``caption`` or a captioner's name.
        count: vectors or captions per row (K or N).
        dim: dimension of the vectors as they are decoded, None until a model of unknown dimension has been loaded.
        dtype: name of the codec in which vectors are stored.
        codebook: of a fitted codec, the ``digest`` of its codebook, None until it is fitted, and the vectors of the
            ``sample`` that it is fitted to.
        names: of the values of a row, where these have names.
        published: whether all its values are those of labels, without loading a model.
        recipe: what the fingerprint covers.
        code: hash of the file that defines the model's class, if it is a custom one; the fingerprint does not cover it.
        sees: what its model sees of the image: the ``crops`` of its augmentation records, the ``image`` as a whole, or
            None.
        labels: name of the labels that have values of it, or decide the rows of the samples; other rows are computed,
            except in published layers.
    """

    name: str
    kind: LayerKind
    fingerprint: str
    needs: tuple[str, ...] = ()
    model: str | None = None
    texts: str | None = None
    count: int = 0
    dim: int | None = None
    dtype: str = "float16"
    codebook: Mapping[str, Any] | None = field(default=None, compare=False)
    names: tuple[str, ...] = ()
    published: bool = False
    recipe: Mapping[str, Any] = field(default_factory=dict, compare=False)
    code: str | None = field(default=None, compare=False)
    sees: Literal["crops", "image"] | None = field(default=None, compare=False)
    labels: str | None = field(default=None, compare=False)

    @property
    def loads_model(self) -> bool:
        """Whether computing it loads a model."""
        return self.model is not None and not self.published

    @property
    def identity(self) -> Mapping[str, Any]:
        """The part of the recipe that describes its model, or how scores are computed; empty for samples."""
        found: Mapping[str, Any] = self.recipe.get("model") or self.recipe.get("score") or {}
        return found

    @property
    def owner(self) -> tuple[str | None, str | None]:
        """The section of the config with the model that makes it, and the model's name."""
        return self.kind.section, self.model

    @property
    def sample(self) -> int:
        """Vectors to which its codebook is fitted; 0 if it needs none."""
        return 0 if self.codebook is None else int(self.codebook["sample"])

    def codebook_at(self, url: str) -> Place | None:
        """Where its codebook is in the dataset at ``url``; None if it needs none."""
        return None if self.codebook is None else Place(url, self.name, str(self.codebook["digest"]))

    def schema(self, images: str, dim: int | None = None) -> pa.Schema:
        """The pyarrow schema of its files; ``images`` is the config's key, ``dim`` that of the loaded model."""
        return self.kind.schema(replace(self, dim=dim or self.dim), images)


def compute_fingerprint(recipe: Mapping[str, Any]) -> str:
    """Hash the schema version and a recipe -> 16 hex digits."""
    text = json.dumps({"schema": schemas.SCHEMA_VERSION, **recipe}, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class LayerKind(ABC):
    """All that is stored and shown of layers of one kind. ``kinds.registry`` has an object of each kind.

    Attributes:
        name: of the kind in dataset.json.
        pattern: of the names of its layers; the first kind whose pattern fits a name has it.
        level: its layers are computed from layers of lower levels only, and deleted before them.
        columns: without which a file is damaged.
        values: the column that is null in rows with a reason in the quarantine, None if there is none.
        unit: what rates count.
        producer: the class that computes its layers, ``module:Class`` in ``reinforce.engine.worker.producers``.
        section: of the config with the models that make its layers, None if no model does.
        model_key: of a layer's entry in dataset.json with the name of its model, None if it has none.
        required: keys of a layer's entry in dataset.json.
        file_schemas: that its files can have, with tensors of some shape and, of structs that differ by layer, none of
            their fields.
        tensors: axes of the columns whose rows have a shape. Columns with fewer axes have the first ones of the others.
        stored_plain: columns that are stored without compression.
        kept_as_stored: columns of tensors that no reader converts to float32 as a whole.
        crops: whether its models may see the augmented images.
        vectors: whether its values are unit-norm vectors of a model.
        picks: which of a row's values a training example takes, that of its crop or of its text; None if none.
        target_section: under which loss terms ask for its values, by the models' names: ``section``, of which each
            model has layers of this kind, or one that only entries of some models in the config have.
        taken: whether others take its values as labels.
        unusable: why a value that is not null cannot be trained on.
    """

    name: ClassVar[str]
    pattern: ClassVar[str]
    level: ClassVar[int]
    columns: ClassVar[tuple[str, ...]]
    values: ClassVar[str | None]
    unit: ClassVar[str]
    producer: ClassVar[str]
    section: ClassVar[str | None] = None
    model_key: ClassVar[str | None] = None
    required: ClassVar[tuple[str, ...]] = ()
    file_schemas: ClassVar[tuple[pa.Schema, ...]]
    tensors: ClassVar[Mapping[str, int]] = {}
    stored_plain: ClassVar[tuple[str, ...]] = ()
    kept_as_stored: ClassVar[tuple[str, ...]] = ()
    crops: ClassVar[bool] = False
    vectors: ClassVar[bool] = False
    picks: ClassVar[Literal["crop", "text"] | None] = None
    target_section: ClassVar[str | None] = None
    taken: ClassVar[bool] = False
    unusable: ClassVar[str] = ""

    #: Keys of a teacher that name the codec and the number of vectors to which it is fitted, in messages.
    codec_key: ClassVar[str] = "codec"
    sample_key: ClassVar[str] = "codec_sample (--sample of `reinforce convert`)"

    @abstractmethod
    def layers(
        self, config: Config, infos: Mapping[tuple[str, str], ModelInfo], known: Mapping[str, Layer]
    ) -> Iterable[Layer]:
        """Layers of this kind that a config names. ``infos`` describe the models by section and name, ``known`` are the
        layers of lower levels."""

    def inputs(self, name: str, entry: Mapping[str, Any]) -> tuple[str, ...]:
        """Names of the layers that a layer is computed from, by its name and its entry in dataset.json, if it has one:
        by default the samples, or what a kind whose entries state their ``needs`` has there."""
        stated = entry.get("needs") if "needs" in self.required else None
        return tuple(stated or ([SAMPLES] if self.level else []))

    def schema(self, layer: Layer, images: str) -> pa.Schema:
        """The schema of a file; ``images`` is the config's key. By default all files have the first one."""
        return self.file_schemas[0]

    def row_bytes(self, layer: Layer, sample: float) -> float | None:
        """Expected bytes of a row, of a sample that takes ``sample`` bytes; None if the dimension is not known before
        the model is loaded. By default those of the numbers of the schema."""
        if self.vectors and layer.dim is None:
            return None
        types = [field.type for field in self.schema(layer, "") if field.name != "key"]
        structs = [field.type for type_ in types if pa.types.is_struct(type_) for field in type_]
        tensors = [type_ for type_ in types if isinstance(type_, pa.FixedShapeTensorType)]
        bits = sum(type_.bit_width for type_ in structs)
        return (bits + sum(math.prod(type_.shape) * type_.value_type.bit_width for type_ in tensors)) // 8

    def encoder(self, model: Any, device: Any) -> TargetEncoder:
        """What computes values of a kind with a ``target_section`` of its own from a loaded model. Raises ValueError if
        it cannot."""
        raise ValueError(f"{type(model).__name__} is asked for no {self.name}")

    def codec(self, layer: Layer) -> Codec:
        """The codec of the vectors of a layer."""
        return find_codec(layer.dtype)

    def vectors_to_fit(self, layer: Layer, table: pa.Table) -> npt.NDArray[np.float16]:
        """The vectors [n, D] of a row group of a finer layer, to which a codebook is fitted."""
        raise ValueError(f"layers of kind {self.name} have no codec")

    def entry(self, layer: Layer, stated: Mapping[str, Any]) -> dict[str, Any]:
        """What a layer's entry has besides its kind and fingerprint. ``stated`` has what the loaded model states, such
        as its ``dim``, and under the kind's name what its ``encoder`` does, or else the entry so far."""
        return {}

    def stored(self, name: str, entry: Mapping[str, Any]) -> Layer:
        """A layer by its entry, whose keys have valid values. Raises ValueError if it is not that of a layer of this
        kind."""
        if missing := [key for key in self.required if key not in entry]:
            raise ValueError(f"a layer of {self.name} without {', '.join(missing)}")
        if "count" in self.required and entry["count"] is None:
            raise ValueError(f"a layer of {self.name} without count")
        return Layer(
            name,
            self,
            entry["fingerprint"],
            self.inputs(name, entry),
            None if self.model_key is None else entry.get(self.model_key),
            entry.get("texts"),
            entry.get("count") or 0,
            entry.get("dim"),
            entry.get("dtype", "float16"),
            entry.get("codebook"),
            tuple(entry.get("names") or ()),
        )

    def recorded(self, layer: Layer, manifest: Mapping[str, Any]) -> Recorded:
        """What dataset.json states of how a layer was computed: by default from the samples, by a model."""
        model = mapping_at(manifest, self.section, layer.model, "model")
        samples = mapping_at(manifest, "layers", SAMPLES).get("fingerprint")
        fingerprint = compute_fingerprint({"samples": samples, "model": dict(model)}) if model and samples else None
        return Recorded(fingerprint, dict(model), dict(layer.recipe.get("model", {})) if model else {})

    def differs(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
        """How what a loaded model states ``now`` gives numbers another meaning than ``before``, by an entry of
        dataset.json or by what another worker's model states; None if it does not."""
        return None

    def wrong_rows(self, layer: Layer, table: pa.Table, records: int | None) -> Iterator[tuple[str, Any]]:
        """Problems of the rows of a row group, and a mask of them [rows]; ``records`` is the number of augmentation
        records in dataset.json."""
        return iter(())

    def decode(self, table: pa.Table) -> Any:
        """The value of each row of a row group, by default that of its column ``values``."""
        return table[self.values].to_pylist()

    def numbers(self, table: pa.Table) -> Mapping[str, npt.NDArray[np.float32]]:
        """Numbers of each row of a row group by name [rows], for plots; NaN where one is null."""
        return {}

    def compare(self, first: pa.Table, second: pa.Table) -> Comparison:
        """Compare the same rows on two sides. Vectors are equal if their
        numbers are equal."""
        one, other = self.numbers(first), self.numbers(second)
        if one and one.keys() == other.keys():
            return Comparison.of_numbers(*(np.stack([of[name] for name in one], axis=1) for of in (one, other)))
        pairs = [*zip(self.decode(first), self.decode(second), strict=True)]
        nulls = sum((one is None) != (other is None) for one, other in pairs)
        return Comparison(len(pairs), sum(one == other for one, other in pairs), nulls)

    def target_tensors(self, entry: Mapping[str, Any]) -> tuple[TargetTensor, ...]:
        """What a training example takes from a layer, by its entry in dataset.json."""
        raise ValueError(f"layers of kind {self.name} are no targets")

    def pick(self, table: pa.Table, index: npt.NDArray[np.intp]) -> PickedValues:
        """Value ``index[row]`` of every row of a row group, with an array for each of ``target_tensors``."""
        raise ValueError(f"layers of kind {self.name} are no targets")

    @abstractmethod
    def content(self, layer: Layer) -> Content:
        """What a row holds, in a few words."""

    def pictures(self, value: Any, count: int) -> npt.NDArray[np.uint8]:
        """A picture [h, w, 3] of each of the first ``count`` crops of a row's value; none by default."""
        return np.empty((0, 1, 1, 3), np.uint8)


def require_images(manifest: Mapping[str, Any], where: str) -> None:
    """Raise UserError if a dataset has no images, because it is published labels."""
    if manifest["images"] == NO_IMAGES:
        raise UserError(
            f"{where} has labels without images. Name it under `labels` in a config with your copy of the images as "
            "`source`, and use the dataset that `reinforce run` makes."
        )


def mapping_at(manifest: Mapping[str, Any], *keys: str | None) -> Mapping[str, Any]:
    """The mapping at a path of keys; an empty one if the manifest has none there."""
    value: Any = manifest
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, Mapping) else {}
