"""Targets at mean 0 and standard deviation 1 in each dimension: the statistics, and what applies them."""

from __future__ import annotations

from typing import NamedTuple

import torch

_LEAST = 1e-3  # deviation of a dimension that hardly varies, relative to the root mean square of all
_EQUAL = 1e-6  # relative to the largest mean: the rounding of equal vectors


class Moments(NamedTuple):
    """Mean and standard deviation [D] of each dimension of vectors."""

    mean: torch.Tensor
    deviation: torch.Tensor


class Fit:
    """Moments of vectors that come in parts, in float64; vectors that are not finite are left out."""

    def __init__(self) -> None:
        self.count = 0
        self._mean = self._squares = torch.zeros((), dtype=torch.float64)

    def add(self, vectors: torch.Tensor) -> None:
        """Add vectors [..., D]."""
        rows = vectors.detach().cpu().flatten(0, -2).double()
        rows = rows[rows.isfinite().all(dim=1)]
        if not len(rows):
            return
        own, total = rows.mean(dim=0), self.count + len(rows)
        away = own - self._mean
        self._squares = (
            self._squares + (rows - own).square().sum(dim=0) + away.square() * self.count * len(rows) / total
        )
        self._mean = self._mean + away * len(rows) / total
        self.count = total

    def moments(self) -> Moments:
        """The float32 moments so far. Raises ValueError if there are no vectors, or if all are equal."""
        if not self.count:
            raise ValueError("there is none that is finite")
        deviation = (self._squares / self.count).sqrt()
        if not bool((deviation > _EQUAL * self._mean.abs().max()).any()):
            raise ValueError(f"all {self.count:,} are equal, so nothing can be learnt from them")
        least = _LEAST * deviation.square().mean().sqrt()
        return Moments(self._mean.float(), deviation.clamp_min(least).float())


class Standardise(torch.nn.Module):
    """Subtracts a mean and divides by a standard deviation, which checkpoints store."""

    mean: torch.Tensor
    deviation: torch.Tensor

    def __init__(self, moments: Moments) -> None:
        super().__init__()
        self.register_buffer("mean", moments.mean)
        self.register_buffer("deviation", moments.deviation)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Vectors [..., D] in float32."""
        return (vectors.float() - self.mean) / self.deviation
