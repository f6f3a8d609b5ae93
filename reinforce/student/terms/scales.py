"""The loss from which teachers' logit scales are learnt; see ``reinforce.student.terms.pairs``."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from reinforce.student.config import Loss
from reinforce.student.teachers import CAPTION, IMAGE, SYNTHETIC
from reinforce.student.terms.base import Rows, TargetModels, Term, scale_name
from reinforce.student.terms.pairs import find_scales, scale_losses


@dataclass(frozen=True)
class Scales(Term):
    """``scale/TEACHER``, whose gradient reaches only the scale of the teacher."""

    def losses(self, rows: Rows) -> dict[str, torch.Tensor]:
        learnt = {name: rows.scalars[scale_name(name)] for name in self.scales}
        vectors = {
            name: {what: rows.targets[name][what] for what in (IMAGE, CAPTION, SYNTHETIC) if what in rows.targets[name]}
            for name in self.scales  # a classifier of the same name has targets beside them
        }
        return scale_losses(learnt, vectors, rows.reduced)


def make(loss: Loss, models: TargetModels) -> Scales | None:
    """The term of a config that learns scales."""
    if not (loss.learn_scales and models.texts and models.images):
        return None
    return Scales(scales={name: scale for name, (scale, _) in find_scales(loss, models.teachers).items()})
