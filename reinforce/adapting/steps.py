"""The configs of the steps of an adaptation, each of which is also a command: run, select, train."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reinforce import settings
from reinforce.adapting.choosing import Rule
from reinforce.adapting.config import DOMAIN, FEWEST_IMAGES, HELD_OUT, RELEASED, TRAIN, AdaptConfig
from reinforce.config import Config, parse_config
from reinforce.engine.starter.fields import CLASS_TEXTS
from reinforce.engine.starter.starter import Look, look_at
from reinforce.errors import UserError
from reinforce.evaluation.config import Evaluation
from reinforce.selection.config import SelectConfig
from reinforce.source.formats.folder import CLASS
from reinforce.student.config import StudentConfig
from reinforce.training.config import Training

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
    return Rule(domain.metrics(unequal), tuple(general_metrics(config.general)), config.allow / 100)


def general_metrics(general: Evaluation) -> Iterator[str]:
    """One metric, or two of a retrieval set, of each general set; the mean of a suite."""
    yield from (f"zero_shot/{name}/top1" for name in general.zero_shot)
    yield from (f"retrieval/{name}/{way}" for name in general.retrieval for way in _RETRIEVAL)
    if general.suite is not None:
        yield f"{general.suite}/mean"
