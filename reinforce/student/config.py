"""The config of a student's training: its loss, data and model, typed and validated before anything starts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    BeforeValidator,
    Field,
    field_validator,
    model_validator,
)

from reinforce.evaluation.config import Evaluation
from reinforce.settings import Accelerated, ImagesFrom, InSchema, Named, OneOrMore, Section, either
from reinforce.training.config import TrackersOfRun, Training
from teachers.backbone_spec import BackboneSpec
from teachers.open_clip.family import PREPROCESS, Preprocess
from teachers.registry import AnyTeacher
from teachers.spec import TeacherSpec

#: The modules of the terms in ``reinforce.student.terms``, in the order of the losses.
TERMS = (
    *("pairs", "scales", "features", "interactive", "probabilities", "dense"),
    *("anchor_similarities", "anchor_features", "anchor_weights"),
)
#: Keys that may change when a training run resumes: how fast it reads.
READING = ("data.workers", "data.prefetch", "data.images_from")
#: Keys of terms that are added to the loss of images, whichever lambda is.
OF_IMAGES = ("probabilities", "dense")
#: Sections of a run's config with the models that the term of a key learns from, if they are no teachers.
OTHER_MODELS = {"probabilities": "classifiers"}


class Anchor(Section):
    """What keeps a fine-tuned student near its start; each part is added to the loss by its weight, for any lambda."""

    teacher: str | None = Field(
        None,
        min_length=1,
        description="the stored (or online) teacher that is the student before its fine-tuning, for `similarities` and "
        "`features`; it is read in addition to `data.teachers`, and no part of the ensemble",
    )
    similarities: float | None = Field(
        None, gt=0, description="weight of distilling the similarities of images and texts of `teacher` alone"
    )
    features: float | None = Field(
        None, gt=0, description="weight of 1 - cosine of the student's vectors and those of `teacher`, not projected"
    )
    weights: float | None = Field(
        None, gt=0, description="weight of half the squared distance of all weights from their start (L2-SP)"
    )

    @model_validator(mode="after")
    def _teacher_of_parts(self) -> Anchor:
        stored = self.similarities or self.features
        if stored and self.teacher is None:
            raise ValueError("`similarities` and `features` need `teacher`: the name of the student's stored vectors")
        if not stored and (self.teacher is not None or self.weights is None):
            raise ValueError("set a weight: `similarities` or `features` of `teacher`, or `weights`")
        return self


class TeacherTerm(Section):
    """A term that learns from what teachers have besides vectors, whichever lambda is."""

    weight: float = Field(gt=0, description="weight of the loss, which is added to the others, whichever lambda is")
    teachers: list[str] | None = None


_Term = TypeVar("_Term", bound=TeacherTerm)


#: A section of which the config may have the weight alone.
OrWeight = Annotated[
    _Term | None,
    BeforeValidator(
        lambda value: {"weight": value} if isinstance(value, int | float) and not isinstance(value, bool) else value
    ),
    InSchema(lambda section: either({"exclusiveMinimum": 0, "type": "number"}, section)),
]


class DenseLoss(TeacherTerm):
    """How the student's spatial map approaches the patch vectors of teachers; see student/terms/dense.py."""

    teachers: list[str] | None = Field(
        None,
        min_length=1,
        description="teachers whose patches are learnt; default: those with stored patches, and of online teachers "
        "those that set `patches`, or the only one that has some",
    )
    stage: int = Field(
        -1, description="stage or block of the image tower whose output is the map, from the end if negative"
    )
    balance: Literal["standardise", "phi-s"] = Field(
        "standardise",
        description="`standardise`: mean 0 and deviation 1 in each channel; `phi-s`: the same variance in all, by a "
        "rotation and one scale, so that channels keep their proportions",
    )
    cosine: float = Field(
        0.9,
        ge=0,
        le=1,
        description="share of 1 - cosine of each patch; the rest is the smooth L1 distance of each number",
    )


