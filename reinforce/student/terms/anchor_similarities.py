"""The anchor of similarities: the student's agree with those that the released student stored.

    L = weight * L_distill of the anchor's teacher alone, as in ``reinforce.student.terms.pairs``

whichever lambda is, for each kind of text. The teacher is not one of the ensemble.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from reinforce.errors import UserError
from reinforce.student.config import Loss
from reinforce.student.teachers import CAPTION, IMAGE, IMAGES, SYNTHETIC, TEXTS
from reinforce.student.terms.base import Rows, TargetModels, Term
from reinforce.student.terms.pairs import Objective, contrastive_losses, logit_scale


@dataclass(frozen=True)
class AnchorSimilarities(Term):
    """``anchor_similarities/KIND``."""

    weight: float
    objective: Objective
    aligns = True

    def losses(self, rows: Rows) -> dict[str, torch.Tensor]:
        features = {name: rows.features[name] for name in (IMAGE, CAPTION, SYNTHETIC) if name in rows.features}
        scale, bias = rows.scalars["logit_scale"], rows.scalars.get("logit_bias")
        found = contrastive_losses(self.objective, features, scale, bias, rows.targets, rows.reduced)
        return {name.replace("distill", "anchor_similarities"): self.weight * value for name, value in found.items()}


def make(loss: Loss, models: TargetModels) -> AnchorSimilarities | None:
    """The term of a config. Raises UserError if the teacher has not both sides, or no logit scale."""
    if loss.anchor is None or loss.anchor.similarities is None or models.anchor is None:
        return None
    [name] = loss.anchors
    if not models.texts or models.anchor.sides != {IMAGES, TEXTS}:
        raise UserError(
            f"loss.anchor.similarities needs vectors of images and texts of teacher {name}, and data.captions that are "
            "read. Remove it, or run the missing layers."
        )
    scale, source = logit_scale(name, models.anchor, loss)
    objective = Objective(1.0, loss.form, {name: scale}, loss.logit_biases)
    return AnchorSimilarities(
        loss.anchor.similarities,
        objective,
        uses={("teachers", name): f"anchor of similarities, logit scale {scale:g} ({source})"},
        recorded={f"loss.logit_scales.{name}": scale},
    )
