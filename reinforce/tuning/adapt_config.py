"""The config of ``reinforce adapt``: a released model, a user's images, and the configs of the steps between; and which
mixture of weights is taken, the best on the domain that loses little of the general sets.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, Field, field_validator, model_validator

from reinforce import settings
from reinforce.config import Config, parse_config
from reinforce.engine.starter import CLASS_TEXTS, Look, look_at
from reinforce.errors import UserError
from reinforce.evaluation.config import Evaluation
from reinforce.explore.config import SelectConfig
from reinforce.settings import Section, flatten
from reinforce.source.formats.folder import CLASS
from reinforce.student.config import StudentConfig
from reinforce.training.config import Training

#: Names in the datasets and configs that a step reads of another.
RELEASED, DOMAIN, TRAIN, HELD_OUT = "released", "domain", "train", "held-out"
FEWEST_IMAGES = 20
#: Keys of the steps' configs that `adapt` sets by its own keys, which are named after them.
_OWN = {
    "run": {"source": "source", "output": "output", "teachers": "teachers"},
    "student": {
        "output": "output", "student.model": "released", "student.pretrained": "released",
        "student.image_size": "released", "data.datasets": "source",
    },
}  # fmt: skip


class Released(Section):
    """The model that is adapted, with its weights."""

    model: str = Field(min_length=1, description="an open_clip name such as MobileCLIP2-S0, hf-hub:, or local-dir:PATH")
    pretrained: str | None = Field(
        None, description="tag or checkpoint of its weights; none for hf-hub: and local-dir:"
    )


class AdaptConfig(Section):
    """One adaptation of a released student to images of a domain."""

    configs: ClassVar[Mapping[str, type[BaseModel]]] = {"run": Config, "student": StudentConfig}

    source: str = Field(min_length=1, description="images with captions, or in folders of classes; as of `init`")
    output: str = Field(min_length=1, description="folder for the dataset, the training run, the model and the page")
    released: Released
    seed: int = Field(0, ge=0, description="seed of the held-out part, of augmentations and of the training")
    held_out: float = Field(0.2, gt=0, lt=1, description="share of the images that are evaluated and not trained on")
    copies: float = Field(
        0.95, gt=0, le=1, description="cosine of the released model's vectors from which two images are near copies"
    )
    allow: float = Field(0.5, ge=0, description="points (%) that the mean of the general metrics may lose")
    teachers: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="teachers besides the released model, as in a run's config"
    )
    general: Evaluation = Field(Evaluation(), description="sets on which the model must stay good")
    run: dict[str, Any] = Field(
        default_factory=dict, description="keys of the run's config that replace those of `adapt`, such as workers"
    )
    student: dict[str, Any] = Field(
        default_factory=dict, description="keys of the training's config that replace those of `adapt`, such as train"
    )

    @field_validator("source", "output")
    @classmethod
    def _without_slash(cls, url: str) -> str:
        return url.rstrip("/") or url

    @model_validator(mode="after")
    def _check_names(self) -> AdaptConfig:
        for section, changed in (("run", self.run), ("student", self.student)):
            for key, _ in flatten(changed):
                for own, named in _OWN[section].items():
                    if f"{key}.".startswith(f"{own}."):
                        raise ValueError(f"{section}.{key} follows from `{named}` of the adaptation; remove it")
        if RELEASED in self.teachers:
            raise ValueError(f"teachers: {RELEASED!r} is the name of the model that is adapted; choose another")
        for sets in (self.general.zero_shot, self.general.retrieval):
            if DOMAIN in sets:
                raise ValueError(f"general: {DOMAIN!r} is the name of the held-out images; choose another")
        return self


@dataclass(frozen=True)
class Point:
    """Metrics, between 0 and 1, of the first model's weights mixed with a share ``alpha`` of the second's."""

    alpha: float
    metrics: Mapping[str, float]


def mean(metrics: Mapping[str, float], names: Sequence[str]) -> float:
    """The mean of some metrics; NaN if one is missing, or without names."""
    values = [metrics.get(name, math.nan) for name in names]
    return sum(values) / len(values) if values else math.nan


@dataclass(frozen=True)
class Rule:
    """Of points that lose at most ``allow`` of the mean of ``general``, the one with the best mean of ``domain``.

    The loss is that against the point of alpha 0. Of equal points, the one with the better general mean and then the
    one of the smaller alpha is chosen.
    """

    domain: Sequence[str]
    general: Sequence[str] = ()
    allow: float = 0.005

    def __post_init__(self) -> None:
        if both := set(self.domain) & set(self.general):
            raise UserError(f"{min(both)} is a metric of the domain and a general one. Name it once.")

    def choose(self, points: Sequence[Point]) -> Point:
        """Raises UserError without a point of alpha 0, or if a metric is missing of it."""
        start = next((point for point in points if point.alpha == 0), None)
        if start is None:
            raise UserError("the metrics of alpha 0, with which others are compared, are missing.")
        for name in (*self.domain, *self.general):
            if not math.isfinite(start.metrics.get(name, math.nan)):
                raise UserError(f"{name} has no value for the first model; see the set's line above.")
        least = mean(start.metrics, self.general) - self.allow - 1e-9
        kept: dict[tuple[float, float, float], Point] = {}
        for point in points:
            domain, general = mean(point.metrics, self.domain), mean(point.metrics, self.general)
            if math.isfinite(domain) and (not self.general or general >= least):
                kept[domain, general if self.general else 0.0, -point.alpha] = point
        return kept[max(kept)]

    def means(self, metrics: Mapping[str, float]) -> str:
        """The means of metrics in a short line: ``domain 71.20 %, general 65.00 %``."""
        names = {"domain": self.domain} | ({"general": self.general} if self.general else {})
        return ", ".join(f"{name} {100 * mean(metrics, of):.2f} %" for name, of in names.items())

    def describe(self) -> str:
        """The rule in one sentence."""
        domain = ", ".join(self.domain)
        if not self.general:
            return f"best {domain}"
        return f"best {domain} that loses at most {100 * self.allow:g} points of the mean of {', '.join(self.general)}"


_EPOCHS, _LARGEST_BATCH = 10, 256
_CROPS, _SCALE = 4, [0.5, 1.0]
_ANCHORS = {"similarities": 1.0, "features": 1.0}
PER_CLASS = "mean_per_class"
_RETRIEVAL = ("text_to_image/r1", "image_to_text/r1")


@dataclass(frozen=True)
class Domain:
    """What the images of a source state: captions, classes, or both. ``input`` are keys of a run's `input`."""

    source: str
    found: str
    input: Mapping[str, Any]
    classes: Sequence[str]
    captions: bool
    notes: Sequence[str]

    def metrics(self, unequal: bool) -> tuple[str, ...]:
        """The metrics of the held-out images by which a model is chosen; ``unequal``: classes of unequal sizes."""
        of_classes = (f"zero_shot/{DOMAIN}/{PER_CLASS if unequal else 'top1'}",) if self.classes else ()
        return of_classes + tuple(f"retrieval/{DOMAIN}/{way}" for way in _RETRIEVAL if self.captions)

    def sets(self, dataset: str) -> dict[str, Any]:
        """The held-out images as sets of an evaluation."""
        where = {"view": HELD_OUT}
        sets: dict[str, Any] = {}
        if self.classes:
            labels = {"label": f"json:{CLASS}", "classes": [*self.classes], "templates": [*CLASS_TEXTS]}
            sets["zero_shot"] = {DOMAIN: {"images": dataset, **where, **labels}}
        if self.captions:
            sets["retrieval"] = {DOMAIN: {"pairs": dataset, **where}}
        return sets