class FeatureLoss(Section):
    """How the student's features approach the vectors of teachers; see student/terms/features.py."""

    teachers: Literal["none", "one-sided", "all"] = Field(
        "one-sided", description="teachers whose vectors the student's features, or a projection of them, approach"
    )
    head: Literal["linear", "none"] = Field(
        "linear",
        description="`linear`: a projection for each teacher, which is not exported; `none`: the features themselves "
        "approach the vectors, so that the student is exported into the teacher's space; see `student.text`",
    )
    distance: Literal["cosine", "l2", "similarities"] = Field(
        "cosine",
        description="`cosine`: 1 - cosine; `l2`: squared distance; `similarities`: cross-entropy of the similarities "
        "with the teacher's vectors of the batch and of `queue`",
    )
    balance: Literal["none", "standardise", "phi-s", "dispersion"] = Field(
        "none",
        description="what makes teachers comparable, by statistics of the first 4,096 examples: `standardise`: mean 0 "
        "and deviation 1 in each dimension; `phi-s`: the same variance in all dimensions, by a rotation and one scale; "
        "`dispersion`: the loss of each teacher is divided by that of its best constant vector",
    )
    temperature: float = Field(0.07, gt=0, description="for `similarities`: by which cosines are divided")
    queue: int = Field(
        0, ge=0, description="for `similarities`: vectors of earlier batches that are compared with, beside the batch's"
    )

    @model_validator(mode="after")
    def _keys_fit(self) -> FeatureLoss:
        others = FeatureLoss.model_fields
        given = [key for key in ("temperature", "queue") if getattr(self, key) != others[key].default]
        if given and self.distance != "similarities":
            raise ValueError(f"`{given[0]}` needs `distance: similarities`; remove it")
        if self.moves and self.head == "none":
            raise ValueError(
                f"vectors balanced by `{self.balance}` are no longer of the teacher's space: remove `balance` or `head`"
            )
        if self.balance == "dispersion" and self.distance == "similarities":
            raise ValueError("`balance: dispersion` is for the distances cosine and l2; remove it")
        return self

    @property
    def moves(self) -> bool:
        """Whether vectors are changed, not only the weights of teachers."""
        return self.balance in ("standardise", "phi-s")


def _check_teacher_weights(value: Any) -> Any:
    numbers = [*value.values()] if isinstance(value, Mapping) else [None]
    if value != "confidence" and not all(
        isinstance(one, (int, float)) and not isinstance(one, bool) and 0 < one < math.inf for one in numbers
    ):
        raise ValueError(f"must be confidence, or weights above 0 by teacher, such as {{dino: 2.0}}, got {value!r}")
    return value


