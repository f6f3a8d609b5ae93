"""Targets of teachers of other spreads made comparable: statistics of vectors, and what applies them.

``standardise`` gives each dimension mean 0 and standard deviation 1:

    y = (v - m) / s

``phi-s`` (PHI-S, arXiv 2410.01680) turns vectors so that all dimensions vary equally, and divides them by one number,

    y = a^-1 H U^T (v - m),   covariance C = U diag(l) U^T,   a^2 = mean of l

with a normalised Hadamard matrix H of the width D. The diagonal of H diag(l) H^T has equal entries, so each dimension
of y has variance 1; distances within a teacher keep their proportions. A Hadamard matrix is made by the constructions
of Sylvester and of Paley (for q prime). For widths that neither has, plane rotations make the variances equal, which
exist for every width (Schur and Horn).

Kinds of texts that share a head have their own m and a, and U of the mean of their C / a^2: a head can follow only one
rotation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch

_LEAST = 1e-3  # deviation of a dimension that hardly varies, relative to the root mean square of all
_EQUAL = 1e-6  # relative to the largest mean: the rounding of equal vectors


class Moments(NamedTuple):
    """Mean and standard deviation [D] of each dimension of vectors, float32; their covariance [D, D], float64."""

    mean: torch.Tensor
    deviation: torch.Tensor
    covariance: torch.Tensor | None = None


class Fit:
    """Moments of vectors that come in parts, in float64; vectors that are not finite are left out.

    The covariance is found only where it is asked for: it takes 2 D^2 operations a vector.
    """

    def __init__(self, covariance: bool = False) -> None:
        self.count = 0
        self._whole = covariance
        self._mean = self._products = torch.zeros((), dtype=torch.float64)

    def add(self, vectors: torch.Tensor) -> None:
        """Add vectors [..., D]."""
        rows = vectors.detach().cpu().flatten(0, -2).double()
        rows = rows[rows.isfinite().all(dim=1)]
        if not len(rows):
            return
        own, total = rows.mean(dim=0), self.count + len(rows)
        away, around = own - self._mean, rows - own
        within = around.T @ around if self._whole else around.square().sum(dim=0)
        between = torch.outer(away, away) if self._whole else away.square()
        self._products = self._products + within + between * self.count * len(rows) / total
        self._mean = self._mean + away * len(rows) / total
        self.count = total

    def moments(self) -> Moments:
        """The moments so far. Raises ValueError if there are no vectors, or if all are equal."""
        if not self.count:
            raise ValueError("there is none that is finite")
        products = self._products / self.count
        deviation = (products.diagonal() if self._whole else products).sqrt()
        if not bool((deviation > _EQUAL * self._mean.abs().max()).any()):
            raise ValueError(f"all {self.count:,} are equal, so nothing can be learnt from them")
        least = _LEAST * deviation.square().mean().sqrt()
        return Moments(self._mean.float(), deviation.clamp_min(least).float(), products if self._whole else None)


class Balance(torch.nn.Module):
    """Subtracts a mean [D], then divides by deviations [D] or multiplies by a matrix [D, D]; checkpoints store both."""

    mean: torch.Tensor
    deviation: torch.Tensor | None
    matrix: torch.Tensor | None

    def __init__(self, mean: torch.Tensor, deviation: torch.Tensor | None, matrix: torch.Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)
        self.register_buffer("matrix", matrix)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Vectors [..., D] in float32."""
        away = vectors.float() - self.mean
        if self.deviation is not None:
            return away / self.deviation
        assert self.matrix is not None
        with torch.autocast(away.device.type, enabled=False):
            return away @ self.matrix


def balances(balance: str, kinds: Mapping[str, Moments]) -> dict[str, Balance]:
    """What balances the vectors of kinds that share a head, ``phi-s`` or by dimension; the former needs covariances."""
    if balance != "phi-s" or not kinds:
        return {kind: Balance(of.mean, of.deviation) for kind, of in kinds.items()}
    of_kinds = {kind: moments.covariance for kind, moments in kinds.items() if moments.covariance is not None}
    scales = {kind: of.diagonal().mean() for kind, of in of_kinds.items()}
    values, vectors = torch.linalg.eigh(torch.stack([of / scales[kind] for kind, of in of_kinds.items()]).mean(dim=0))
    # the sign of an eigenvector is free; fixed, so that stored and online vectors are turned alike
    largest = vectors.abs().argmax(dim=0)
    vectors = vectors * vectors.gather(0, largest[None]).sign()
    turn = equal_variances(values) @ vectors.T
    return {
        kind: Balance(kinds[kind].mean, None, (turn / scale.sqrt()).T.contiguous().float())
        for kind, scale in scales.items()
    }


def equal_variances(variances: torch.Tensor) -> torch.Tensor:
    """A rotation R [D, D], float64, with equal entries on the diagonal of R diag(variances) R^T."""
    width = len(variances)
    if (found := hadamard(width)) is not None:
        return found / math.sqrt(width)
    mean, turn = variances.double().mean(), torch.eye(width, dtype=torch.float64)
    turned, left = torch.diag(variances.double()), [*range(width)]
    while len(left) > 1:
        # turn the plane of the largest and the smallest variance until the first is the mean
        own = turned.diagonal()[left]
        p, q = left[int(own.argmax())], left[int(own.argmin())]
        above, below, both = turned[p, p] - mean, turned[q, q] - mean, turned[p, q]
        if above - below > 1e-12 * mean and below < 0:
            tangent = (-both - (both.square() - above * below).sqrt()) / below
            cosine = 1 / (1 + tangent.square()).sqrt()
            sine = tangent * cosine
            plane = torch.stack([torch.stack([cosine, sine]), torch.stack([-sine, cosine])])
            turn[[p, q]] = plane @ turn[[p, q]]
            turned[[p, q]] = plane @ turned[[p, q]]
            turned[:, [p, q]] = turned[:, [p, q]] @ plane.T
        left.remove(p)
    return turn


def hadamard(size: int) -> torch.Tensor | None:
    """A matrix of 1 and -1 with orthogonal rows, float64; None if neither construction has one of this size."""
    prime = size - 1
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if prime % 4 == 3 and all(prime % factor for factor in range(2, math.isqrt(prime) + 1)):  # Paley
        squares = torch.zeros(prime, dtype=torch.float64) - 1
        squares[torch.arange(1, prime).square() % prime], squares[0] = 1, 0
        found = torch.ones(size, size, dtype=torch.float64)
        difference = torch.arange(prime)[None] - torch.arange(prime)[:, None]
        found[1:, 1:] = squares[difference % prime] - torch.eye(prime, dtype=torch.float64)
        return found
    half = hadamard(size // 2) if size % 2 == 0 else None  # Sylvester
    return None if half is None else torch.kron(torch.tensor([[1, 1], [1, -1]], dtype=torch.float64), half)
