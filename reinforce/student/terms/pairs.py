"""The contrastive loss and the distillation of similarities: both compare all images of a batch with all its texts.

They are one term, since they share the student's matrix of similarities.

For a batch of B pairs with student features I, X [B, D] (unit norm) and logit scale s, and teachers t = 1..T with
vectors I_t, X_t [B, D_t] (unit norm) and logit scales s_t, the loss of one kind of text is

    L = (1 - lambda) * L_CLIP + lambda * L_distill

and the total is the sum over the kinds of text (true captions, synthetic captions).

``softmax`` (MobileCLIP, arXiv 2311.17049): with the ensemble's P = 1/T sum_t softmax(s_t I_t X_t^T),

    L_CLIP    = cross-entropy of softmax(s I X^T) with the identity
    L_distill = cross-entropy of softmax(s I X^T) with P

each the mean of both directions (image to text, text to image). Probabilities are averaged after the softmax; logits
are never averaged. The mean over the teachers is by their ``weights``. With ``confidence`` these are, in each row i and
direction, in proportion to the probability p_t of the true pair, so that the teacher counts most that is surest of it:

    P_i = sum_t p_t,i softmax(s_t I_t X_t^T)_i / sum_t p_t,i,   p_t,i at least 1e-12

``sigmoid``: each of the B^2 pairs is a binary classification with logit z_ij = s cos_ij + b, and

    L_CLIP    = 1/B sum_ij BCE(z_ij, [i = j])        (SigLIP, arXiv 2303.15343)
    L_distill = 1/B sum_ij BCE(z_ij, P_ij),  P = 1/T sum_t sigmoid(s_t cos_t + b_t)

A teacher that was trained with a softmax has no b_t, and we know of no publication that defines one. It is derived
from the teacher's softmax, which equals a sigmoid with a different bias for each entry:

    softmax_j(l_i) = sigmoid(l_ij - log sum_{k != j} exp l_ik)

Unless b_t is given, it is minus the mean over the batch's images of log sum_{k != i} exp(s_t cos_ik), the constant
nearest (in least squares) to the biases of the true pairs. It falls with log B, as the prior probability of a match
falls with B; SigLIP starts at b = -10 for the same reason.

L_distill cannot learn a teacher's scale: its minimum over s_t is where P agrees most with the student's predictions,
so the targets would follow the student. Instead, ``scale_losses`` is the cross-entropy of softmax(s_t I_t X_t^T) with
the identity, whose minimum is the s_t that makes the true pairs of the batch most likely (temperature scaling, arXiv
1706.04599). Only the scale gets a gradient from it, and L_distill treats the scale as a constant.

With several ranks, each rank compares its b rows with the columns of all ranks; the mean over the ranks is the loss
of the global batch of B = ranks * b pairs.

Matrices [b, B] are not held in memory as a whole. Chunks of rows are computed one after another, each with its
gradient: with logits z [c, B] of a chunk,

    dL/dz = (q - P) / b,  q = softmax(z) or sigmoid(z)

So nothing is computed twice, and only gradients of features, [b, D] and [B, D], are kept for the backward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import binary_cross_entropy_with_logits

from reinforce.errors import UserError
from reinforce.student.config import Loss
from reinforce.student.teachers import CAPTION, IMAGE, IMAGES, SYNTHETIC, TEXTS, TeacherInfo
from reinforce.student.terms.base import Rows, TargetModels, Term, scale_name
from reinforce.training import gather
from reinforce.training.config import HIGHEST_LOGIT_SCALE
from teachers.runtime.determinism import tf32

#: Entries of a chunk (64 MiB in float32).
CHUNK = 1 << 24
Form = Literal["softmax", "sigmoid"]
#: Tensors [b, D] by ``image`` and kind of text.
Features = Mapping[str, torch.Tensor]
#: Weights of teachers by their number, none if they are equal.
_Weights = Sequence[float] | Literal["confidence"]
_LEAST_SURE = 1e-12  # where no teacher gives the true pair more, all count the same


@dataclass(frozen=True)
class Pairs(Term):
    """``clip/KIND`` and ``distill/KIND``; ``learnt`` is whether the teachers' logit scales are among the weights."""

    objective: Objective
    learnt: bool = False
    aligns = True

    def losses(self, rows: Rows) -> dict[str, torch.Tensor]:
        scale, bias = rows.scalars["logit_scale"], rows.scalars.get("logit_bias")
        features = {name: rows.features[name] for name in (IMAGE, CAPTION, SYNTHETIC) if name in rows.features}
        return contrastive_losses(self._now(rows), features, scale, bias, rows.targets, rows.reduced)

    def parts(self, rows: Rows) -> Iterator[tuple[str, str, torch.Tensor]]:
        objective = self._now(rows)
        for kind in [name for name in rows.features if name != IMAGE] if objective.scales else ():
            yield from parts_of_similarities(objective, kind, rows)

    def _now(self, rows: Rows) -> Objective:
        """The objective with the scales that are learnt."""
        if not self.learnt:
            return self.objective
        learnt = {name: rows.scalars[scale_name(name)].detach() for name in self.objective.scales}
        return replace(self.objective, scales=learnt)


