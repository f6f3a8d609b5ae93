"""Which teachers a training distils, and how; decided before any data is read or any model runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reinforce.dataset.layers import embeddings_layer
from reinforce.dataset.manifest.manifest import select_names
from reinforce.errors import UserError
from reinforce.student.config import Data, Loss, StudentConfig
from reinforce.training.config import HIGHEST_LOGIT_SCALE

#: Keys of a batch; SYNTHETIC exists only if captioners are read.
IMAGE, CAPTION, SYNTHETIC = "image", "caption", "synthetic"

#: Sides of a teacher.
IMAGES, TEXTS = "images", "texts"


@dataclass(frozen=True)
class TeacherInfo:
    """A teacher as dataset.json or the loaded model describes it.

    ``sides`` are IMAGES, TEXTS or both. ``scale_source`` describes where the logit scale comes from.
    """

    dim: int
    sides: frozenset[str]
    logit_scale: float | None
    scale_source: str

    def has(self, what: str) -> bool:
        """Whether it has vectors of IMAGE, CAPTION or SYNTHETIC."""
        return (IMAGES if what == IMAGE else TEXTS) in self.sides


@dataclass(frozen=True)
class DistillationPlan:
    """What is distilled from which teacher.

    ``scales`` are the logit scales of the teachers whose similarities are distilled; ``features`` are the teachers
    whose vectors the student's projections approach; ``notes`` describe the use of each teacher in one line.
    """

    scales: Mapping[str, float]
    features: Mapping[str, TeacherInfo]
    notes: Sequence[str]

    @property
    def teachers(self) -> list[str]:
        """All teachers that have to be read or run."""
        return list(dict.fromkeys([*self.scales, *self.features]))


def plan_distillation(loss: Loss, teachers: Mapping[str, TeacherInfo]) -> DistillationPlan:
    """Decide the use of each teacher; lambda 0 uses none.

    Raises UserError for a teacher without a logit scale, and if no loss would align images and texts.
    """
    if loss.lambda_ == 0:
        return DistillationPlan({}, {}, ["lambda 0: no teacher is used"])
    for name in (*loss.logit_scales, *loss.logit_biases):
        if name not in teachers:
            raise UserError(f"loss: there is no teacher {name!r}; there are: {', '.join(teachers) or 'none'}.")
    scales: dict[str, float] = {}
    features: dict[str, TeacherInfo] = {}
    notes = []
    for name, teacher in teachers.items():
        uses = []
        both = teacher.sides == {IMAGES, TEXTS}
        if both:
            scales[name], source = _logit_scale(name, teacher, loss)
            learnt = _learnt_note(name, scales[name], loss)
            uses.append(f"similarities, logit scale {scales[name]:g} ({source}){learnt}")
        if loss.features == "all" or (loss.features == "one-sided" and not both):
            features[name] = teacher
            uses.append(f"vectors of {' and '.join(sorted(teacher.sides))}, {teacher.dim} dimensions")
        unused = "unused, because it has only one side and loss.features is none"
        notes.append(f"teacher {name}: {'; '.join(uses) or unused}")
    if not scales and (loss.lambda_ == 1 or not features):
        raise UserError(
            f"loss.lambda is {loss.lambda_:g} and no teacher has vectors of both images and texts, so no loss would "
            "align them. Name such a teacher under data.teachers, or lower loss.lambda (0: plain CLIP)."
        )
    return DistillationPlan(scales, features, notes)


def stored_teachers(config: StudentConfig, manifests: Mapping[str, Mapping[str, Any]]) -> dict[str, TeacherInfo]:
    """The teachers of a training's datasets; ``manifests`` are the contents of ``dataset.json`` by URL.

    Raises UserError for an unknown teacher, for one that lacks vectors of some of the texts, and if datasets disagree.
    """
    known: dict[str, TeacherInfo] = {}
    for name in _teacher_names(config.data, manifests):
        infos = {url: _stored_teacher(name, config.data, url, manifest) for url, manifest in manifests.items()}
        (url, first), *others = infos.items()
        for other_url, other in others:
            if (other.dim, other.sides) != (first.dim, first.sides):
                raise UserError(
                    f"teacher {name} differs between the datasets: {url} has {_describe(first)}, {other_url} has "
                    f"{_describe(other)}. Name other data.teachers, or run the missing layers."
                )
            if other.logit_scale != first.logit_scale and name not in config.loss.logit_scales:
                raise UserError(
                    f"teacher {name} has logit scale {first.logit_scale} in {url} and {other.logit_scale} in "
                    f"{other_url}. Set loss.logit_scales.{name}."
                )
        known[name] = first
    return known


def _logit_scale(name: str, teacher: TeacherInfo, loss: Loss) -> tuple[float, str]:
    """The scale to use and a description of its source. Raises UserError if there is none."""
    if name in loss.logit_scales:
        return loss.logit_scales[name], f"config: loss.logit_scales.{name}{_replaced_note(name, teacher, loss)}"
    if teacher.logit_scale is None:
        raise UserError(
            f"teacher {name} has no logit scale, which distillation needs. Set loss.logit_scales.{name} "
            "(1 / temperature; 50 to 90 for CLIP models), or leave it out of data.teachers."
        )
    return teacher.logit_scale, teacher.scale_source


def _replaced_note(name: str, teacher: TeacherInfo, loss: Loss) -> str:
    """The scale that the config's replaces, if it is a different one."""
    if teacher.logit_scale in (None, loss.logit_scales[name]):
        return ""
    return f", instead of {teacher.logit_scale:g} of the {teacher.scale_source}"