class Loss(Section):
    """(1 - lambda) x CLIP loss + lambda x (distillation + features), summed over true and synthetic captions."""

    place = "loss"

    lambda_: float = Field(
        1.0, ge=0, le=1, alias="lambda", description="1 is best for zero-shot, 0.7 for retrieval; 0 reads no teacher"
    )
    form: Literal["softmax", "sigmoid"] = Field("softmax", description="form of the CLIP and distillation losses")
    logit_scales: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="logit scales by teacher; default: those of the dataset or the model"
    )
    weights: Annotated[
        dict[str, float] | Literal["confidence"],
        BeforeValidator(_check_teacher_weights),
        InSchema(
            lambda _: either(
                {"additionalProperties": {"exclusiveMinimum": 0, "type": "number"}, "type": "object"},
                {"const": "confidence"},
            )
        ),
    ] = Field(
        default_factory=dict,
        description="weights by teacher in each mean over teachers, default: 1; or `confidence`: in "
        "similarities and features, those of each row by the probability that a teacher gives to the true pair",
    )
    learn_scales: bool = Field(
        False,
        description="learn each teacher's logit scale, starting from its given value, from the true pairs of each "
        "batch; see docs/loss.md",
    )
    logit_biases: dict[str, float] = Field(
        default_factory=dict,
        description="biases by teacher, for `sigmoid`; default: computed from each batch, see docs/loss.md",
    )
    features: Annotated[
        FeatureLoss,
        BeforeValidator(lambda value: {"teachers": value} if isinstance(value, str) else value),
        InSchema(lambda section: either({"enum": ["none", "one-sided", "all"]}, section)),
    ] = Field(FeatureLoss(), description="teachers whose vectors the student's features approach")
    features_weight: float = Field(1.0, gt=0, description="weight of the `features` loss, relative to distillation")
    interactive: float | None = Field(
        None,
        gt=0,
        description="weight, relative to distillation, of contrasting the student's images with the teachers' texts "
        "and the reverse, see student/terms/interactive.py; 1 in its publication; default: not computed",
    )
    probabilities: float | None = Field(
        None,
        gt=0,
        description="weight of learning classifiers' probabilities of images, by a linear head; it is added to the "
        "other losses, whichever lambda is; default: not learnt",
    )
    dense: OrWeight[DenseLoss] = Field(
        None, description="learning the patch vectors of teachers; its weight, or a mapping; default: not learnt"
    )
    anchor: Anchor | None = Field(None, description="terms against forgetting in a fine-tuning; default: none")
    teachers: Named[AnyTeacher] = Field(
        default_factory=dict,
        description="online teachers: models that run during training, as in `reinforce run`, instead of stored "
        "embeddings; precision: fp32 unless it is given",
    )

    @property
    def online(self) -> bool:
        """Whether teachers run during training instead of their stored embeddings being read."""
        return bool(self.teachers)

    @property
    def named_weights(self) -> Mapping[str, float]:
        """The weights that are given by teacher."""
        return self.weights if isinstance(self.weights, dict) else {}

    @property
    def anchors(self) -> list[str]:
        """The teacher of `anchor`, if it has one."""
        return [] if self.anchor is None or self.anchor.teacher is None else [self.anchor.teacher]

    @property
    def of_images(self) -> list[str]:
        """The keys that are set, by their path, and need images."""
        online = ["loss.teachers"] if self.online else []
        return [*(f"loss.{key}" for key in OF_IMAGES if getattr(self, key) is not None), *online]

    @property
    def teacher_terms(self) -> list[TeacherTerm]:
        """The sections that are set of terms that learn from teachers, whichever lambda is."""
        return [value for _, value in self if isinstance(value, TeacherTerm)]

    @property
    def reads_ensemble(self) -> bool:
        """Whether some term learns from teachers that are not the anchor's."""
        return self.lambda_ > 0 or bool(self.teacher_terms)

    @field_validator("teachers")
    @classmethod
    def _resolve_precisions(cls, teachers: dict[str, TeacherSpec]) -> dict[str, TeacherSpec]:
        for name, spec in teachers.items():
            if spec.precision == "auto" and "precision" in spec.model_fields_set:
                raise ValueError(f"{name}: `precision: auto` is for `reinforce run`; set fp32, tf32, bf16 or fp16")
            if spec.precision == "fp8":
                raise ValueError(
                    f"{name}: `precision: fp8` is for `reinforce run`, which compares it with bf16; set bf16"
                )
        # Checkpoints record it. The default is fp32, not `auto` as in a run.
        return {name: spec.model_copy(update={"precision": spec.resolved_precision}) for name, spec in teachers.items()}

    @model_validator(mode="after")
    def _check_form(self) -> Loss:
        if self.logit_biases and self.form != "sigmoid":
            raise ValueError("`logit_biases` needs `form: sigmoid`; remove it")
        if self.learn_scales and (self.form != "softmax" or self.lambda_ == 0):
            raise ValueError("`learn_scales` needs `form: softmax` and a lambda above 0: otherwise no scale is learnt")
        return self


def _as_weights(value: Any) -> Any:
    """Accept a name, or a list of names, as equal weights."""
    value = [value] if isinstance(value, str) else value
    return dict.fromkeys(value, 1.0) if isinstance(value, list) and all(isinstance(v, str) for v in value) else value


def _as_sources(value: Any) -> Any:
    """Accept one URL, or a list of URLs and sections."""
    values = [value] if isinstance(value, (str, dict)) else value
    if isinstance(values, list):
        return [{"url": v} if isinstance(v, str) else v for v in values]
    return values


def _sources_schema(sources: dict[str, Any]) -> dict[str, Any]:
    entry = either({"type": "string"}, sources["items"])
    return either(entry, {**sources, "items": entry})