def find_domain(config: AdaptConfig) -> Domain:
    """Look at the source. Raises UserError if its images have neither captions nor folders of two or more classes."""
    look: Look = look_at(config.source, f"{dataset_of(config)}-new")  # a finished dataset has its own lists
    fields = look.fields
    if fields.unread is not None:
        raise UserError(f"{config.source}: {fields.unread}")
    captioned = fields.has_captions and not fields.classes
    if not captioned and not look.classes:
        raise UserError(
            f"{config.source}: no caption was found, and its images are not in folders of two or more classes. Write "
            "captions beside the images (a.txt for a.jpg, or metadata.csv), or put the images of each class into a "
            "folder. If the folders of classes are in one of its folders, such as train, name that one."
        )
    keys = fields.as_input()
    if captioned and look.classes:  # a caption where there is one, and the class as metadata
        keys["captions"] = [*keys.get("captions", ["txt", "json:caption"]), CLASS]
    return Domain(look.source, look.found, keys, look.classes, captioned, [*fields.lines(), *look.notes])


def dataset_of(config: AdaptConfig) -> str:
    return f"{config.output}/dataset"


def training_of(config: AdaptConfig) -> str:
    return f"{config.output}/training"


def run_config(config: AdaptConfig, domain: Domain, size: int) -> Config:
    """The run that stores the embeddings of the released model and of other teachers, of crops of ``size`` pixels."""
    base = {
        "source": domain.source,
        "output": dataset_of(config),
        "seed": config.seed,
        "input": dict(domain.input),
        "augmentations": {"count": _CROPS, "size": size, "scale": _SCALE},
        "teachers": {RELEASED: config.released.model_dump(exclude_none=True), **config.teachers},
    }
    return parse_config(settings.merge(base, config.run), "the run of the adaptation")


