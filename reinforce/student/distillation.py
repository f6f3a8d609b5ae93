"""What a training takes from which teacher, settled before anything is read or run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reinforce.dataset.manifest import select_names
from reinforce.errors import UserError
from reinforce.student.config import Data, Loss, StudentConfig
from reinforce.training.config import HIGHEST_LOGIT_SCALE

#: What a batch has of its examples; the second kind of text only where captioners are read.
IMAGE, CAPTION, SYNTHETIC = "image", "caption", "synthetic"

#: Sides of a teacher.
IMAGES, TEXTS = "images", "texts"


@dataclass(frozen=True)
class TeacherInfo:
    """A teacher as dataset.json, or the loaded model, states it: ``sides`` are IMAGES, TEXTS or both."""

    dim: int
    sides: frozenset[str]
    logit_scale: float | None
    origin: str  # where the scale stands

    def has(self, what: str) -> bool:
        """Whether it has vectors of IMAGE, CAPTION or SYNTHETIC."""
        return (IMAGES if what == IMAGE else TEXTS) in self.sides


@dataclass(frozen=True)
class DistillationPlan:
    """The teachers whose similarities are distilled, with logit scales, and those whose vectors are approached.

    ``notes`` tell in one line a teacher what it is used for.
    """

    scales: Mapping[str, float]
    features: Mapping[str, TeacherInfo]
    notes: Sequence[str]

    @property
    def teachers(self) -> list[str]:
        """All that have to be read or run."""
        return list(dict.fromkeys([*self.scales, *self.features]))


def plan_distillation(loss: Loss, known: Mapping[str, TeacherInfo]) -> DistillationPlan:
    """With lambda 0 nothing is taken from anyone.

    Raises UserError for a teacher without a logit scale, and where nothing would bring images and texts together.
    """
    if loss.lambda_ == 0:
        return DistillationPlan({}, {}, ["lambda 0: no teacher is used"])
    for name in (*loss.logit_scales, *loss.logit_biases):
        if name not in known:
            raise UserError(f"loss: there is no teacher {name!r}; there is: {', '.join(known) or 'none'}.")
    scales: dict[str, float] = {}
    features: dict[str, TeacherInfo] = {}
    notes = []
    for name, teacher in known.items():
        uses = []
        both = teacher.sides == {IMAGES, TEXTS}
        if both:
            scales[name], origin = _scale(name, teacher, loss)
            uses.append(f"similarities, logit scale {scales[name]:g} ({origin}){_learnt(name, scales[name], loss)}")
        if loss.features == "all" or (loss.features == "one-sided" and not both):
            features[name] = teacher
            uses.append(f"vectors of {' and '.join(sorted(teacher.sides))}, {teacher.dim} dimensions")
        notes.append(f"teacher {name}: {'; '.join(uses) or 'unused, since it has one side and loss.features is none'}")
    if not scales and (loss.lambda_ == 1 or not features):
        raise UserError(
            f"loss.lambda is {loss.lambda_:g} and no teacher has vectors of both images and texts, so nothing would "
            "bring them together. Name such a teacher under data.teachers, or lower loss.lambda (0: plain CLIP)."
        )
    return DistillationPlan(scales, features, notes)


def _scale(name: str, teacher: TeacherInfo, loss: Loss) -> tuple[float, str]:
    if name in loss.logit_scales:
        return loss.logit_scales[name], f"config: loss.logit_scales.{name}{_unused(name, teacher, loss)}"
    if teacher.logit_scale is None:
        raise UserError(
            f"teacher {name} has no logit scale, which distillation needs. Set loss.logit_scales.{name} "
            "(1 / temperature; 50 to 90 for CLIP models), or leave it out of data.teachers."
        )
    return teacher.logit_scale, teacher.origin


def _unused(name: str, teacher: TeacherInfo, loss: Loss) -> str:
    """The scale that the config's replaces, where it is another."""
    if teacher.logit_scale in (None, loss.logit_scales[name]):
        return ""
    return f", instead of {teacher.logit_scale:g} of the {teacher.origin}"


def _learnt(name: str, scale: float, loss: Loss) -> str:
    """What the note of a scale adds where it is learnt. Raises UserError for one that cannot be."""
    if not loss.learn_scales:
        return ""
    if not 1 <= scale <= HIGHEST_LOGIT_SCALE:
        raise UserError(
            f"teacher {name} has logit scale {scale:g}, and loss.learn_scales keeps scales within 1 and "
            f"{HIGHEST_LOGIT_SCALE:g}. Set loss.logit_scales.{name} to a start within, or learn_scales to false."
        )
    return ", learnt from there on by its own contrastive loss"


def stored_teachers(config: StudentConfig, manifests: Mapping[str, Mapping[str, Any]]) -> dict[str, TeacherInfo]:
    """The teachers of a training's datasets, by the ``dataset.json`` of each URL.

    Raises UserError for an unknown teacher, for one with vectors of some of the texts alone, and where datasets
    disagree.
    """
    known: dict[str, TeacherInfo] = {}
    for name in _names(config.data, manifests):
        of = {url: _stored(name, config.data, url, manifest) for url, manifest in manifests.items()}
        (url, first), *others = of.items()
        for other_url, other in others:
            if (other.dim, other.sides) != (first.dim, first.sides):
                raise UserError(
                    f"teacher {name} differs between the datasets: {url} has {_told(first)}, {other_url} has "
                    f"{_told(other)}. Name other data.teachers, or run the layers that are missing."
                )
            if other.logit_scale != first.logit_scale and name not in config.loss.logit_scales:
                raise UserError(
                    f"teacher {name} has logit scale {first.logit_scale} in {url} and {other.logit_scale} in "
                    f"{other_url}. Set loss.logit_scales.{name}."
                )
        known[name] = first
    return known


def _names(data: Data, manifests: Mapping[str, Mapping[str, Any]]) -> list[str]:
    (url, names), *others = (
        (url, select_names(url, "teachers", data.teachers, manifest)) for url, manifest in manifests.items()
    )
    for other_url, there in others:
        if set(there) != set(names):
            raise UserError(
                f"the datasets have different teachers: {url} has {', '.join(names) or 'none'}, {other_url} has "
                f"{', '.join(there) or 'none'}. Name those to learn from under data.teachers."
            )
    return names


def _stored(name: str, data: Data, url: str, manifest: Mapping[str, Any]) -> TeacherInfo:
    entry, layers = manifest["teachers"][name], manifest["layers"]
    captioners = select_names(url, "captioners", None if data.captioners is None else list(data.captioners), manifest)
    texts = ("caption", *captioners)
    found = [what for what in texts if f"embeddings/{name}/{what}" in layers]
    missing = [what for what in texts if what not in found]
    if found and missing:
        raise UserError(
            f"{url}: teacher {name} has vectors of {', '.join(found)}, not of {', '.join(missing)}. "
            "Run `reinforce run` for the layers that are missing, or name other data.captioners or data.teachers."
        )
    sides = {IMAGES} if f"embeddings/{name}/images" in layers else set()
    sides |= {TEXTS} if found else set()
    return TeacherInfo(entry["dim"], frozenset(sides), entry["logit_scale"], f"dataset: {entry['logit_scale_from']}")


def _told(known: TeacherInfo) -> str:
    return f"{known.dim} dimensions of {' and '.join(sorted(known.sides)) or 'nothing'}"