Weights = Annotated[
    dict[str, Annotated[float, Field(gt=0)]],
    BeforeValidator(_as_weights),
    InSchema(lambda weights: either({"type": "string"}, {"type": "array", "items": {"type": "string"}}, weights)),
]


class Source(Section):
    """One reinforced dataset of a training run."""

    url: str = Field(min_length=1, description="folder or fsspec URI of a reinforced dataset")
    weight: float = Field(1.0, gt=0, description="relative share of the samples that come from it")
    view: str | None = Field(None, description="view of `reinforce select` whose samples are read; default: all")


class Data(Section):
    """What is read from the reinforced datasets, and how a training example is made from a sample."""

    place = "data"

    datasets: Annotated[list[Source], BeforeValidator(_as_sources), InSchema(_sources_schema)] = Field(
        min_length=1, description="a URL, or a list of URLs or {url, weight, view}"
    )
    teachers: OneOrMore | None = Field(
        None, description="teachers whose embeddings are read; default: all of the dataset"
    )
    classifiers: OneOrMore | None = Field(
        None, description="classifiers whose probabilities are read for `loss.probabilities`; default: all"
    )
    captioners: Weights | None = Field(
        None,
        description="captioners whose captions are read: names or {name: weight}; default: all, equally; []: none. "
        "syn_* stands for each whose name begins so",
    )
    images_from: ImagesFrom = None
    captions: Literal["both", "mixed", "none"] = Field(
        "both",
        description="`both`: a true and a synthetic caption per example; `mixed`: one of them, see `synthetic`; "
        "`none`: images alone",
    )
    images: Literal["none"] | None = Field(
        None,
        description="`none`: texts alone, for a text tower that learns vectors: no image is read, and the image tower "
        "is not trained; default: an augmentation of each image",
    )
    parallel: Weights | None = Field(
        None,
        description="texts that learn the vectors of the true caption, in place of synthetic ones or mixed with them: "
        "`json:FIELD` of the stored metadata, or captioners that translate the caption; names or {name: weight}",
    )
    synthetic: float = Field(0.5, ge=0, le=1, description="with `mixed`: share of examples with a synthetic caption")
    pick: Literal["random", "sequential", "epoch"] = Field(
        "random",
        description="how augmentation and synthetic caption are picked: at random, in turn over the epochs, or in an "
        "epoch the same ones of all samples",
    )
    translations: Literal["scaled", "stored"] | None = Field(
        None,
        description="TranslateX and TranslateY at another size than the stored one: scaled with it, as the teachers "
        "saw them (the default), or by the stored pixels, as the published trainer replays them",
    )
    backend: Literal["torchvision-pil-1", "fixed-point-1", "device-1"] | None = Field(
        None,
        description="augmentation backend that replays the records: that of each dataset (the default), or this one; "
        "device-1 resizes and augments on the accelerator",
    )
    samples: int | None = Field(None, ge=1, description="samples per epoch; default: all samples of the datasets")
    window: int = Field(
        4096,
        ge=1,
        description="samples of a stream among which rows are shuffled, in addition to row groups; each stream keeps "
        "as many encoded images in memory",
    )
    streams: int | None = Field(
        None,
        ge=1,
        description="parts of the data that are read in parallel; a multiple of ranks x workers, the default, which a "
        "resumed training keeps. With a fixed number that divides the batch, batches are the same for any number of "
        "ranks and workers",
    )
    workers: int | None = Field(
        None,
        ge=0,
        description="loader processes per rank; 0: read in the training process; default: two thirds of the rank's "
        "cores with an accelerator, else 1 for every 32 cores",
    )
    prefetch: int = Field(4, ge=1, description="batches to prefetch; each loader process makes a part of every batch")

    @model_validator(mode="after")
    def _texts_are_read(self) -> Data:
        if self.captions == "none" and (self.images == "none" or self.parallel):
            key = "images: none" if self.images == "none" else "parallel"
            raise ValueError(f"captions: none reads no text, which `{key}` needs: remove one of them")
        return self


