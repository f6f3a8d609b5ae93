"""The features term: linear heads project the student's features to the vectors of teachers.

    L_WHAT = weight * mean over teachers and rows of distance(head(feature), z)

for each WHAT of images and kinds of text; weight is lambda * features_weight, and the mean over the teachers is by
their ``weights``. With ``confidence``, each row has its own, see ``pairs.shares_of_rows``, so that a row follows the
teachers that know its pair; teachers of one side, and all with the distance ``similarities``, count the same. It is how
one-sided teachers are used, and how a student of images alone learns.

z is the teacher's vector v [D] of unit norm, or v balanced by ``standardise`` or ``phi-s``, whose statistics are those
of the first vectors of the same WHAT; see ``balance`` and ``reinforce.student.online``. With h = head(feature), the
distance is

    cosine:        1 - cos(h, z)
    l2:            |h - z|^2 / n, where n is the mean of |z|^2: 1, or D if it is balanced
    similarities:  cross-entropy of softmax(cos(h, Q) / t) with softmax(cos(z, Q) / t)

Q are the z of the batch, of all ranks, and of the last ``queue`` rows before it; t is ``temperature``. With ``head:
none``, h is the feature itself, which puts the student into the space of the teacher.

With ``balance: dispersion``, the weight of a teacher is divided by the distance of the constant vector that is best for
it, 1 - |m| (cosine) or 1 - |m|^2 (l2) for vectors of mean m: a teacher whose vectors lie close together counts as much
as others (C-RADIOv4, arXiv 2601.17237, which divides squared angles by theirs).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from reinforce.errors import UserError
from reinforce.student.config import FeatureLoss, Loss
from reinforce.student.teachers import IMAGE, IMAGES, TEXTS, TeacherInfo
from reinforce.student.terms.balance import Moments, balances
from reinforce.student.terms.base import (
    Rows,
    TargetModels,
    Tensors,
    Term,
    check_rows,
    head_name,
    mean_of_teachers,
    parts_of_teachers,
    scale_name,
    unit,
)
from reinforce.student.terms.pairs import Logits, cross_entropies, find_scales, full_precision, shares_of_rows
from reinforce.training import gather
from teachers.runtime.determinism import tf32


@dataclass(frozen=True)
class Features(Term):
    """``features/WHAT`` for each WHAT of ``image`` and the kinds of text that some teacher has.

    ``kinds`` are the kinds of text. ``moments`` are by teacher and WHAT, if vectors are balanced. ``confidence`` are
    the logit scales of those teachers whose weights follow it.
    """

    weight: float
    teachers: Mapping[str, TeacherInfo]
    loss: FeatureLoss = field(default_factory=FeatureLoss)
    kinds: tuple[str, ...] = ()
    moments: Mapping[tuple[str, str], Moments] = field(default_factory=dict, compare=False)
    weights: Mapping[str, float] = field(default_factory=dict)
    confidence: Mapping[str, float] = field(default_factory=dict)

    def heads(self, width: int) -> Mapping[str, torch.nn.Module]:
        """Those that project, balance and keep vectors. Raises UserError if one is needed and ``head`` is none."""
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
        for name in self.teachers if self.loss.moves else ():
            for kinds in ((IMAGE,), self.kinds):  # each has a head
                moments = {what: self.moments[name, what] for what in kinds if (name, what) in self.moments}
                for what, balance in balances(self.loss.balance, moments).items():
                    made[head_name(name, f"balance-{what}")] = balance
        if self.loss.queue:
            for name, teacher in self.teachers.items():
                for what in filter(teacher.has, (IMAGE, *self.kinds)):
                    made[head_name(name, f"queue-{what}")] = _Queue(self.loss.queue, teacher.dim)
        return made

    @property
    def _of_batches(self) -> bool:
        """Whether the loss of a row depends on other rows of the batch."""
        return self.loss.distance == "similarities" or bool(self.confidence)

    def losses_of_rows(
        self, features: Tensors, targets: Mapping[str, Tensors], heads: torch.nn.ModuleDict
    ) -> dict[str, torch.Tensor]:
        return {} if self._of_batches else self._means(Rows(features, {}, targets, heads=heads))

    def projections(self, features: Tensors, heads: torch.nn.ModuleDict) -> dict[str, torch.Tensor]:
        if not self._of_batches:
            return {}
        return {
            f"{name}/features/{what}": self._project(name, what, rows, heads)
            for name, teacher in self.teachers.items()
            for what, rows in features.items()
            if teacher.has(what)
        }

    def losses(self, rows: Rows) -> dict[str, torch.Tensor]:
        if not self._of_batches:
            return {}
        with tf32() if rows.reduced else contextlib.nullcontext():
            return self._means(rows)

    def _means(self, rows: Rows) -> dict[str, torch.Tensor]:
        return {
            f"features/{what}": self.weight * mean_of_teachers(distances, self._weights(what))
            for what, distances in self._distances(rows, queued=self.loss.queue > 0).items()
        }

    def parts(self, rows: Rows) -> Iterator[tuple[str, str, torch.Tensor]]:
        for what, distances in self._distances(rows, queued=False).items():
            yield from parts_of_teachers(self.weight, distances, self._weights(what))

    def _distances(self, rows: Rows, queued: bool) -> dict[str, dict[str, torch.Tensor]]:
        """Distances by WHAT and teacher; those of similarities also from the vectors of ``queued`` batches."""
        scales = {name: rows.scalars.get(scale_name(name), scale) for name, scale in self.confidence.items()}
        shares = shares_of_rows(scales, self.kinds, rows.targets) if scales else {}
        found: dict[str, dict[str, torch.Tensor]] = {}
        for what in [name for name in rows.features if "/" not in name]:
            for name in [name for name, teacher in self.teachers.items() if teacher.has(what)]:
                projected = rows.features.get(f"{name}/features/{what}")
                if projected is None:
                    projected = self._project(name, what, rows.features[what], rows.heads)
                target = self._target(name, what, rows.targets[name][what], rows.heads)
                own = shares.get(what, {}).get(name)
                if self.loss.distance == "l2":
                    distance = squared_distance(projected, target, self.loss.moves, own)
                elif self.loss.distance == "cosine":
                    distance = cosine_distance(projected, unit(target) if self.loss.moves else target, own)
                else:
                    queue: Any = rows.heads[head_name(name, f"queue-{what}")] if queued else None
                    earlier = None if queue is None else queue.filled()
                    distance, new = similarity_distance(projected, unit(target), self.loss.temperature, earlier)
                    if queue is not None:
                        queue.push(new)
                found.setdefault(what, {})[name] = distance
        return found

    def _project(self, name: str, what: str, rows: torch.Tensor, heads: torch.nn.ModuleDict) -> torch.Tensor:
        """What is compared with the teacher's vectors: of unit norm but for l2."""
        side = IMAGES if what == IMAGE else TEXTS
        found: torch.Tensor = rows if self.loss.head == "none" else heads[head_name(name, side)](rows)
        return found if self.loss.distance == "l2" else unit(found)

    def _target(self, name: str, what: str, vectors: torch.Tensor, heads: torch.nn.ModuleDict) -> torch.Tensor:
        found: torch.Tensor = heads[head_name(name, f"balance-{what}")](vectors) if self.loss.moves else vectors
        return found

    def _weights(self, what: str) -> Mapping[str, float]:
        """The weights of the teachers of WHAT; those that are not in it count 1."""
        if self.loss.balance != "dispersion":
            return self.weights
        found = dict(self.weights)
        for name, moments in ((name, of) for (name, kind), of in self.moments.items() if kind == what):
            constant = float(moments.deviation.square().sum())  # 1 - |m|^2
            if self.loss.distance == "cosine":
                constant /= 1 + float(moments.mean.norm())
            found[name] = found.get(name, 1.0) / constant
        return found


