"""The loss of multi-modal distillation, as a function of features, scales and targets alone.

For a batch of B pairs with student features I, X [B, D] (unit norm) and logit scale s, and teachers t = 1..T with
vectors I_t, X_t [B, D_t] (unit norm) and logit scales s_t, the loss of one kind of text is

    L = (1 - lambda) * L_CLIP + lambda * L_distill

and the total is the sum over the kinds of text (true captions, synthetic captions).

``softmax`` (MobileCLIP, arXiv 2311.17049): with the ensemble's P = 1/T sum_t softmax(s_t I_t X_t^T),

    L_CLIP    = cross-entropy of softmax(s I X^T) with the identity
    L_distill = cross-entropy of softmax(s I X^T) with P

each the mean of both directions (image to text, text to image). Probabilities are averaged after the softmax; logits
are never averaged.

``sigmoid``: each of the B^2 pairs is a binary classification with logit z_ij = s cos_ij + b, and

    L_CLIP    = 1/B sum_ij BCE(z_ij, [i = j])        (SigLIP, arXiv 2303.15343)
    L_distill = 1/B sum_ij BCE(z_ij, P_ij),  P = 1/T sum_t sigmoid(s_t cos_t + b_t)

A teacher that was trained with a softmax has no b_t, and we know of no publication that defines one. It is derived from
the teacher's softmax, which equals a sigmoid with a different bias for each entry:

    softmax_j(l_i) = sigmoid(l_ij - log sum_{k != j} exp l_ik)

Unless b_t is given, it is minus the mean over the batch's images of log sum_{k != i} exp(s_t cos_ik), the constant
nearest (in least squares) to the biases of the true pairs. It falls with log B, as the prior probability of a match
falls with B; SigLIP starts at b = -10 for the same reason.

L_distill cannot learn a teacher's scale: its minimum over s_t is where P agrees most with the student's predictions, so
the targets would follow the student. Instead, ``scale_losses`` is the cross-entropy of softmax(s_t I_t X_t^T) with the
identity, whose minimum is the s_t that makes the true pairs of the batch most likely (temperature scaling, arXiv
1706.04599). Only the scale gets a gradient from it, and L_distill treats the scale as a constant.

With several ranks, each rank compares its b rows with the columns of all ranks; the mean over the ranks is the loss of
the global batch of B = ranks * b pairs. Matrices [b, B] are computed in chunks of rows; see
``reinforce.student.chunks``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from reinforce.student import chunks
from reinforce.student.chunks import Logits, cross_entropies
from reinforce.training.distributed import gather
from teachers.runtime.determinism import tf32

Form = Literal["softmax", "sigmoid"]
#: Tensors [b, D] by ``image`` and kind of text.
Features = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Objective:
    """The objective: lambda, the form, and s_t and b_t by teacher.

    The ensemble is the teachers in ``scales``. ``biases`` are used by ``sigmoid`` only.
    """

    lambda_: float
    form: Form = "softmax"
    scales: Mapping[str, float | torch.Tensor] = field(default_factory=dict)
    biases: Mapping[str, float] = field(default_factory=dict)


def contrastive_losses(
    objective: Objective,
    features: Features,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    targets: Mapping[str, Features],
    reduced: bool = False,
) -> dict[str, torch.Tensor]:
    """Weighted losses ``clip/KIND`` and ``distill/KIND``, scalars that sum to L; terms of weight 0 are left out.

    ``features`` are the student's, tensors [b, D]; ``targets`` are the teachers', {teacher: tensors [b, D_t]}, with the
    same keys; all have unit norm. ``scale`` s and ``bias`` b are scalars; ``softmax`` ignores the bias. Computed in
    float64 if the features are, else in float32; ``reduced`` lets CUDA multiply in TF32. Raises KeyError if a teacher
    in ``objective.scales`` has no targets.
    """
    lambda_, form = objective.lambda_, objective.form
    scales = objective.scales if lambda_ > 0 else {}
    rows = {name: full_precision(value) for name, value in features.items()}
    of_teachers = {t: {what: full_precision(targets[t][what]) for what in rows} for t in scales}
    columns = _gather_columns(form, rows)
    images = {t: _gather_columns(form, {"image": own["image"]}) for t, own in of_teachers.items()}

    def teachers(kind: str) -> list[list[Logits]]:
        """The teachers' logits by side. Only columns of one kind are in memory at a time."""
        sides = []
        for teacher, own in of_teachers.items():
            others = {**images[teacher], **gather.gather({kind: own[kind]})}
            given = objective.biases.get(teacher)
            logits = _sides(form, own, others, kind, scales[teacher], given)
            if form == "sigmoid" and given is None:
                logits = [replace(logits[0], bias=-gather.mean(logits[0].mean_of_others()))]
            sides.append(logits)
        return [list(side) for side in zip(*sides, strict=True)]

    losses: dict[str, torch.Tensor] = {}
    with tf32() if reduced else contextlib.nullcontext():
        for kind in [name for name in rows if name != "image"]:
            students = _sides(form, rows, columns, kind, scale, bias)
            pairs = zip(students, teachers(kind) if scales else [[] for _ in students], strict=True)
            found = [cross_entropies(form, student, soft, lambda_ < 1) for student, soft in pairs]
            means = [torch.stack(sides).mean() for sides in zip(*found, strict=True)]
            if lambda_ < 1:
                losses[f"clip/{kind}"] = (1 - lambda_) * means[0]
            if scales:
                losses[f"distill/{kind}"] = lambda_ * means[-1]
    return losses


def scale_losses(
    scales: Mapping[str, torch.Tensor], targets: Mapping[str, Features], reduced: bool = False
) -> dict[str, torch.Tensor]:
    """``scale/TEACHER``: the cross-entropy of softmax(s_t I_t X_t^T) with the identity, mean over the kinds of text.

    ``scales`` are scalars with gradients by teacher, ``targets`` and ``reduced`` as in ``contrastive_losses``.
    """
    losses = {}
    for teacher, scale in scales.items():
        found = contrastive_losses(Objective(0.0), targets[teacher], scale, None, {}, reduced)
        losses[f"scale/{teacher}"] = torch.stack([*found.values()]).mean()
    return losses


def _gather_columns(form: Form, rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Vectors [B, D] of all ranks, with which a rank's rows [b, D] are compared; ``sigmoid`` needs only texts."""
    return gather.gather(rows if form == "softmax" else {n: v for n, v in rows.items() if n != "image"})


def _sides(
    form: Form,
    rows: Features,
    columns: Features,
    kind: str,
    scale: torch.Tensor | float,
    bias: torch.Tensor | float | None,
) -> list[Logits]:
    """Logits [b, B] of images with all texts and, for softmax, also of texts with all images, not yet computed.

    On one rank a matrix of one chunk has both.
    """
    first = gather.rank() * len(rows[kind])
    if form == "sigmoid":
        return [Logits(rows["image"], columns[kind], scale, bias, first)]
    if gather.world_size() == 1 and len(rows["image"]) ** 2 <= chunks.CHUNK:
        return [Logits(rows["image"], columns[kind], scale, None, first, both=True)]
    return [
        Logits(rows["image"], columns[kind], scale, None, first),
        Logits(rows[kind], columns["image"], scale, None, first),
    ]


def full_precision(values: torch.Tensor) -> torch.Tensor:
    """In half precision, logits of scale 100 would be off by several hundredths."""
    return values if values.dtype == torch.float64 else values.float()
