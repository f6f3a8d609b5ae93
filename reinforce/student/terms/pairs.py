"""The contrastive loss and the distillation of similarities: both compare all images of a batch with all its texts.

They are one term, since they share the student's matrix of similarities; see ``reinforce.student.loss``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from reinforce.errors import UserError
from reinforce.student.config import Loss
from reinforce.student.loss import Objective, contrastive_losses
from reinforce.student.teachers import CAPTION, IMAGE, IMAGES, SYNTHETIC, TEXTS, TeacherInfo
from reinforce.student.terms.base import Models, Rows, Term, scale_name
from reinforce.training.config import HIGHEST_LOGIT_SCALE


@dataclass(frozen=True)
class Pairs(Term):
    """``clip/KIND`` and ``distill/KIND``; ``notes`` describe the logit scale of each teacher."""

    objective: Objective
    notes: Mapping[str, str]
    learnt: bool = False
    aligns = True

    def uses(self) -> Mapping[tuple[str, str], str]:
        return {("teachers", name): f"similarities, {note}" for name, note in self.notes.items()}

    def recorded(self) -> Mapping[str, Any]:
        if self.learnt:  # they are among the weights
            return {}
        return {f"loss.logit_scales.{name}": scale for name, scale in self.objective.scales.items()}

    def losses(self, rows: Rows) -> dict[str, torch.Tensor]:
        objective, scalars = self.objective, rows.scalars
        if self.learnt:
            learnt = {name: scalars[scale_name(name)].detach() for name in objective.scales}
            objective = replace(objective, scales=learnt)
        scale, bias = scalars["logit_scale"], scalars.get("logit_bias")
        features = {name: rows.features[name] for name in (IMAGE, CAPTION, SYNTHETIC) if name in rows.features}
        return contrastive_losses(objective, features, scale, bias, rows.targets, rows.reduced)


def make(loss: Loss, models: Models) -> Pairs | None:
    """The term of a config, None if it would have no loss. Raises UserError if a teacher has no logit scale."""
    if not (models.texts and models.images):
        return None
    found = find_scales(loss, models.teachers) if loss.lambda_ > 0 else {}
    if loss.lambda_ == 1 and not found:
        return None
    scales = {name: scale for name, (scale, _) in found.items()}
    objective = Objective(loss.lambda_, loss.form, scales, loss.logit_biases)
    return Pairs(objective, {name: note for name, (_, note) in found.items()}, loss.learn_scales)


def find_scales(loss: Loss, teachers: Mapping[str, TeacherInfo]) -> dict[str, tuple[float, str]]:
    """The logit scale of each teacher with images and texts, and its source. Raises UserError if it has none."""
    for name in (*loss.logit_scales, *loss.logit_biases):
        if name not in (*teachers, *loss.anchors):
            raise UserError(f"loss: there is no teacher {name!r}; there are: {', '.join(teachers) or 'none'}.")
    found = {}
    for name, teacher in teachers.items():
        if teacher.sides == {IMAGES, TEXTS}:
            scale, source = logit_scale(name, teacher, loss)
            found[name] = scale, f"logit scale {scale:g} ({source}){_learnt_note(name, scale, loss)}"
    return found


def logit_scale(name: str, teacher: TeacherInfo, loss: Loss) -> tuple[float, str]:
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
