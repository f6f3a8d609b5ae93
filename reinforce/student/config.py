"""The config of a student's training: what a user writes, typed and checked before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from reinforce import settings
from reinforce.config import LayerName
from reinforce.evaluation.config import Evaluation
from reinforce.settings import Section
from reinforce.training.config import Training
from teachers.spec import TeacherSpec


def _weights(value: Any) -> Any:
    """Names alone are equal weights."""
    return dict.fromkeys(value, 1.0) if isinstance(value, list) and all(isinstance(v, str) for v in value) else value


def _sources(value: Any) -> Any:
    """One URL, or a list of URLs and sections."""
    values = [value] if isinstance(value, (str, dict)) else value
    if isinstance(values, list):
        return [{"url": v} if isinstance(v, str) else v for v in values]
    return values


Shares = Annotated[dict[str, Annotated[float, Field(gt=0)]], BeforeValidator(_weights)]


class Source(Section):
    """One reinforced dataset of a training."""

    url: str = Field(min_length=1, description="folder or fsspec URL of a reinforced dataset")
    weight: float = Field(1.0, gt=0, description="share of the samples that come from it, before normalisation")


class Data(Section):
    """What is read of the reinforced datasets, and how one example is made of a sample."""

    datasets: Annotated[list[Source], BeforeValidator(_sources)] = Field(
        min_length=1, description="a URL, or a list of URLs or {url, weight}"
    )
    teachers: list[str] | None = Field(None, description="whose embeddings are read; default: all of the dataset")
    captioners: Shares | None = Field(
        None, description="whose captions are mixed, by name or {name: weight}; default: all alike; []: none"
    )
    captions: Literal["both", "mixed"] = Field(
        "both", description="`both`: a true and a synthetic caption per example; `mixed`: one, by `synthetic`"
    )
    synthetic: float = Field(0.5, ge=0, le=1, description="with `mixed`: share of examples with a synthetic caption")
    pick: Literal["random", "sequential"] = Field(
        "random", description="which augmentation and which synthetic caption: drawn, or by turns over the epochs"
    )
    samples: int | None = Field(None, ge=1, description="samples of one epoch; default: all of the datasets")
    window: int = Field(
        4096,
        ge=1,
        description="samples of a stream among which rows are shuffled, beside row groups; so many encoded images are "
        "in memory for each stream",
    )
    streams: int | None = Field(
        None,
        ge=1,
        description="parts in which the data is read side by side, a multiple of ranks x workers (the default); equal "
        "streams that divide the batch give equal batches at any number of ranks and workers",
    )
    workers: int = Field(1, ge=0, description="loader processes per rank; 0: the training process reads")
    prefetch: int = Field(4, ge=1, description="batches that are kept ready; each process makes its part of every one")


class Loss(Section):
    """(1 - lambda) x CLIP's loss + lambda x (distillation + features), over true and over synthetic captions."""

    lambda_: float = Field(
        1.0, ge=0, le=1, alias="lambda", description="1 is best for zero-shot, 0.7 for retrieval; 0 reads no teacher"
    )
    targets: Literal["stored", "online"] = Field(
        "stored", description="`online` runs the teachers in the loop instead of reading their embeddings"
    )
    form: Literal["softmax", "sigmoid"] = Field("softmax", description="of CLIP's and of the distillation loss")
    logit_scales: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="by teacher, instead of the dataset's or the model's own"
    )
    learn_scales: bool = Field(
        False,
        description="learn each teacher's logit scale, from there on, by how well it matches the batch's true pairs; "
        "see student/loss.py",
    )
    logit_biases: dict[str, float] = Field(
        default_factory=dict, description="by teacher, with `sigmoid`; default: from each batch, see student/loss.py"
    )
    features: Literal["none", "one-sided", "all"] = Field(
        "one-sided", description="teachers whose vectors a projection of the student's approaches by cosine"
    )
    features_weight: float = Field(1.0, gt=0, description="of that, beside distillation's 1")
    teachers: dict[LayerName, TeacherSpec] = Field(
        default_factory=dict, description="with `online`: the models that are run, as in `reinforce run`"
    )

    @model_validator(mode="after")
    def _online(self) -> Loss:
        if self.targets == "online" and not self.teachers:
            raise ValueError("targets `online` needs `teachers`: the models to run")
        if self.targets == "stored" and self.teachers:
            raise ValueError("`teachers` are run only with `targets: online`; name stored ones under `data.teachers`")
        if self.logit_biases and self.form != "sigmoid":
            raise ValueError("`logit_biases` belong to `form: sigmoid`: a softmax has none; remove them")
        if self.learn_scales and (self.form != "softmax" or self.lambda_ == 0):
            raise ValueError("`learn_scales` needs `form: softmax` and a lambda above 0: else no scale is learnt by it")
        return self


class Student(Section):
    """The model that learns, by open_clip's names."""

    model: str = Field(min_length=1, description="an open_clip name such as MobileCLIP2-S0, or local-dir:PATH")
    pretrained: str | None = Field(None, description="pretrained tag or checkpoint to start from; default: random")


class StudentConfig(Section):
    """A training of a student from reinforced datasets."""

    output: str = Field(min_length=1, description="folder or fsspec URL of checkpoints, logs and the final weights")
    seed: int = Field(0, ge=0)
    student: Student
    data: Data
    loss: Loss = Loss()
    train: Training
    evaluate: Evaluation = Evaluation()


def load_student_config(path: str | Path, overrides: list[str] | None = None) -> StudentConfig:
    """Read a YAML config and apply ``key.sub=value`` overrides. Raises UserError."""
    return settings.load(StudentConfig, path, overrides)