def _learnt_note(name: str, scale: float, loss: Loss) -> str:
    """The end of a scale's note if scales are learnt. Raises UserError if the start is outside the allowed range."""
    if not loss.learn_scales:
        return ""
    if not 1 <= scale <= HIGHEST_LOGIT_SCALE:
        raise UserError(
            f"teacher {name} has logit scale {scale:g}, and loss.learn_scales keeps scales within 1 and "
            f"{HIGHEST_LOGIT_SCALE:g}. Set loss.logit_scales.{name} to a start in that range, or learn_scales to false."
        )
    return ", then learnt by its own contrastive loss"


def _teacher_names(data: Data, manifests: Mapping[str, Mapping[str, Any]]) -> list[str]:
    (url, names), *others = (
        (url, select_names(url, "teachers", data.teachers, manifest)) for url, manifest in manifests.items()
    )
    for other_url, other_names in others:
        if set(other_names) != set(names):
            raise UserError(
                f"the datasets have different teachers: {url} has {', '.join(names) or 'none'}, {other_url} has "
                f"{', '.join(other_names) or 'none'}. Name the teachers to use under data.teachers."
            )
    return names


def _stored_teacher(name: str, data: Data, url: str, manifest: Mapping[str, Any]) -> TeacherInfo:
    entry, layers = manifest["teachers"][name], manifest["layers"]
    captioners = select_names(url, "captioners", None if data.captioners is None else list(data.captioners), manifest)
    texts = ("caption", *captioners)
    found = [what for what in texts if embeddings_layer(name, what) in layers]
    missing = [what for what in texts if what not in found]
    if found and missing:
        raise UserError(
            f"{url}: teacher {name} has vectors of {', '.join(found)}, not of {', '.join(missing)}. "
            "Run `reinforce run` for the missing layers, or name other data.captioners or data.teachers."
        )
    sides = {IMAGES} if embeddings_layer(name, IMAGES) in layers else set()
    sides |= {TEXTS} if found else set()
    return TeacherInfo(entry["dim"], frozenset(sides), entry["logit_scale"], f"dataset: {entry['logit_scale_from']}")


def _describe(teacher: TeacherInfo) -> str:
    return f"{teacher.dim} dimensions of {' and '.join(sorted(teacher.sides)) or 'nothing'}"