def make(loss: Loss, models: TargetModels) -> Pairs | None:
    """The term of a config, None if it would have no loss. Raises UserError if a teacher has no logit scale."""
    both = models.texts and models.images
    found = find_scales(loss, models.teachers) if both and loss.lambda_ > 0 else {}
    if loss.weights == "confidence" and len(found) < 2:
        raise UserError(
            "loss.weights: confidence divides rows among teachers whose similarities are distilled, and there is "
            f"{'only ' + ' '.join(found) if found else 'none'}. Remove it, or name more under data.teachers."
        )
    if not both or (loss.lambda_ == 1 and not found):
        return None
    scales = {name: scale for name, (scale, _) in found.items()}
    objective = Objective(loss.lambda_, loss.form, scales, loss.logit_biases, loss.weights)
    return Pairs(
        objective,
        loss.learn_scales,
        uses={("teachers", name): f"similarities, {note}" for name, (_, note) in found.items()},
        recorded={} if loss.learn_scales else {f"loss.logit_scales.{name}": scale for name, scale in scales.items()},
    )


def find_scales(loss: Loss, teachers: Mapping[str, TeacherInfo]) -> dict[str, tuple[float, str]]:
    """The logit scale of each teacher with images and texts, and its source. Raises UserError if it has none."""
    for name in (*loss.logit_scales, *loss.logit_biases):
        if name not in (*teachers, *loss.anchors):
            raise UserError(f"loss: there is no teacher {name!r}; there are: {', '.join(teachers) or 'none'}.")
    found = {}
    for name, teacher in teachers.items():
        if teacher.sides == {IMAGES, TEXTS}:
            scale, source = logit_scale(name, teacher, loss)
            if loss.learn_scales and not 1 <= scale <= HIGHEST_LOGIT_SCALE:
                raise UserError(
                    f"teacher {name} has logit scale {scale:g}, and loss.learn_scales keeps scales within 1 and "
                    f"{HIGHEST_LOGIT_SCALE:g}. Set loss.logit_scales.{name} to a start in that range, or learn_scales "
                    "to false."
                )
            learnt = ", then learnt by its own contrastive loss" * loss.learn_scales
            found[name] = scale, f"logit scale {scale:g} ({source}){learnt}"
    return found


def logit_scale(name: str, teacher: TeacherInfo, loss: Loss) -> tuple[float, str]:
    """The scale to use and a description of its source. Raises UserError if there is none."""
    if name in loss.logit_scales:
        stated, source = loss.logit_scales[name], f"config: loss.logit_scales.{name}"
        if teacher.logit_scale not in (None, stated):
            source += f", instead of {teacher.logit_scale:g} of the {teacher.scale_source}"
        return stated, source
    if teacher.logit_scale is None:
        raise UserError(
            f"teacher {name} has no logit scale, which distillation needs. Set loss.logit_scales.{name} "
            "(1 / temperature; 50 to 90 for CLIP models), or leave it out of data.teachers."
        )
    return teacher.logit_scale, teacher.scale_source


