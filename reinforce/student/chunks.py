"""The cross-entropies of `reinforce.student.loss`, without a matrix of all pairs of a large batch in memory.

Chunks of rows are computed one after another, each with its gradient: with logits z [c, B] of a chunk,

    dL/dz = (q - P) / b,  q = softmax(z) or sigmoid(z)

So nothing is computed twice, and only gradients of features, [b, D] and [B, D], are kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import binary_cross_entropy_with_logits

#: Entries of a chunk (64 MiB in float32).
CHUNK = 1 << 24


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


def cross_entropies(form: str, logits: Logits, teachers: Sequence[Logits], clip: bool) -> tuple[torch.Tensor, ...]:
    """Cross-entropy of the logits' predictions with the identity, if ``clip``, and with the teachers' P, if any.

    Sums over columns and means over rows, as in ``reinforce.student.loss``, with gradients of the features, the scale
    and the bias in ``logits``.
    """
    losses: tuple[torch.Tensor, ...] = _CrossEntropies.apply(
        form, logits, teachers, clip, logits.rows, logits.columns, logits.scale, logits.bias
    )
    return losses


class _CrossEntropies(torch.autograd.Function):
    """The inputs after ``clip`` are those of ``logits`` that may have gradients."""

    @staticmethod
    def forward(
        ctx: Any, form: str, logits: Logits, teachers: Sequence[Logits], clip: bool, *inputs: Any
    ) -> tuple[torch.Tensor, ...]:
        needed = ctx.needs_input_grad[4:]
        terms = [_Term(form, logits, needed, soft) for soft in [False] * clip + [True] * bool(teachers)]
        for part in logits.parts():
            _add_chunk(form, logits, teachers, part, terms)
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


def _add_chunk(form: str, logits: Logits, teachers: Sequence[Logits], part: slice, terms: Sequence[_Term]) -> None:
    soft = [total.to(logits.rows.dtype) for total in _soft_targets(form, teachers, part)]
    values = logits.chunk(part)
    predictions = [values.log_softmax(dim) for dim in logits.dims] if form == "softmax" else [values]
    for term in terms:
        term.add_loss(part, predictions, soft if term.soft else None)
    predictions = [one.exp_() if form == "softmax" else one.sigmoid_() for one in predictions]
    for term in terms:  # the one with soft targets is the last: it overwrites the predictions
        term.add_gradients(part, predictions, soft if term.soft else None)


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


def _soft_targets(form: str, teachers: Sequence[Logits], part: slice) -> list[torch.Tensor]:
    """The ensemble's P [c, B] of some rows, by the dimension of the softmax; none without teachers."""
    totals: list[torch.Tensor] = []
    for teacher in teachers:
        logits = teacher.chunk(part)
        found = [logits.softmax(dim) for dim in teacher.dims] if form == "softmax" else [logits.sigmoid_()]
        del logits
        totals = [total.add_(one) for total, one in zip(totals, found, strict=True)] if totals else found
    return [total.div_(len(teachers)) for total in totals]
