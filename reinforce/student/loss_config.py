"""The config of a student's loss."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from reinforce.config_schema import InSchema, Named, either
from reinforce.settings import Section, without_defaults
from teachers.registry import AnyTeacher
from teachers.spec import TeacherSpec

#: The modules of the terms in ``reinforce.student.terms``, in the order of the losses.
TERMS = (
    *("pairs", "scales", "features", "interactive", "probabilities", "dense"),
    *("anchor_similarities", "anchor_features", "anchor_weights"),
)
#: Keys of terms that are added to the loss of images, whichever lambda is, and keys that came later than the others.
OF_IMAGES, _LATER = ("probabilities", "dense"), ("dense",)
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


def _as_teacher_term(value: Any) -> Any:
    """Accept the weight alone."""
    return {"weight": value} if isinstance(value, int | float) and not isinstance(value, bool) else value


#: A section of which the config may have the weight alone.
OrWeight = Annotated[
    _Term | None,
    BeforeValidator(_as_teacher_term),
    InSchema(lambda section: either({"exclusiveMinimum": 0, "type": "number"}, section)),
]


class DenseLoss(TeacherTerm):
    """How the student's spatial map approaches the patch vectors of teachers; see student/terms/dense.py."""

    teachers: list[str] | None = Field(
        None, min_length=1, description="teachers whose patches are learnt; default: all that have some"
    )
    stage: int = Field(
        -1, description="stage or block of the image tower whose output is the map, from the end if negative"
    )
    cosine: float = Field(0.9, ge=0, description="weight of 1 - cosine of each patch")
    smooth_l1: float = Field(0.1, ge=0, description="weight of the smooth L1 distance of each number")

    @model_validator(mode="after")
    def _some_distance(self) -> DenseLoss:
        if not self.cosine + self.smooth_l1:
            raise ValueError("`cosine` and `smooth_l1` are both 0, so nothing would be learnt; set one")
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
        "both over the first 4,096 examples; images, true and synthetic captions have their own",
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

    place = "loss"

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
    dense: OrWeight[DenseLoss] = Field(
        None, description="learning the patch vectors of teachers; its weight, or a mapping; default: not learnt"
    )
    anchor: Anchor | None = Field(None, description="terms against forgetting in a fine-tuning; default: none")
    teachers: Named[AnyTeacher] = Field(
        default_factory=dict,
        description="for `online`: the models to run, as in `reinforce run`; precision: fp32 unless it is given",
    )

    _as_before = without_defaults(*_LATER)

    @property
    def anchors(self) -> list[str]:
        """The teacher of `anchor`, if it has one."""
        return [] if self.anchor is None or self.anchor.teacher is None else [self.anchor.teacher]

    @property
    def of_images(self) -> list[str]:
        """The keys that are set, by their path, and need images."""
        online = ["loss.targets: online"] if self.targets == "online" else []
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
