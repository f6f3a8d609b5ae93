"""The config of a run, typed and validated before anything starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from reinforce import settings
from reinforce.processes.cores import Node, cores_per_process, default_gpus, describe_share
from reinforce.settings import Accelerated, Batch, Named, OneOrMore, Section
from reinforce.source.config import Input
from reinforce.source.urls import SOURCES
from teachers.custom import ClassifierSpec, ClassScorerSpec
from teachers.published import Join, Labels
from teachers.registry import AnyCaptioner, AnyTeacher
from teachers.spec import ModelSpec


class RandAugment(Section):
    """RandAugment as in torchvision; the defaults are those of DataCompDR."""

    ops: int = Field(2, ge=0, description="operations per image")
    magnitude: int = Field(9, ge=0, lt=31, description="strength of the operations, out of 31 levels")


class Augmentations(Section):
    """Distribution of the augmentation records: RandomResizedCrop, then RandAugment."""

    count: int = Field(2, ge=1, le=1000, description="augmentation records per image")
    size: int = Field(224, ge=8, le=4096, description="side in pixels of the square that crops are resized to")
    scale: tuple[float, float] = Field(
        (0.08, 1.0), strict=False, description="range of area of the crop / area of the image"
    )
    ratio: tuple[float, float] = Field((3 / 4, 4 / 3), strict=False, description="range of width / height of the crop")
    rand_augment: RandAugment = RandAugment()
    backend: Literal["torchvision-pil-1", "fixed-point-1"] = Field(
        "torchvision-pil-1",
        description="how records are replayed: with torchvision's pixels, or faster with slightly different ones",
    )
    own: Literal[True] | None = Field(
        None, description="with `reinforcements` without records (RayGen): sampled locally"
    )

    @model_validator(mode="after")
    def _check_ranges(self) -> Augmentations:
        for name, (low, high) in (("scale", self.scale), ("ratio", self.ratio)):
            if not 0 < low <= high:
                raise ValueError(f"{name}: must be [low, high] with 0 < low <= high, got {[low, high]}")
        if self.scale[1] > 1:
            raise ValueError("scale: a crop cannot be larger than the image")
        return self


#: What describes a model, by section of the config. Of a score, its class.
MODEL_SPECS: dict[str, type[ModelSpec]] = {
    one.section: one for one in (AnyTeacher, AnyCaptioner, ClassifierSpec, ClassScorerSpec)
}
#: What ``workers.batch: auto`` means on the CPU.
AUTO_BATCH = 256


class Workers(Section):
    """The pool of workers, which grows and shrinks with the cluster between ``min`` and ``max``."""

    min: int = Field(1, ge=1, description="the run fails if fewer workers have started after `start_timeout`")
    max: int | None = Field(
        None, ge=1, description="default: as many as the cluster can hold; a number is requested from the autoscaler"
    )
    gpus: float | None = Field(
        None, ge=0, description="GPUs per worker; default: 1 if a node has any; 0: compute on the CPU"
    )
    cpus: int | None = Field(
        None,
        ge=1,
        description="CPU cores per worker, and processes that decode images; default: a GPU's part of the cores of its "
        "node; without GPUs 1, with a worker for each core",
    )
    batch: Batch = Field(
        256,
        description="images per forward pass; auto: as many as the memory of the GPU holds, at most 1,024; 256 on CPUs",
    )
    recycle: int | None = Field(
        None,
        ge=1,
        description="restart each worker after so many shards, against models that leak memory; default: never",
    )
    deterministic: bool = Field(
        True,
        description="use deterministic CUDA kernels; false: the fastest ones, and a shard that is computed again may "
        "differ in rounding",
    )
    start_timeout: float = Field(
        600.0, gt=0, description="seconds to wait for `min` workers, and for each worker to load its models"
    )

    @property
    def images(self) -> int:
        """``batch``, or the number that ``auto`` means on the CPU."""
        return AUTO_BATCH if self.batch == "auto" else self.batch

    @property
    def cores(self) -> int:
        """``cpus``, or 1 if it is left open."""
        return self.cpus or 1

    def fitted_to(self, nodes: Sequence[Node], models: bool = True) -> Workers:
        """A copy in which numbers that are left open suit the nodes of a cluster; no GPU is used without ``models``."""
        gpus = default_gpus(nodes) * models if self.gpus is None else self.gpus
        # Without GPUs, workers of one core lose nothing to waiting for each other, and give the same bytes everywhere.
        cpus = self.cpus or (cores_per_process(nodes, 1, gpus) if gpus else 1)
        return self.model_copy(update={"gpus": gpus, "cpus": cpus})

    def describe(self) -> str:
        """What each worker uses, for the log."""
        return describe_share(self.cores, self.gpus or 0)

    @model_validator(mode="after")
    def _check_bounds(self) -> Workers:
        if self.max is not None and self.min > self.max:
            raise ValueError(f"min ({self.min}) is above max ({self.max})")
        if self.gpus is not None and self.gpus > 1:
            raise ValueError("a worker uses at most one GPU: gpus must be at most 1")
        return self


class Failures(Section):
    """When a shard is retried, when it is quarantined, and when the run fails."""

    attempts: int = Field(3, ge=1, description="attempts at a shard that raises an exception before it is quarantined")
    solo_attempts: int = Field(
        2,
        ge=1,
        description="times a shard that runs alone may kill or hang its worker, or an image its decode process, before "
        "it is quarantined",
    )
    sample_seconds: float = Field(
        300.0,
        gt=0,
        description="seconds for decoding and augmenting one image after which its decode process is replaced",
    )
    stall_seconds: float | None = Field(
        None,
        gt=0,
        description="seconds in one step of a shard (a batch of a model, a sample that is read, a file that is "
        "written) after which its worker is killed; default: 20 times the slowest batch so far, at least 5 minutes and "
        "at most an hour",
    )
    outage_seconds: float = Field(
        600.0,
        ge=0,
        description="seconds for which a shard is tried again while the storage fails, before it is left for the next "
        "run; storage errors quarantine nothing",
    )
    allowed_share: float = Field(
        0.01,
        ge=0,
        le=1,
        description="share of quarantined shards above which the run fails; if they are more than 10, it stops at once",
    )


#: Facts of a sample that need no model.
Fact = Literal["width", "height", "aspect", "bytes", "characters", "words", "tokens", "digest_1", "digest_2"]


class Score(Section):
    """Scores of each sample: ``similarity``, ``head`` or ``facts``, from what is stored, or a ``class``."""

    similarity: OneOrMore | None = Field(None, description="teachers whose similarity of images and texts it is")
    texts: OneOrMore = Field(["caption"], min_length=1, description="similarity: `caption`, and names of captioners")
    head: str | None = Field(None, description="safetensors file of a linear layer: `weight` [N, D], `bias` [N]")
    teacher: str | None = Field(None, description="head: the teacher to whose embeddings of images it is applied")
    names: OneOrMore = Field(
        ["score"], min_length=1, description="head: one for each output; class: instead of its own"
    )
    facts: list[Fact] | None = Field(None, min_length=1, description="sizes of the image and the caption")
    tokenizer: str = Field("ViT-B-32", description="facts: open_clip model whose tokenizer counts `tokens`")
    own: str | None = Field(None, alias="class", description="package.module:Class; see teachers/protocols.py")
    options: dict[str, Any] = Field(default_factory=dict, description="class: its keyword arguments")
    inputs: OneOrMore | None = Field(None, min_length=1, description="class: its inputs, instead of its own `inputs`")

    @model_validator(mode="after")
    def _check_kind(self) -> Score:
        uses = {"similarity": {"texts"}, "head": {"teacher", "names"}, "facts": {"tokenizer"}}
        uses["class"] = {"options", "inputs", "names"}
        fields = {key: "own" if key == "class" else key for key in uses}
        chosen = [key for key, field in fields.items() if getattr(self, field) is not None]
        if len(chosen) != 1:
            raise ValueError(f"set one of {', '.join(uses)}")
        if unused := self.model_fields_set - uses[chosen[0]] - {fields[chosen[0]]}:
            raise ValueError(f"{', '.join(sorted(unused))}: not used with `{chosen[0]}`; remove it")
        if self.head is not None and self.teacher is None:
            raise ValueError("set `teacher`, to whose embeddings `head` is applied")
        for names in (self.similarity or [], self.texts, self.names, self.facts or []):
            if len({*names}) < len(names):
                raise ValueError(f"{', '.join(names)}: a name occurs twice")
        if self.own is not None:
            _ = self.scorer  # raises what is wrong
        return self

    @property
    def scorer(self) -> ClassScorerSpec:
        """The class."""
        names = self.names if "names" in self.model_fields_set else None
        return ClassScorerSpec(class_=self.own, options=self.options, inputs=self.inputs, names=names)


class Config(Section):
    """A run, which computes the layers of a dataset from source shards."""

    source: str | list[str] = Field(
        description=f"fsspec URIs of {SOURCES}: braces, globs, a .txt file of URLs, or a list of these"
    )
    output: str = Field(min_length=1, description="folder or fsspec URI of the dataset")
    moved: dict[str, str] = Field(
        default_factory=dict,
        description="folders of `source` whose files were elsewhere when the dataset was made, each with the folder at "
        "that time; shards keep the names that they have from there",
    )
    reinforcements: str | list[str] | None = Field(
        None,
        description="published reinforcements of `source` (DataCompDR, DFNDR): shards with the same file names or in "
        "the same order, or `source` itself; augmentations and layers of `family: published` are read from them",
    )
    join: Join | None = Field(
        None,
        description="weakest agreement that joins samples and `reinforcements`; key: also by key, where neither side "
        "states anything else; default: url",
    )
    labels: Named[Labels] = Field(
        default_factory=dict, description="labels that others have published as datasets, by a name of yours"
    )
    seed: int = Field(0, description="seed of everything random in the dataset")
    images: Literal["embed", "reference"] = Field(
        "embed",
        description="store the encoded images, or their (url, offset, length) in uncompressed tars",
    )
    input: Input = Input()
    augmentations: Augmentations = Augmentations()
    captioners: Named[AnyCaptioner] = Field(default_factory=dict, description="captioners by name")
    teachers: Named[AnyTeacher] = Field(default_factory=dict, description="teachers by name")
    classifiers: Named[ClassifierSpec] = Field(default_factory=dict, description="classifiers by name")
    scores: Named[Score] = Field(
        default_factory=dict, description="scores by name, from layers that this config names or by a class"
    )
    accelerator: Accelerated = "fast"
    workers: Workers = Workers()
    failures: Failures = Failures()

    @property
    def embeds_images(self) -> bool:
        """Whether the samples layer stores the encoded images, instead of references into the source tars."""
        return self.images == "embed"

    @property
    def labels_of_crops(self) -> str | None:
        """The name of the labels whose augmentation records are taken, or None."""
        return next((name for name, one in self.labels.items() if one.taken.crops), None)

    @property
    def models(self) -> dict[str, Mapping[str, ModelSpec]]:
        """All models by section and name. Of the scores, those that a class computes."""
        scorers = {name: score.scorer for name, score in self.scores.items() if score.own is not None}
        return {section: getattr(self, section) for section in MODEL_SPECS} | {"scores": scorers}

    def with_models(self, specs: Mapping[str, Mapping[str, Any]]) -> Config:
        """A copy with these models and scores alone, by section and name."""
        return self.model_copy(update={**{section: {} for section in MODEL_SPECS}, **specs})

    @property
    def classes(self) -> list[str]:
        """Custom classes, ``package.module:Class``, which are imported and run, and models whose own code is."""
        specs = (spec for of in self.models.values() for spec in of.values())
        return list(dict.fromkeys(spec.imports for spec in specs if spec.imports is not None))

    @model_validator(mode="after")
    def _check_moved(self) -> Config:
        if not self.embeds_images and len({*self.moved.values()}) < len(self.moved):
            raise ValueError("moved: with images: reference, each former folder can be in one place only")
        return self

    @model_validator(mode="after")
    def _check_published(self) -> Config:
        if self.reinforcements is None and (self.join or self.augmentations.own):
            name = "join" if self.join else "augmentations.own"
            raise ValueError(f"{name}: used with `reinforcements` only; set labels.NAME.join for `labels`")
        if self.labels and self.reinforcements is not None:
            raise ValueError("labels: not with `reinforcements`; make a dataset of these, and name it in `labels`")
        models = (*self.teachers.items(), *self.captioners.items())
        published = [name for name, spec in models if spec.published]
        if published and self.reinforcements is None:
            names = ", ".join(published)
            raise ValueError(f"{names}: family published is read from `reinforcements`, which is not set; set it")
        crops = self.reinforcements is not None and not self.augmentations.own
        if crops and self.input.reduce_to is not None:
            raise ValueError("input.reduce_to: remove it; published reinforcements were made on images of full size")
        if crops and (sampled := self.augmentations.model_fields_set - {"count", "size"}):
            raise ValueError(
                f"augmentations.{sorted(sampled)[0]}: remove it; with `reinforcements`, augmentations are not sampled "
                "but read, and only `count` and `size` can be set, to what was published"
            )
        return self


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML config and apply ``key.sub=value`` overrides (values are YAML). Raises UserError."""
    return settings.load(Config, path, overrides)


def parse_config(data: dict[str, Any], where: str = "config") -> Config:
    """Validate a mapping. Raises UserError with one line per error."""
    return settings.parse(Config, data, where)
