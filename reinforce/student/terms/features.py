"""The features term: linear heads project the student's features to the vectors of teachers.

    L_WHAT = weight * mean over teachers and rows of distance(head(feature), z)

for each WHAT of images and kinds of text; weight is lambda * features_weight, and the mean over the teachers may be
weighted. It is how one-sided teachers are used, and how a student of images alone learns.

z is the teacher's vector v [D] of unit norm, or with ``standardise`` (v - m) / s, with the mean m and the standard
deviation s of each dimension over the first vectors of the datasets. With h = head(feature), the distance is

    cosine:        1 - cos(h, z)
    l2:            |h - z|^2 / n, where n is the mean of |z|^2: 1, or D with ``standardise``
    similarities:  cross-entropy of softmax(cos(h, Q) / t) with softmax(cos(z, Q) / t)

Q are the z of the batch, of all ranks, and of the last ``queue`` rows before it; t is ``temperature``. With ``head:
none``, h is the feature itself, which puts the student into the space of the teacher.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from reinforce.errors import UserError
from reinforce.student.chunks import Logits, cross_entropies
from reinforce.student.loss import full_precision
from reinforce.student.loss_config import FeatureLoss, Loss
from reinforce.student.teachers import IMAGE, IMAGES, TEXTS, TeacherInfo
from reinforce.student.terms.base import Models, ReadVectors, Rows, Tensors, Term, head_name, unit
from reinforce.training.distributed import gather
from teachers.runtime.determinism import tf32


class Moments(NamedTuple):
    """Mean and standard deviation [D] of each dimension of a teacher's vectors."""

    mean: torch.Tensor
    deviation: torch.Tensor