@dataclass(frozen=True)
class Objective:
    """The objective: lambda, the form, and s_t and b_t by teacher.

    The ensemble is the teachers in ``scales``. ``biases`` are used by ``sigmoid`` only. ``weights`` are by teacher, 1
    for those that it does not name, or ``confidence``.
    """

    lambda_: float
    form: Form = "softmax"
    scales: Mapping[str, float | torch.Tensor] = field(default_factory=dict)
    biases: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[str, float] | Literal["confidence"] = field(default_factory=dict)

    @property
    def of_teachers(self) -> _Weights:
        """The weights in the order of ``scales``, of sum 1; none if they are equal."""
        if isinstance(self.weights, str):
            return self.weights
        own = [self.weights.get(name, 1.0) for name in self.scales]
        return [] if len({*own}) == 1 else [weight / sum(own) for weight in own]


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
    # vectors [B, D] of all ranks, with which a rank's rows [b, D] are compared; ``sigmoid`` needs only texts
    columns = gather.gather({name: value for name, value in rows.items() if form == "softmax" or name != "image"})
    images = {t: gather.gather({"image": own["image"]} if form == "softmax" else {}) for t, own in of_teachers.items()}

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
            weights = objective.of_teachers
            found = [cross_entropies(form, student, soft, lambda_ < 1, weights) for student, soft in pairs]
            means = [torch.stack(sides).mean() for sides in zip(*found, strict=True)]
            if lambda_ < 1:
                losses[f"clip/{kind}"] = (1 - lambda_) * means[0]
            if scales:
                losses[f"distill/{kind}"] = lambda_ * means[-1]
    return losses


def parts_of_similarities(objective: Objective, kind: str, rows: Rows) -> Iterator[tuple[str, str, torch.Tensor]]:
    """``Term.parts`` of one kind of text, of the pairs of this rank alone."""
    form, biases = objective.form, objective.biases

    def logits(vectors: Features, scale: float | torch.Tensor, bias: float | torch.Tensor | None) -> Logits:
        image, text = (full_precision(vectors[what]) for what in (IMAGE, kind))
        found = Logits(image, text, scale, bias if form == "sigmoid" else None, 0, both=form == "softmax")
        return replace(found, bias=-found.mean_of_others()) if form == "sigmoid" and bias is None else found

    student = logits(rows.features, rows.scalars["logit_scale"], rows.scalars.get("logit_bias"))
    teachers = [logits(rows.targets[name], scale, biases.get(name)) for name, scale in objective.scales.items()]
    every, values = slice(0, len(student.rows)), student.chunk(slice(0, len(student.rows)))
    for dim in student.dims:
        chunks = [teacher.chunk(every) for teacher in teachers]
        soft = [chunk.softmax(dim) if form == "softmax" else chunk.sigmoid() for chunk in chunks]
        weights: Any = objective.of_teachers or [1 / len(soft)] * len(soft)
        if weights == "confidence":
            sure = torch.stack([one.diagonal().clamp_min(_LEAST_SURE) for one in soft])
            weights = sure / sure.sum(dim=0)
            won = weights.argmax(dim=0)
            for number, name in enumerate(objective.scales):
                yield "rows", name, (won == number).sum()
        for name, targets, weight in zip(objective.scales, soft, weights, strict=True):
            if form == "softmax":
                losses = -(targets * values.log_softmax(dim)).sum(dim=dim)
            else:
                losses = binary_cross_entropy_with_logits(values, targets, reduction="none").sum(dim=dim)
            yield "loss", name, objective.lambda_ * (weight * losses).mean() / len(student.dims)


@torch.no_grad()
def shares_of_rows(
    scales: Mapping[str, float | torch.Tensor], kinds: Sequence[str], targets: Mapping[str, Features]
) -> dict[str, dict[str, torch.Tensor]]:
    """Weights [b] by ``image`` or kind of text and teacher, of mean 1 over the teachers, in proportion to the
    probability of each row's true pair in softmax(s_t I_t X_t^T); of images, its mean over the kinds of text.

    ``scales`` are s_t by teacher, ``targets`` as in ``contrastive_losses``.
    """
    sure: dict[str, dict[str, torch.Tensor]] = {what: {} for what in ("image", *kinds)}
    for teacher, scale in scales.items():
        own = {what: full_precision(targets[teacher][what]) for what in sure}
        columns, of_images = gather.gather(own), []
        for kind in kinds:
            of_image, sure[kind][teacher] = (
                torch.cat([one.true_pairs(part, one.chunk(part).softmax(dim)) for part in one.parts()])
                for one in _sides("softmax", own, columns, kind, scale, None)
                for dim in one.dims
            )
            of_images.append(of_image)
        sure["image"][teacher] = torch.stack(of_images).mean(dim=0)
    shares = {}
    for what, of_teachers in sure.items():
        known = torch.stack([*of_teachers.values()]).clamp_min(_LEAST_SURE)
        shares[what] = dict(zip(of_teachers, known / known.mean(dim=0), strict=True))
    return shares


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
    if gather.world_size() == 1 and len(rows["image"]) ** 2 <= CHUNK:
        return [Logits(rows["image"], columns[kind], scale, None, first, both=True)]
    return [
        Logits(rows["image"], columns[kind], scale, None, first),
        Logits(rows[kind], columns["image"], scale, None, first),
    ]


