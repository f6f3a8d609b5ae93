"""The config of a student's training, typed and validated before anything starts."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from reinforce.config_schema import ImagesFrom, InSchema, Named, either
from reinforce.evaluation.config import Evaluation
from reinforce.images.policy import ReadLimits
from reinforce.processes.fast_paths import Accelerated
from reinforce.settings import Section, without_defaults
from reinforce.student.loss_sections import Anchor, DenseOrWeight
from reinforce.training.config import TrackersOfRun, Training
from teachers.open_clip.options import PREPROCESS, Preprocess
from teachers.registry import AnyTeacher
from teachers.spec import TeacherSpec


def _as_weights(value: Any) -> Any:
    """Accept a list of names as equal weights."""
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
    InSchema(lambda weights: either({"type": "array", "items": {"type": "string"}}, weights)),
]


class Source(Section):
    """One reinforced dataset of a training run."""

    url: str = Field(min_length=1, description="folder or fsspec URI of a reinforced dataset")
    weight: float = Field(1.0, gt=0, description="relative share of the samples that come from it")
    view: str | None = Field(None, description="view of `reinforce select` whose samples are read; default: all")

    _as_before = without_defaults("view")


class Data(Section):
    """What is read from the reinforced datasets, and how a training example is made from a sample."""

    datasets: Annotated[list[Source], BeforeValidator(_as_sources), InSchema(_sources_schema)] = Field(
        min_length=1, description="a URL, or a list of URLs or {url, weight, view}"
    )
    teachers: list[str] | None = Field(
        None, description="teachers whose embeddings are read; default: all of the dataset"
    )
    classifiers: list[str] | None = Field(
        None, description="classifiers whose probabilities are read for `loss.probabilities`; default: all"
    )
    captioners: Weights | None = Field(
        None,
        description="captioners whose captions are read: names or {name: weight}; default: all, equally; []: none. "
        "syn_* stands for each whose name begins so",
    )
    images_from: ImagesFrom = None
    limits: ReadLimits | None = Field(
        None, description="bounds on images, instead of those that a dataset records; default: those of `ReadLimits`"
    )
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


def _as_feature_loss(value: Any) -> Any:
    """Accept the teachers alone."""
    return {"teachers": value} if isinstance(value, str) else value


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
    weights: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="weights by teacher of their mean; default: 1"
    )
    distance: Literal["cosine", "l2", "similarities"] = Field(
        "cosine",
        description="`cosine`: 1 - cosine; `l2`: squared distance; `similarities`: cross-entropy of the similarities "
        "with the teacher's vectors of the batch and of `queue`",
    )
    standardise: bool = Field(
        False,
        description="subtract the mean of each dimension from the stored vectors and divide by its standard deviation, "
        "both over the first 4,096 of them",
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
        if self.standardise and self.head == "none":
            raise ValueError(
                "standardised vectors are no longer of the teacher's space: remove `standardise` or `head`"
            )
        return self

    @model_serializer(mode="wrap")
    def _as_before(self, serialize: SerializerFunctionWrapHandler) -> Any:
        """The teachers alone where nothing else is set, as checkpoints of earlier versions have it."""
        return self.teachers if self == FeatureLoss(teachers=self.teachers) else serialize(self)


class Loss(Section):
    """(1 - lambda) x CLIP loss + lambda x (distillation + features), summed over true and synthetic captions."""

    lambda_: float = Field(
        1.0, ge=0, le=1, alias="lambda", description="1 is best for zero-shot, 0.7 for retrieval; 0 reads no teacher"
    )
    targets: Literal["stored", "online"] = Field(
        "stored", description="`online` runs the teachers during training instead of reading their stored embeddings"
    )
    form: Literal["softmax", "sigmoid"] = Field("softmax", description="form of the CLIP and distillation losses")
    logit_scales: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="logit scales by teacher; default: those of the dataset or the model"
    )
    learn_scales: bool = Field(
        False,
        description="learn each teacher's logit scale, starting from its given value, from the true pairs of each "
        "batch; see student/loss.py",
    )
    logit_biases: dict[str, float] = Field(
        default_factory=dict,
        description="biases by teacher, for `sigmoid`; default: computed from each batch, see student/loss.py",
    )
    features: Annotated[
        FeatureLoss,
        BeforeValidator(_as_feature_loss),
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
    dense: DenseOrWeight = Field(
        None, description="learning the patch vectors of teachers; its weight, or a mapping; default: not learnt"
    )
    anchor: Anchor | None = Field(None, description="terms against forgetting in a fine-tuning; default: none")
    teachers: Named[AnyTeacher] = Field(
        default_factory=dict,
        description="for `online`: the models to run, as in `reinforce run`; precision: fp32 unless it is given",
    )

    _as_before = without_defaults("dense")

    @property
    def anchors(self) -> list[str]:
        """The teacher of `anchor`, if it has one."""
        return [] if self.anchor is None or self.anchor.teacher is None else [self.anchor.teacher]

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
        # Checkpoints record it: before there was `auto`, fp32 was the default.
        return {name: spec.model_copy(update={"precision": spec.resolved_precision}) for name, spec in teachers.items()}

    @model_validator(mode="after")
    def _online(self) -> Loss:
        if self.targets == "online" and not self.teachers:
            raise ValueError("targets `online` needs `teachers`: the models to run")
        if self.targets == "stored" and self.teachers:
            raise ValueError("`teachers` needs `targets: online`; name stored teachers under `data.teachers`")
        if self.logit_biases and self.form != "sigmoid":
            raise ValueError("`logit_biases` needs `form: sigmoid`; remove it")
        if self.learn_scales and (self.form != "softmax" or self.lambda_ == 0):
            raise ValueError("`learn_scales` needs `form: softmax` and a lambda above 0: otherwise no scale is learnt")
        return self


BatchNorm = Literal["train", "keep", "merge"]
Quantize = Literal["int8-weights", "int8"]
#: Share of the steps that train with fake quantisation, unless `student.quantize_share` says otherwise.
QUANTIZE_SHARE = 0.2


class TextTower(Section):
    """The model of open_clip whose text tower and tokenizer a student takes."""

    model: str = Field(min_length=1, description="an open_clip name, hf-hub:ORG/REPO or local-dir:PATH")
    pretrained: str | None = Field(
        None,
        description="pretrained tag or checkpoint of the tower; `transformers`: the language model that its config "
        "names, with a new projection; default: random",
    )


class Student(Section):
    """The model to train, by its name in open_clip."""

    model: str = Field(min_length=1, description="an open_clip name such as MobileCLIP2-S0, or local-dir:PATH")
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
    quantize: Quantize | None = Field(
        None,
        description="train the last part with weights rounded to int8 (`int8-weights`), or inputs of layers as well "
        "(`int8`), so that an int8 export keeps its accuracy; the result is in float32",
    )
    quantize_share: float | None = Field(
        None,
        gt=0,
        le=1,
        description=f"share of the steps, the last ones, that `quantize` is for; default: {QUANTIZE_SHARE}",
    )

    @field_validator("freeze", mode="before")
    @classmethod
    def _one_tower(cls, towers: Any) -> Any:
        if isinstance(towers, list) and len(towers) > 1:
            raise ValueError("with both towers frozen no encoder is trained: name one, image or text")
        return towers

    @model_validator(mode="after")
    def _share_of_something(self) -> Student:
        if self.quantize_share is not None and self.quantize is None:
            raise ValueError("`quantize_share` needs `quantize`: set it to int8-weights or int8, or remove the share")
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

    @model_validator(mode="after")
    def _sections_fit(self) -> StudentConfig:
        loss, student = self.loss, self.student
        if self.data.backend == "device-1" and loss.targets == "online":
            raise ValueError(
                "data.backend: device-1 makes no images for teachers in the loop; with `loss.targets: online` leave it "
                "out"
            )
        alone = next((key for key in ("captions", "images") if getattr(self.data, key) == "none"), None)
        if alone and (loss.logit_scales or loss.learn_scales or loss.form != "softmax"):
            raise ValueError(
                f"with data.{alone}: none there are no similarities of images with texts: remove logit_scales, "
                "learn_scales and form under `loss`"
            )
        of_images = {
            "loss.probabilities": loss.probabilities is not None,
            "loss.dense": loss.dense is not None,
            "loss.targets: online": loss.targets == "online",
        }
        if alone == "images" and any(of_images.values()):
            given = ", ".join(key for key, is_given in of_images.items() if is_given)
            raise ValueError(f"data.images: none reads stored vectors of texts alone: remove {given}")
        if student.quantize is not None and student.quantize_share != 1 and self.evaluate.export == "best":
            raise ValueError(
                "with `student.quantize`, `evaluate.export: best` may choose a step before the weights were rounded; "
                "set it to last, or `student.quantize_share` to 1"
            )
        return self
