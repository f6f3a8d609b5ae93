"""The interactive term: the student's images are contrasted with teachers' texts, and its texts with their images.

For each teacher and kind of text, with the student's logit scale s and linear heads h to the teacher's dimension,

    L = weight / 2 * [CE(softmax(s h(I) X_t^T), identity) + CE(softmax(s h'(X) I_t^T), identity)]

over the pairs of all ranks, as mean over the teachers (CLIP-KD, arXiv 2307.12732); weight is lambda * interactive.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from reinforce.errors import UserError
from reinforce.student.chunks import Logits, cross_entropies
from reinforce.student.loss import full_precision
from reinforce.student.loss_config import Loss
from reinforce.student.teachers import CAPTION, IMAGE, IMAGES, SYNTHETIC, TEXTS, TeacherInfo
from reinforce.student.terms.base import Models, Rows, Tensors, Term, head_name, unit
from reinforce.training.distributed import gather
from teachers.runtime.determinism import tf32


@dataclass(frozen=True)
class Interactive(Term):
    """``interactive/KIND`` for each kind of text; ``teachers`` have both sides."""

    weight: float
    teachers: Mapping[str, TeacherInfo]

    def uses(self) -> Mapping[tuple[str, str], str]:
        return {("teachers", name): "contrasted with the student's images and texts" for name in self.teachers}

    def heads(self, width: int) -> Mapping[str, torch.nn.Module]:
        return {
            head_name(name, f"interactive-{side}"): torch.nn.Linear(width, teacher.dim, bias=False)
            for name, teacher in self.teachers.items()
            for side in (IMAGES, TEXTS)
        }

    def projections(self, features: Tensors, heads: torch.nn.ModuleDict) -> dict[str, torch.Tensor]:
        return {
            f"{name}/{what}": unit(heads[head_name(name, f"interactive-{IMAGES if what == IMAGE else TEXTS}")](rows))
            for name in self.teachers
            for what, rows in features.items()
        }

    def losses(self, rows: Rows) -> dict[str, torch.Tensor]:
        losses = {}
        with tf32() if rows.reduced else contextlib.nullcontext():
            for kind in (CAPTION, SYNTHETIC):
                if kind in rows.features:
                    pairs = [(name, *sides) for name in self.teachers for sides in ((IMAGE, kind), (kind, IMAGE))]
                    losses[f"interactive/{kind}"] = (
                        self.weight * torch.stack([_contrast(rows, *pair) for pair in pairs]).mean()
                    )
        return losses


def make(loss: Loss, models: Models) -> Interactive | None:
    """The term of a config. Raises UserError if no teacher has both sides."""
    if loss.interactive is None:
        return None
    known = models.teachers.items() if loss.lambda_ > 0 else ()
    teachers = {name: teacher for name, teacher in known if teacher.sides == {IMAGES, TEXTS}}
    if not teachers:
        raise UserError(
            "loss.interactive needs a teacher with vectors of images and texts, data.captions that are read, and a "
            "loss.lambda above 0. Remove it, or name such a teacher under data.teachers."
        )
    return Interactive(loss.lambda_ * loss.interactive, teachers)


def _contrast(rows: Rows, teacher: str, own: str, other: str) -> torch.Tensor:
    """Cross-entropy of the student's ``own`` side with the teacher's ``other`` side of all ranks."""
    features = full_precision(rows.features[f"{teacher}/{own}"])
    columns = gather.gather({other: full_precision(rows.targets[teacher][other])})[other]
    logits = Logits(features, columns, rows.scalars["logit_scale"], None, gather.rank() * len(features))
    [loss] = cross_entropies("softmax", logits, [], True)
    return loss