def full_precision(values: torch.Tensor) -> torch.Tensor:
    """In half precision, logits of scale 100 would be off by several hundredths."""
    return values if values.dtype == torch.float64 else values.float()


@dataclass(frozen=True)
class Logits:
    """The matrix scale * rows @ columns.T + bias [b, B], of which chunks of rows are computed.

    ``first`` is the column of the first row's true pair; those of the other rows follow. With ``both``, the matrix is
    square and one chunk, and the cross-entropy is the mean of those of a softmax of rows and of one of columns.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    scale: torch.Tensor | float
    bias: torch.Tensor | float | None
    first: int
    both: bool = False

    @property
    def dims(self) -> tuple[int, ...]:
        """The dimensions of a softmax."""
        return (1, 0) if self.both else (1,)

    def parts(self) -> Iterator[slice]:
        """The rows of each chunk."""
        step = max(1, CHUNK // len(self.columns))
        return (slice(start, min(start + step, len(self.rows))) for start in range(0, len(self.rows), step))

    def chunk(self, part: slice) -> torch.Tensor:
        """Logits [c, B] of some rows."""
        values = (self.scale * self.rows[part]) @ self.columns.T
        return values if self.bias is None else values.add_(self.bias)

    def true_pairs(self, part: slice, chunk: torch.Tensor) -> torch.Tensor:
        """The entries [c] of a chunk [c, B] that belong to true pairs, as a view."""
        return chunk.diagonal(self.first + part.start)

    @torch.no_grad()
    def mean_of_others(self) -> torch.Tensor:
        """Mean over the rows of log sum exp of the logits that do not belong to true pairs."""
        found = []
        for part in self.parts():
            others = self.chunk(part)
            self.true_pairs(part, others).fill_(-torch.inf)
            found.append(others.logsumexp(dim=1))
        return torch.cat(found).mean()


def cross_entropies(
    form: str, logits: Logits, teachers: Sequence[Logits], clip: bool, weights: _Weights = ()
) -> tuple[torch.Tensor, ...]:
    """Cross-entropy of the logits' predictions with the identity, if ``clip``, and with the teachers' P, if any.

    Sums over columns and means over rows, with gradients of the features, the scale and the bias in ``logits``.
    ``weights`` are those of the teachers, of sum 1; without any they are equal.
    """
    losses: tuple[torch.Tensor, ...] = _CrossEntropies.apply(
        form, logits, (teachers, weights), clip, logits.rows, logits.columns, logits.scale, logits.bias
    )
    return losses


class _CrossEntropies(torch.autograd.Function):
    """The inputs after ``clip`` are those of ``logits`` that may have gradients."""

    @staticmethod
    def forward(
        ctx: Any, form: str, logits: Logits, ensemble: tuple[Sequence[Logits], _Weights], clip: bool, *inputs: Any
    ) -> tuple[torch.Tensor, ...]:
        needed = ctx.needs_input_grad[4:]
        terms = [_Term(form, logits, needed, soft) for soft in [False] * clip + [True] * bool(ensemble[0])]
        for part in logits.parts():
            _add_chunk(form, logits, ensemble, part, terms)
        ctx.save_for_backward(*(gradient for term in terms for gradient in term.gradients()))
        return tuple(term.loss / (len(logits.rows) * len(logits.dims)) for term in terms)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *weights: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        of_inputs: list[torch.Tensor | None] = []
        for number in range(4):
            gradients = [
                gradient * weight
                for gradient, weight in zip(ctx.saved_tensors[number::4], weights, strict=True)
                if gradient is not None
            ]
            of_inputs.append(sum(gradients[1:], gradients[0]) if gradients else None)
        return (None, None, None, None, *of_inputs)


# Two functions, so that no matrix [c, B] outlives its use.


def _add_chunk(
    form: str, logits: Logits, ensemble: tuple[Sequence[Logits], _Weights], part: slice, terms: Sequence[_Term]
) -> None:
    soft = [total.to(logits.rows.dtype) for total in _soft_targets(form, *ensemble, part)]
    values = logits.chunk(part)
    predictions = [values.log_softmax(dim) for dim in logits.dims] if form == "softmax" else [values]
    for term in terms:
        term.add_loss(part, predictions, soft if term.soft else None)
    predictions = [one.exp_() if form == "softmax" else one.sigmoid_() for one in predictions]
    for term in terms:  # the one with soft targets is the last: it overwrites the predictions
        term.add_gradients(part, predictions, soft if term.soft else None)


def _soft_targets(form: str, teachers: Sequence[Logits], weights: _Weights, part: slice) -> list[torch.Tensor]:
    """The ensemble's P [c, B] of some rows, by the dimension of the softmax; none without teachers."""
    totals: list[torch.Tensor] = []
    sums: list[Any] = []
    for number, teacher in enumerate(teachers):
        logits = teacher.chunk(part)
        found = [logits.softmax(dim) for dim in teacher.dims] if form == "softmax" else [logits.sigmoid_()]
        del logits
        own: list[Any] = [1.0] * len(found)
        if weights == "confidence":
            sure = (teacher.true_pairs(part, one).clamp_min(_LEAST_SURE) for one in found)
            own = [of.unsqueeze(dim) for of, dim in zip(sure, teacher.dims, strict=True)]
        elif weights:
            own = [weights[number]] * len(found)
        if weights:
            found = [one.mul_(weight) for one, weight in zip(found, own, strict=True)]
        totals = [total.add_(one) for total, one in zip(totals, found, strict=True)] if totals else found
        sums = [total + weight for total, weight in zip(sums, own, strict=True)] if sums else own
    return [total.div_(of) for total, of in zip(totals, sums, strict=True)]