BatchNorm = Literal["train", "keep", "merge"]
Quantize = Literal["int8-weights", "int8"]
#: Share of the steps that train with fake quantisation, unless `student.quantize` has another share.
QUANTIZE_SHARE = 0.2
#: How a student is quantised, with the share of the steps; a config may have the name alone.
QuantizeShare = Annotated[
    dict[Quantize, Annotated[float, Field(gt=0, le=1)]],
    Field(max_length=1),
    BeforeValidator(lambda value: {value: QUANTIZE_SHARE} if isinstance(value, str) else value),
    InSchema(lambda shares: either({"enum": [*get_args(Quantize)]}, shares)),
]


class TextTower(Section):
    """The model of open_clip whose text tower and tokenizer a student takes."""

    model: str = Field(min_length=1, description="an open_clip name, hf-hub:ORG/REPO or local-dir:PATH")
    pretrained: str | None = Field(
        None,
        description="pretrained tag or checkpoint of the tower; `transformers`: the language model that its config "
        "names, with a new projection; default: random",
    )


class Student(Section):
    """The model to train: one of open_clip by its name, or a network of images alone."""

    family: Literal["open_clip", "timm"] = Field(
        "open_clip", description="library that `model` belongs to; a model of timm learns from images alone"
    )
    model: str | None = Field(
        None,
        min_length=1,
        description="an open_clip name such as MobileCLIP2-S0, or local-dir:PATH; with timm, a name such as "
        "mobilenetv3_small_100, hf-hub:ORG/REPO or local-dir:PATH",
    )
    class_: str | None = Field(
        None,
        alias="class",
        pattern=r"^[\w.]+:\w+$",
        description="instead of `model`: a class or function package.module:Name that builds a torch module from "
        "images [B, 3, H, W] to features [B, D], such as torchvision.models:resnet18",
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="keyword arguments of `class`, or of timm.create_model"
    )
    without: str | None = Field(
        None, description="with `class`: module of it that is replaced by the identity, such as the classifier fc"
    )
    pretrained: str | None = Field(
        None,
        description="weights to start from: a tag of open_clip, or a checkpoint file by path or fsspec URI; default: "
        "random weights, or those that a local-dir: or hf-hub: model includes",
    )
    preprocess: Preprocess | None = Field(None, description=PREPROCESS)
    text: TextTower | None = Field(
        None,
        description="model whose text tower and tokenizer take the place of the student's own, such as the teacher "
        "whose space it learns; the dimensions are those of the tower that is not trained, else those of `model`",
    )
    dim: int | None = Field(
        None,
        ge=1,
        description="dimensions of its vectors; a tower whose weights have others gets a new last layer, which is "
        "trained and exported; default: as in the config of `model`, or see `text`",
    )
    freeze: list[Literal["image", "text"]] | None = Field(
        None, max_length=1, description="the tower that keeps its pretrained weights; default: none"
    )
    batch_norm: BatchNorm | None = Field(
        None,
        description="`train`: batch normalisations use the statistics of the batch, and the stored ones move; `keep`: "
        "they use the stored ones, which stay, while weights train; `merge`: as `keep`, and a FastViT's branches are "
        "computed as one convolution; default: keep if the student starts from weights, else train",
    )
    image_size: int | None = Field(
        None, ge=16, description="side of its square images in pixels; default: as in the model's config"
    )
    quantize: QuantizeShare | None = Field(
        None,
        description="train the last part with weights rounded to int8 (`int8-weights`), or inputs of layers as well "
        "(`int8`), so that an int8 export keeps its accuracy; the result is in float32. {int8: 1.0}: with the share of "
        f"the steps, the last ones, that it is for; default: {QUANTIZE_SHARE}",
    )

    @field_validator("freeze", mode="before")
    @classmethod
    def _one_tower(cls, towers: Any) -> Any:
        if isinstance(towers, list) and len(towers) > 1:
            raise ValueError("with both towers frozen no encoder is trained: name one, image or text")
        return towers

    @property
    def name(self) -> str:
        """``model``, or the class."""
        return self.model or f"class:{self.class_}"

    @property
    def backbone(self) -> BackboneSpec:
        """The network of a student of images alone."""
        return BackboneSpec(
            self.model, self.class_, self.options, self.without, self.pretrained, self.image_size, self.preprocess
        )

    @property
    def images_alone(self) -> bool:
        """Whether it is a network of images without a text tower."""
        return self.family == "timm" or self.class_ is not None

    @model_validator(mode="after")
    def _keys_fit(self) -> Student:
        if (self.model is None) == (self.class_ is None):
            raise ValueError("set either `model` (with `family` if needed) or `class`")
        if self.class_ is not None and self.family != "open_clip":
            raise ValueError("`family` belongs to `model`; remove it")
        if self.options and not self.images_alone:
            raise ValueError("`options` belongs to `class` and to `family: timm`; remove it")
        if self.without is not None and self.class_ is None:
            raise ValueError("`without` belongs to `class`; remove it")
        given = [key for key in ("freeze", "text", "dim") if getattr(self, key)]
        if given and self.images_alone:
            raise ValueError(f"`{given[0]}` is for models of open_clip, which have two towers; remove it")
        return self


