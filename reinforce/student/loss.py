"""The loss of multi-modal distillation, as a function of features, scales and targets alone.

For a batch of B pairs, student features I, X (unit norm) with logit scale s, and teachers t = 1..T with I_t, X_t, s_t:

    L = (1 - lambda) * L_CLIP + lambda * L_distill

for each kind of text (true captions, synthetic ones), summed.

``softmax`` (MobileCLIP, arXiv 2311.17049): L_CLIP is the cross-entropy of softmax(s I X^T) with the identity, L_distill
that with P = 1/T sum_t softmax(s_t I_t X_t^T); each is the mean of both directions. Probabilities are averaged, after
the softmax, never logits.

``sigmoid``: each of the B^2 pairs is a question of its own, answered by z_ij = s cos_ij + b. L_CLIP is SigLIP's loss
(arXiv 2303.15343), 1/B sum_ij BCE(z_ij, [i = j]); L_distill is 1/B sum_ij BCE(z_ij, P_ij) with
P = 1/T sum_t sigmoid(s_t cos_t + b_t). A teacher trained with softmax has no b_t. No publication is known that says
what to take, so it is derived from what the teacher does say: its softmax is a sigmoid with a bias of its own in each
place, softmax_j(l_i) = sigmoid(l_ij - log sum_{k != j} exp l_ik). Unless b_t is given, it is minus the mean over the
batch's images of log sum_{k != i} exp(s_t cos_ik), which is the constant nearest (in least squares) to the biases of
the true pairs. It falls with log B, as the prior chance of a match falls with B, which is also why SigLIP starts at
b = -10.

A teacher's scale cannot be learnt by L_distill: over s_t that is lowest where P says most nearly what the student
answers already, so targets would follow the student and not what is true. But how far a teacher may be trusted can be
asked of itself: the s_t that makes the true pairs of the batch likeliest minimises the cross-entropy of
softmax(s_t I_t X_t^T) with the identity (temperature scaling, arXiv 1706.04599). ``matching`` is that loss; its only
gradient is the scale's, and L_distill takes the scale as a constant.

Over ranks each takes its b rows against the columns of all; the mean over the ranks is the loss of the whole batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from reinforce.training import gather

Form = Literal["softmax", "sigmoid"]
Features = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Objective:
    """What is minimised. The ensemble is what ``scales`` names; ``biases`` are for ``sigmoid`` alone."""

    share: float  # lambda
    form: Form = "softmax"
    scales: Mapping[str, float | torch.Tensor] = field(default_factory=dict)
    biases: Mapping[str, float] = field(default_factory=dict)


def contrast(
    objective: Objective,
    features: Features,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    targets: Mapping[str, Features],
) -> dict[str, torch.Tensor]:
    """Weighted losses ``clip/KIND`` and ``distill/KIND`` that sum to L; terms of weight 0 are left out.

    ``features`` [b, D] by ``image`` and kind of text, ``targets`` likewise by teacher, all unit norm; ``scale`` and
    ``bias`` are scalars, the latter of ``sigmoid`` alone. Computed in float32, or in float64 if that is given.
    """
    share, form = objective.share, objective.form
    rows = {name: _full(value) for name, value in features.items()}
    columns = _columns(form, rows)
    kinds = [name for name in rows if name != "image"]
    soft = _soft_targets(objective, kinds, targets) if share > 0 and objective.scales else {}
    losses: dict[str, torch.Tensor] = {}
    for kind in kinds:
        logits = _logits(form, rows, columns, kind, scale, bias)
        answers = [values.log_softmax(dim=1) for values in logits] if form == "softmax" else logits
        if share < 1:
            losses[f"clip/{kind}"] = (1 - share) * _cross_entropy(form, answers, None)
        if kind in soft:
            losses[f"distill/{kind}"] = share * _cross_entropy(form, answers, soft[kind])
    return losses


def matching(scales: Mapping[str, torch.Tensor], targets: Mapping[str, Features]) -> dict[str, torch.Tensor]:
    """``scale/TEACHER``: the cross-entropy of softmax(s_t I_t X_t^T) with the true pairs, mean over the kinds of text.

    ``scales`` are scalars with gradients, ``targets`` as in ``contrast``.
    """
    losses = {}
    for teacher, scale in scales.items():
        rows = {name: _full(value) for name, value in targets[teacher].items()}
        columns = _columns("softmax", rows)
        of_kinds = [
            _cross_entropy("softmax", [values.log_softmax(dim=1) for values in logits], None)
            for logits in (_logits("softmax", rows, columns, kind, scale, None) for kind in rows if kind != "image")
        ]
        losses[f"scale/{teacher}"] = torch.stack(of_kinds).mean()
    return losses


def _cross_entropy(form: Form, answers: Sequence[torch.Tensor], soft: Sequence[torch.Tensor] | None) -> torch.Tensor:
    """Of log-probabilities (softmax) or logits (sigmoid) with P, or with the identity where that is None."""
    if form == "sigmoid":
        (logits,) = answers
        (targets,) = soft or [_identity(logits)]
        return binary_cross_entropy_with_logits(logits, targets, reduction="sum") / len(logits)
    if soft is None:
        return -torch.stack([_of_pairs(values).mean() for values in answers]).mean()
    return -torch.stack([(p * values).sum(dim=1).mean() for p, values in zip(soft, answers, strict=True)]).mean()


@torch.no_grad()
def _soft_targets(
    objective: Objective, kinds: Sequence[str], targets: Mapping[str, Features]
) -> dict[str, list[torch.Tensor]]:
    """The ensemble's P by kind, a [b, B] matrix for each of ``_logits``; one teacher after another adds to one sum."""
    form = objective.form
    sums: dict[str, list[torch.Tensor]] = {}
    for teacher, scale in objective.scales.items():
        rows = {name: _full(targets[teacher][name]) for name in ("image", *kinds)}
        columns = _columns(form, rows)
        for kind in kinds:
            logits = _logits(form, rows, columns, kind, scale, objective.biases.get(teacher))
            if form == "softmax":
                probabilities = [values.softmax(dim=1) for values in logits]
            elif teacher in objective.biases:
                probabilities = [values.sigmoid() for values in logits]
            else:
                probabilities = [(values + implied_bias(values)).sigmoid() for values in logits]
            if kind in sums:
                for total, values in zip(sums[kind], probabilities, strict=True):
                    total.add_(values)
            else:
                sums[kind] = probabilities
    for totals in sums.values():
        for total in totals:
            total.div_(len(objective.scales))
    return sums