class _Term:
    """A cross-entropy, and its gradients with respect to rows, columns, scale and bias where they are ``needed``.

    Its targets are the teachers' P if ``soft``, else the identity.
    """

    def __init__(self, form: str, logits: Logits, needed: Sequence[bool], soft: bool) -> None:
        self._form, self._logits, self._needed, self.soft = form, logits, needed, soft
        self.loss = logits.rows.new_zeros(())
        self._rows = torch.empty_like(logits.rows, memory_format=torch.contiguous_format)
        self._columns = torch.zeros_like(logits.columns, memory_format=torch.contiguous_format) if needed[1] else None
        self._bias = logits.rows.new_zeros(())

    def add_loss(self, part: slice, predictions: Sequence[torch.Tensor], soft: Sequence[torch.Tensor] | None) -> None:
        """Add the sum over a chunk [c, B]; predictions are log-probabilities (softmax) or logits (sigmoid)."""
        if self._form == "softmax":
            for number, values in enumerate(predictions):
                of_pairs = self._logits.true_pairs(part, values) if soft is None else soft[number] * values
                self.loss -= of_pairs.sum()
            return
        if soft is None:
            soft = [torch.zeros_like(predictions[0])]
            self._logits.true_pairs(part, soft[0]).fill_(1)
        self.loss += binary_cross_entropy_with_logits(predictions[0], soft[0], reduction="sum")

    def add_gradients(
        self, part: slice, predictions: Sequence[torch.Tensor], soft: Sequence[torch.Tensor] | None
    ) -> None:
        """Add those of a chunk; predictions are probabilities, which are overwritten if the targets are soft."""
        if not any(self._needed):
            return
        logits = self._logits
        differences = sum(predictions[1:], predictions[0])  # Q - P, summed over the dimensions of the softmax
        true = logits.true_pairs(part, differences)
        before = true.clone()
        if soft is None:
            true -= len(predictions)
        for targets in soft or ():
            differences -= targets
        torch.mm(differences, logits.columns, out=self._rows[part])
        if self._columns is not None:
            self._columns.addmm_(differences.T, logits.rows[part])
        if self._needed[3]:
            self._bias += differences.sum()
        if soft is None:
            true.copy_(before)

    def gradients(self) -> list[torch.Tensor | None]:
        """Of the mean over the rows, with respect to rows, columns, scale and bias."""
        logits, rows = self._logits, len(self._logits.rows) * len(self._logits.dims)
        of_scale = (self._rows * logits.rows).sum() / rows  # sum over ij of (q - P)_ij cos_ij
        factor = logits.scale / rows
        of_columns = None if self._columns is None else self._columns.mul_(factor)
        values = [self._rows.mul_(factor), of_columns, of_scale, self._bias / rows]
        return [value if needed else None for value, needed in zip(values, self._needed, strict=True)]