def features(
    projected: torch.Tensor,
    vectors: torch.Tensor,
    distance: Literal["cosine", "l2", "similarities"] = "cosine",
    *,
    balanced: bool = False,
    temperature: float = 0.07,
    earlier: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean distance of the student's features, ``projected`` to the teacher's dimension, from its ``vectors`` [B, D].

    ``balanced`` vectors have mean 0 and mean variance 1 over the dimensions; others are normalised. ``temperature`` and
    the vectors of ``earlier`` batches [n, D] are for the distance ``similarities``.
    """
    check_rows("features", {"projected": projected, "vectors": vectors})
    if distance == "l2":
        return squared_distance(projected, vectors if balanced else unit(vectors), balanced)
    if distance == "similarities":
        queue = None if earlier is None else unit(earlier)
        return similarity_distance(unit(projected), unit(vectors), temperature, queue)[0]
    if distance != "cosine":
        raise UserError(f"features: distance: want cosine, l2 or similarities, got {distance!r:.100}")
    return cosine_distance(unit(projected), unit(vectors))


def cosine_distance(features: torch.Tensor, vectors: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Mean of 1 - cosine of rows [B, D] of unit norm, each times its weight [B]."""
    cosines = (features * vectors).sum(dim=-1)
    return 1 - cosines.mean() if weights is None else (weights * (1 - cosines)).mean()


def squared_distance(
    projected: torch.Tensor, target: torch.Tensor, balanced: bool, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean squared distance of rows [B, D], each times its weight [B], divided by the mean square of a target: 1, or D
    if it is balanced.
    """
    squares = (projected.float() - target).square().sum(dim=-1)
    squares = squares if weights is None else weights * squares
    return squares.mean() / (target.shape[-1] if balanced else 1)


def similarity_distance(
    projected: torch.Tensor, target: torch.Tensor, temperature: float, earlier: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of the similarities of rows [b, D] with those of their targets, all of unit norm.

    Both are compared with the targets of all ranks, which are returned, too, and with ``earlier`` ones [n, D].
    """
    own, target = full_precision(projected), full_precision(target)
    known = gather.gather({"target": target})["target"].detach()
    references = known if earlier is None else torch.cat([known, earlier])
    first = gather.rank() * len(own)
    student, teacher = (Logits(vectors, references, 1 / temperature, None, first) for vectors in (own, target))
    [loss] = cross_entropies("softmax", student, [teacher], False)
    return loss, known


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


def make(loss: Loss, models: TargetModels) -> Features | None:
    """The term of a config; None if lambda is 0 or no teacher is for it.

    Raises UserError for vectors that are all equal.
    """
    which = loss.features.teachers
    teachers = {
        name: teacher
        for name, teacher in models.teachers.items()
        if teacher.sides and (which == "all" or (which == "one-sided" and teacher.sides != {IMAGES, TEXTS}))
    }
    if not teachers or loss.lambda_ == 0:
        return None
    balance, distance, moments = loss.features.balance, loss.features.distance, dict[tuple[str, str], Moments]()
    if balance != "none" or (not loss.online and not models.texts):  # refuses vectors that are all equal
        for name in teachers:
            found = models.moments("teachers", name, balance == "phi-s")
            moments |= {(name, what): one for what, one in found.items()}
    how = "" if distance == "cosine" else f" by {distance}"
    how += "" if balance == "none" else f", balanced by {balance}"
    how += ", without a head" * (loss.features.head == "none")
    uses = {
        ("teachers", name): f"vectors of {' and '.join(sorted(teacher.sides))}, {teacher.dim} dimensions{how}"
        for name, teacher in teachers.items()
    }
    weight, kept = loss.lambda_ * loss.features_weight, moments if balance != "none" else {}
    confidence: dict[str, float] = {}
    if loss.weights == "confidence" and distance != "similarities":
        scales = find_scales(loss, models.teachers)
        confidence = {name: scale for name, (scale, _) in scales.items() if name in teachers}
    return Features(weight, teachers, loss.features, models.kinds, kept, loss.named_weights, confidence, uses=uses)