def implied_bias(logits: torch.Tensor) -> torch.Tensor:
    """The bias with which sigmoids come nearest to the softmax of a batch's images, [b, B] -> scalar; see above."""
    others = logits.clone()
    _of_pairs(others).fill_(-torch.inf)
    return -gather.mean(others.logsumexp(dim=1).mean())


def _columns(form: Form, rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The vectors of all ranks that a rank's rows are held against."""
    return gather.gather(rows if form == "softmax" else {n: v for n, v in rows.items() if n != "image"})


def _logits(
    form: Form,
    rows: Features,
    columns: Features,
    kind: str,
    scale: torch.Tensor | float,
    bias: torch.Tensor | float | None,
) -> list[torch.Tensor]:
    """[b, B], scaled and shifted cosines of images with all texts and, for softmax, of texts with all images."""
    of_images = (scale * rows["image"]) @ columns[kind].T
    if form == "sigmoid":
        return [of_images if bias is None else of_images + bias]
    if gather.ranks() == 1:
        return [of_images, of_images.T]
    return [of_images, (scale * rows[kind]) @ columns["image"].T]


def _of_pairs(matrix: torch.Tensor) -> torch.Tensor:
    """The entries [b] of a rank's rows [b, B] that belong to true pairs, as a view."""
    return matrix.diagonal(gather.rank() * len(matrix))


def _identity(matrix: torch.Tensor) -> torch.Tensor:
    """1 for true pairs, else 0."""
    ones = torch.zeros_like(matrix)
    _of_pairs(ones).fill_(1)
    return ones


def _full(values: torch.Tensor) -> torch.Tensor:
    """Logits of scale 100 in half precision would be off by several hundredths."""
    return values if values.dtype == torch.float64 else values.float()