class StudentConfig(Section):
    """A training run of a student on reinforced datasets."""

    output: str = Field(min_length=1, description="folder or fsspec URI of checkpoints, logs and the final weights")
    seed: int = Field(0, ge=0, description="seed of the first weights, the order of samples and every step")
    student: Student
    data: Data
    loss: Loss = Loss()
    accelerator: Accelerated = "fast"
    train: Training
    evaluate: Evaluation = Evaluation()
    log: TrackersOfRun = None

    @model_validator(mode="before")
    @classmethod
    def _read_no_captions(cls, values: Any) -> Any:
        """For a student of images alone, ``data.captions`` is none unless it is set."""
        if not isinstance(values, dict) or not isinstance(values.get("data"), dict):
            return values
        student = values.get("student")
        if isinstance(student, Student):
            alone = student.images_alone
        else:
            alone = isinstance(student, dict) and (student.get("family") == "timm" or bool(student.get("class")))
        return {**values, "data": {"captions": "none", **values["data"]}} if alone else values

    @model_validator(mode="after")
    def _sections_fit(self) -> StudentConfig:
        loss, student = self.loss, self.student
        if student.images_alone:
            self._check_images_alone()
        if self.data.backend == "device-1" and loss.online:
            raise ValueError(
                "data.backend: device-1 makes no images for teachers in the loop; with `loss.teachers` leave it out"
            )
        if self.data.parallel and loss.online:
            raise ValueError(
                "data.parallel: these texts learn the stored vectors of the true caption, and a teacher in the loop "
                "would encode the texts themselves; remove `loss.teachers` or `parallel`"
            )
        alone = next((key for key in ("captions", "images") if getattr(self.data, key) == "none"), None)
        if alone and (loss.logit_scales or loss.learn_scales or loss.form != "softmax"):
            raise ValueError(
                f"with data.{alone}: none there are no similarities of images with texts: remove logit_scales, "
                "learn_scales and form under `loss`"
            )
        if alone == "images" and loss.of_images:
            raise ValueError(
                f"data.images: none reads stored vectors of texts alone: remove {', '.join(loss.of_images)}"
            )
        if self.evaluate.export == "best" and any(share < 1 for share in (student.quantize or {}).values()):
            raise ValueError(
                "with `student.quantize`, `evaluate.export: best` may choose a step before the weights were rounded; "
                "set it to last, or the share of `student.quantize` to 1"
            )
        return self

    def _check_images_alone(self) -> None:
        """Raise ValueError for what a student without a text tower cannot do."""
        if self.data.captions != "none":
            raise ValueError(f"data.captions: {self.student.name} has no text tower; set it to none, or remove it")
        sets = [key for key in ("zero_shot", "retrieval", "suite") if getattr(self.evaluate, key)]
        if sets:
            raise ValueError(f"evaluate.{sets[0]}: {self.student.name} has no text tower; evaluate it by `probes`")
        if self.loss.interactive is not None:
            raise ValueError(f"loss.interactive: {self.student.name} has no text tower; remove it")
        if self.loss.anchor is not None and self.loss.anchor.similarities is not None:
            raise ValueError(f"loss.anchor.similarities: {self.student.name} has no text tower; use `features`")