def held_out_images(config: AdaptConfig, images: int) -> int:
    """How many of so many images are held out. Raises UserError for too few."""
    if images < FEWEST_IMAGES:
        raise UserError(
            f"{config.source} has {images} usable images, and an adaptation needs {FEWEST_IMAGES}: with fewer, its "
            "effect cannot be told from chance. Add images."
        )
    held_out = max(1, round(config.held_out * images))
    if held_out >= images - 1:
        raise UserError(f"held_out: {config.held_out:g} of {images} images leaves nothing to train on. Lower it.")
    return held_out


def views(config: AdaptConfig, held_out: int, copies: Sequence[Sequence[str]]) -> Iterator[SelectConfig]:
    """The views that divide the images: so many held out at random, with ``copies`` on one side, and the others."""
    drawn = {"count": held_out, "together": [[*group] for group in copies]}
    for name, rule in ((HELD_OUT, "sample"), (TRAIN, "all_but")):
        keys = {"dataset": dataset_of(config), "name": name, "rules": [{rule: drawn}], "seed": config.seed}
        yield settings.parse(SelectConfig, keys)


def training_config(config: AdaptConfig, domain: Domain, images: int) -> StudentConfig:
    """The training on so many ``images``, those that are not held out."""
    given = config.student.get("train") or {}
    if isinstance(given, Mapping):
        stated_length = any(given.get(key) is not None for key in settings.LENGTHS)
        batch = min(_LARGEST_BATCH, 2 ** max(1, int(math.log2(max(2, images / 4)))))
        given = {"batch": batch, **({} if stated_length else {"epochs": _EPOCHS}), **given}
    train = settings.parse(Training, given, "the adaptation's student.train")
    steps = train.steps or max(1, round((train.epochs or 0) * images / train.batch))
    base = {
        "output": training_of(config),
        "seed": config.seed,
        "student": config.released.model_dump(exclude_none=True),
        "data": {
            "datasets": [{"url": dataset_of(config), "view": TRAIN}],
            "captioners": [],
            **({"teachers": [*config.teachers]} if config.teachers else {}),
        },
        "loss": {"lambda": 0.5 if config.teachers else 0.0, "anchor": {"teacher": RELEASED, **_ANCHORS}},
        "train": {
            "steps": steps,
            "optimizer": {"lr": 1e-5, "final_lr": 0.0, "warmup": steps // 10, "weight_decay": 0.1},
            "compute": {"precision": "auto"},
            "checkpoints": {"every": max(1, steps // 4)},
            "log_every": max(1, steps // 20),
        },
        "evaluate": sets_of(config, domain).model_dump(mode="json", exclude_unset=True),
    }
    others = {key: value for key, value in given.items() if key not in settings.LENGTHS}
    changed = settings.merge(base, {**config.student, "train": others})
    return settings.parse(StudentConfig, changed, "the adaptation's student")


def sets_of(config: AdaptConfig, domain: Domain) -> Evaluation:
    """The held-out images and the general sets, as one evaluation."""
    general = config.general.model_dump(mode="json", exclude_unset=True)
    return settings.parse(Evaluation, settings.merge(general, domain.sets(dataset_of(config))), "general")


def rule_of(config: AdaptConfig, domain: Domain, unequal: bool) -> Rule:
    """How a share of the trained weights is chosen; ``unequal``: classes have unequal numbers of images."""
    general = config.general  # one metric, or two of a retrieval set, of each set; the mean of a suite
    metrics = [f"zero_shot/{name}/top1" for name in general.zero_shot]
    metrics += [f"retrieval/{name}/{way}" for name in general.retrieval for way in _RETRIEVAL]
    if general.suite is not None:
        metrics.append(f"{general.suite}/mean")
    return Rule(domain.metrics(unequal), tuple(metrics), config.allow / 100)
