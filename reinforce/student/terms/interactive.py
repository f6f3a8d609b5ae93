"""The interactive term: the student's images are contrasted with teachers' texts, and its texts with their images.

For each teacher and kind of text, with the student's logit scale s and linear heads h to the teacher's dimension,

    L = weight / 2 * [CE(softmax(s h(I) X_t^T), identity) + CE(softmax(s h'(X) I_t^T), identity)]

over the pairs of all ranks, as mean over the teachers, by their ``weights`` (CLIP-KD, arXiv 2307.12732); weight is
lambda * interactive.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch

from reinforce.errors import UserError
from reinforce.student.config import Loss
from reinforce.student.teachers import CAPTION, IMAGE, IMAGES, SYNTHETIC, TEXTS, TeacherInfo
from reinforce.student.terms.base import (
    Rows,
    TargetModels,
    Tensors,
    Term,
    as_scalar,
    check_rows,
    head_name,
    mean_of_teachers,
    parts_of_teachers,
    unit,
)
from reinforce.student.terms.pairs import Logits, cross_entropies, full_precision
from reinforce.training import gather
from teachers.runtime.determinism import tf32


@dataclass(frozen=True)
class Interactive(Term):
    """``interactive/KIND`` for each kind of text; ``teachers`` have both sides."""

    weight: float
    teachers: Mapping[str, TeacherInfo]
    weights: Mapping[str, float] = field(default_factory=dict)

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
        return {
            f"interactive/{kind}": self.weight * mean_of_teachers(found, self.weights)
            for kind, found in self._of_teachers(rows)
        }

    def parts(self, rows: Rows) -> Iterator[tuple[str, str, torch.Tensor]]:
        projected = self.projections(rows.features, rows.heads)
        for _, found in self._of_teachers(replace(rows, features=projected)):
            yield from parts_of_teachers(self.weight, found, self.weights)

    def _of_teachers(self, rows: Rows) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """The losses by teacher of each kind of text; features are ``projections``."""
        for kind in (CAPTION, SYNTHETIC):
            found = {}
            for name in self.teachers if f"{next(iter(self.teachers))}/{kind}" in rows.features else ():
                image, text = (rows.features[f"{name}/{what}"] for what in (IMAGE, kind))
                of_images, of_texts = (rows.targets[name][what] for what in (IMAGE, kind))
                with tf32() if rows.reduced else contextlib.nullcontext():
                    found[name] = interactive_loss(image, text, of_images, of_texts, rows.scalars["logit_scale"])
            if found:
                yield kind, found


def make(loss: Loss, models: TargetModels) -> Interactive | None:
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
    uses = {("teachers", name): "contrasted with the student's images and texts" for name in teachers}
    return Interactive(loss.lambda_ * loss.interactive, teachers, loss.named_weights, uses=uses)


def interactive(
    image: torch.Tensor,
    text: torch.Tensor,
    teacher_image: torch.Tensor,
    teacher_text: torch.Tensor,
    logit_scale: torch.Tensor | float,
) -> torch.Tensor:
    """The student's images contrasted with a teacher's texts, and its texts with the teacher's images (CLIP-KD).

    All are [B, D]; ``image`` and ``text`` are projected to the teacher's dimension.
    """
    teacher = {"teacher_image": teacher_image, "teacher_text": teacher_text}
    check_rows("interactive", {"image": image, "text": text, **teacher})
    scale = as_scalar("logit_scale", logit_scale, image.device)
    return interactive_loss(unit(image), unit(text), unit(teacher_image), unit(teacher_text), scale)


def interactive_loss(
    image: torch.Tensor,
    text: torch.Tensor,
    teacher_image: torch.Tensor,
    teacher_text: torch.Tensor,
    logit_scale: torch.Tensor | float,
) -> torch.Tensor:
    """The mean of the cross-entropies of both sides of the student, [b, D] of unit norm, with the other side of the
    teacher of all ranks: one direction of each."""
    sides: list[torch.Tensor] = []
    for own, other in ((image, teacher_text), (text, teacher_image)):
        features = full_precision(own)
        columns = gather.gather({"": full_precision(other)})[""]
        logits = Logits(features, columns, logit_scale, None, gather.rank() * len(features))
        sides += cross_entropies("softmax", logits, [], True)
    return torch.stack(sides).mean()
