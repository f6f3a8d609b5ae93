"""The features term: linear heads project the student's features to the vectors of teachers.

    L_WHAT = weight * mean over teachers and rows of 1 - cos(head(feature), vector)

for each WHAT of images and kinds of text; weight is lambda * features_weight. It is how one-sided teachers are used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from reinforce.student.config import Loss
from reinforce.student.teachers import IMAGE, IMAGES, TEXTS, TeacherInfo
from reinforce.student.terms.base import Models, Tensors, Term, head_name, unit


@dataclass(frozen=True)
class Features(Term):
    """``features/WHAT`` for each WHAT of ``image`` and the kinds of text that some teacher has."""

    weight: float
    teachers: Mapping[str, TeacherInfo]

    def uses(self) -> Mapping[tuple[str, str], str]:
        return {
            ("teachers", name): f"vectors of {' and '.join(sorted(teacher.sides))}, {teacher.dim} dimensions"
            for name, teacher in self.teachers.items()
        }

    def heads(self, width: int) -> Mapping[str, torch.nn.Module]:
        return {
            head_name(name, side): torch.nn.Linear(width, teacher.dim, bias=False)
            for name, teacher in self.teachers.items()
            for side in sorted(teacher.sides)
        }

    def losses_of_rows(
        self, features: Tensors, targets: Mapping[str, Tensors], heads: torch.nn.ModuleDict
    ) -> dict[str, torch.Tensor]:
        losses: dict[str, torch.Tensor] = {}
        for what, rows in features.items():
            distances = []
            for name, teacher in self.teachers.items():
                if teacher.has(what):
                    projected = unit(heads[head_name(name, IMAGES if what == IMAGE else TEXTS)](rows))
                    distances.append(1 - (projected * targets[name][what]).sum(dim=-1).mean())
            if distances:
                losses[f"features/{what}"] = self.weight * torch.stack(distances).mean()
        return losses


def make(loss: Loss, models: Models) -> Features | None:
    """The term of a config; None if lambda is 0 or no teacher is for it."""
    every = loss.features == "all"
    teachers = {
        name: teacher
        for name, teacher in models.teachers.items()
        if teacher.sides and (every or (loss.features == "one-sided" and teacher.sides != {IMAGES, TEXTS}))
    }
    return Features(loss.lambda_ * loss.features_weight, teachers) if teachers and loss.lambda_ > 0 else None
