"""The anchor of features: the student's vectors stay near those that the released student stored.

    L_WHAT = weight * mean over the rows of 1 - cos(feature, vector)

for each WHAT of images and kinds of text, whichever lambda is, without a projection between them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from reinforce.errors import UserError
from reinforce.student.config import Loss
from reinforce.student.teachers import TeacherInfo
from reinforce.student.terms.base import TargetModels, Tensors, Term
from reinforce.student.terms.features import cosine_distance


@dataclass(frozen=True)
class AnchorFeatures(Term):
    """``anchor_features/WHAT`` for each WHAT that the teacher has vectors of."""

    weight: float
    name: str
    teacher: TeacherInfo

    def heads(self, width: int) -> Mapping[str, torch.nn.Module]:
        """None. Raises UserError if the teacher has another width than the student."""
        if self.teacher.dim != width:
            raise UserError(
                f"loss.anchor.features: teacher {self.name} has {self.teacher.dim} dimensions and the student {width}. "
                "It must be the student before its fine-tuning; for others there is loss.features."
            )
        return {}

    def losses_of_rows(
        self, features: Tensors, targets: Mapping[str, Tensors], heads: torch.nn.ModuleDict
    ) -> dict[str, torch.Tensor]:
        return {
            f"anchor_features/{what}": self.weight * cosine_distance(rows, targets[self.name][what])
            for what, rows in features.items()
            if self.teacher.has(what)
        }


def make(loss: Loss, models: TargetModels) -> AnchorFeatures | None:
    """The term of a config. Raises UserError if the teacher has no vectors."""
    if loss.anchor is None or loss.anchor.features is None or models.anchor is None:
        return None
    [name] = loss.anchors
    if not models.anchor.sides:
        raise UserError(f"loss.anchor.features: teacher {name} has no vectors of what is read.")
    use = f"anchor of features of {' and '.join(sorted(models.anchor.sides))}"
    return AnchorFeatures(loss.anchor.features, name, models.anchor, uses={("teachers", name): use})