@dataclass(frozen=True)
class Features(Term):
    """``features/WHAT`` for each WHAT of ``image`` and the kinds of text that some teacher has.

    ``moments`` are by teacher and side, with ``standardise``.
    """

    weight: float
    teachers: Mapping[str, TeacherInfo]
    loss: FeatureLoss = field(default_factory=FeatureLoss)
    moments: Mapping[tuple[str, str], Moments] = field(default_factory=dict, compare=False)

    def uses(self) -> Mapping[tuple[str, str], str]:
        how = "" if self.loss.distance == "cosine" else f" by {self.loss.distance}"
        how += ", standardised" * self.loss.standardise + ", without a head" * (self.loss.head == "none")
        return {
            ("teachers", name): f"vectors of {' and '.join(sorted(teacher.sides))}, {teacher.dim} dimensions{how}"
            f"{f', weight {self.loss.weights[name]:g}' if name in self.loss.weights else ''}"
            for name, teacher in self.teachers.items()
        }

    def heads(self, width: int) -> Mapping[str, torch.nn.Module]:
        """Those that project, standardise and keep vectors. Raises UserError if one is needed and ``head`` is none."""
        made: dict[str, torch.nn.Module] = {}
        for name, teacher in self.teachers.items():
            if self.loss.head == "none":
                if teacher.dim != width:
                    raise UserError(
                        f"loss.features.head: none: teacher {name} has {teacher.dim} dimensions and the student "
                        f"{width}. Set student.dim to {teacher.dim}, which is exported with the student, name another "
                        "teacher under data.teachers, or remove `head`."
                    )
                continue
            for side in sorted(teacher.sides):
                made[head_name(name, side)] = torch.nn.Linear(width, teacher.dim, bias=False)
        for (name, side), moments in self.moments.items():
            made[head_name(name, f"standardise-{side}")] = _Standardise(moments)
        if self.loss.queue:
            for name, teacher in self.teachers.items():
                for side in sorted(teacher.sides):
                    made[head_name(name, f"queue-{side}")] = _Queue(self.loss.queue, teacher.dim)
        return made

    def losses_of_rows(
        self, features: Tensors, targets: Mapping[str, Tensors], heads: torch.nn.ModuleDict
    ) -> dict[str, torch.Tensor]:
        if self.loss.distance == "similarities":
            return {}
        losses: dict[str, torch.Tensor] = {}
        for what, rows in features.items():
            distances = {
                name: self._distance(
                    self._project(name, what, rows, heads), self._target(name, what, targets[name][what], heads)
                )
                for name, teacher in self.teachers.items()
                if teacher.has(what)
            }
            if distances:
                losses[f"features/{what}"] = self.weight * self._mean(distances)
        return losses

    def projections(self, features: Tensors, heads: torch.nn.ModuleDict) -> dict[str, torch.Tensor]:
        if self.loss.distance != "similarities":
            return {}
        return {
            f"{name}/features/{what}": unit(self._project(name, what, rows, heads))
            for name, teacher in self.teachers.items()
            for what, rows in features.items()
            if teacher.has(what)
        }

    def losses(self, rows: Rows) -> dict[str, torch.Tensor]:
        if self.loss.distance != "similarities":
            return {}
        losses: dict[str, torch.Tensor] = {}
        with tf32() if rows.reduced else contextlib.nullcontext():
            for what in [name for name in rows.features if "/" not in name]:
                distances = {
                    name: self._similarities(name, what, rows)
                    for name, teacher in self.teachers.items()
                    if teacher.has(what)
                }
                if distances:
                    losses[f"features/{what}"] = self.weight * self._mean(distances)
        return losses

    def _project(self, name: str, what: str, rows: torch.Tensor, heads: torch.nn.ModuleDict) -> torch.Tensor:
        found: torch.Tensor = rows if self.loss.head == "none" else heads[head_name(name, _side(what))](rows)
        return found

    def _target(self, name: str, what: str, vectors: torch.Tensor, heads: torch.nn.ModuleDict) -> torch.Tensor:
        key = head_name(name, f"standardise-{_side(what)}")
        found: torch.Tensor = heads[key](vectors) if self.loss.standardise else vectors
        return found

    def _distance(self, projected: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if self.loss.distance == "l2":
            squares = (projected.float() - target).square().sum(dim=-1)
            return squares.mean() / (target.shape[-1] if self.loss.standardise else 1)
        target = unit(target) if self.loss.standardise else target
        return 1 - (unit(projected) * target).sum(dim=-1).mean()

    def _similarities(self, name: str, what: str, rows: Rows) -> torch.Tensor:
        own = full_precision(rows.features[f"{name}/features/{what}"])
        target = full_precision(unit(self._target(name, what, rows.targets[name][what], rows.heads)))
        known = gather.gather({what: target})[what].detach()
        queue: Any = rows.heads[head_name(name, f"queue-{_side(what)}")] if self.loss.queue else None
        references = known if queue is None else torch.cat([known, queue.filled()])
        scale, first = 1 / self.loss.temperature, gather.rank() * len(own)
        student, teacher = (Logits(vectors, references, scale, None, first) for vectors in (own, target))
        [loss] = cross_entropies("softmax", student, [teacher], False)
        if queue is not None:
            queue.push(known)
        return loss

    def _mean(self, distances: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The mean over the teachers, by their weights."""
        if not self.loss.weights:
            return torch.stack([*distances.values()]).mean()
        weights = {name: self.loss.weights.get(name, 1.0) for name in distances}
        total = sum(weights.values())
        return torch.stack([weights[name] / total * distance for name, distance in distances.items()]).sum()


class _Standardise(torch.nn.Module):
    """Subtracts a mean and divides by a standard deviation, which checkpoints store."""

    mean: torch.Tensor
    deviation: torch.Tensor

    def __init__(self, moments: Moments) -> None:
        super().__init__()
        self.register_buffer("mean", moments.mean)
        self.register_buffer("deviation", moments.deviation)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        return (vectors - self.mean) / self.deviation


class _Queue(torch.nn.Module):
    """The last vectors of earlier batches, the newest first. Checkpoints store them."""

    vectors: torch.Tensor
    count: torch.Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("vectors", torch.zeros(size, dim))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def filled(self) -> torch.Tensor:
        """The vectors so far [n, D]."""
        return self.vectors[: int(self.count)]

    @torch.no_grad()
    def push(self, vectors: torch.Tensor) -> None:
        """Put vectors [B, D] before the others, the oldest of which are dropped."""
        self.vectors.copy_(torch.cat([vectors, self.vectors])[: len(self.vectors)])
        self.count.add_(len(vectors)).clamp_(max=len(self.vectors))


def make(loss: Loss, models: Models) -> Features | None:
    """The term of a config; None if lambda is 0 or no teacher is for it.

    Raises UserError for the weight of a teacher that is not used, and where vectors cannot be standardised.
    """
    which = loss.features.teachers
    teachers = {
        name: teacher
        for name, teacher in models.teachers.items()
        if teacher.sides and (which == "all" or (which == "one-sided" and teacher.sides != {IMAGES, TEXTS}))
    }
    if not teachers or loss.lambda_ == 0:
        return None
    if unknown := [name for name in loss.features.weights if name not in teachers]:
        raise UserError(
            f"loss.features.weights: the term uses no teacher {unknown[0]!r}; it uses: {', '.join(teachers)}."
        )
    standardise = loss.features.standardise
    if standardise and models.vectors is None:
        raise UserError("loss.features.standardise needs stored vectors. Remove it, or set loss.targets to stored.")
    moments = {}
    if models.vectors is not None and (standardise or not models.texts):
        moments = {
            (name, side): _fit(name, side, models.vectors)
            for name, teacher in teachers.items()
            for side in sorted(teacher.sides)
        }
    return Features(loss.lambda_ * loss.features_weight, teachers, loss.features, moments if standardise else {})


def _fit(name: str, side: str, read: ReadVectors) -> Moments:
    """The moments of the first vectors of a side of a teacher. Raises UserError if all are equal."""
    vectors = torch.from_numpy(read(name, side)).double()
    deviation, mean = torch.std_mean(vectors, dim=0, correction=0)
    if not bool((deviation > 0).any()):
        raise UserError(
            f"teacher {name}: its first {len(vectors):,} vectors of {side} are all equal, so nothing can be learnt "
            f"from them. Look at the {side} of the datasets, and at the teacher."
        )
    least = 1e-3 * deviation.square().mean().sqrt()  # of dimensions that hardly vary
    return Moments(mean.float(), deviation.clamp_min(least).float())


def _side(what: str) -> str:
    return IMAGES if what == IMAGE else TEXTS
