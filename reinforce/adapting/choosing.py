"""Which mixture of weights to take: the best on the domain that loses little of the general sets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from reinforce.errors import UserError


@dataclass(frozen=True)
class Point:
    """Metrics, between 0 and 1, of the first model's weights mixed with a share ``alpha`` of the second's."""

    alpha: float
    metrics: Mapping[str, float]


def mean(metrics: Mapping[str, float], names: Sequence[str]) -> float:
    """The mean of some metrics; NaN if one is missing, or without names."""
    values = [metrics.get(name, math.nan) for name in names]
    return sum(values) / len(values) if values else math.nan


@dataclass(frozen=True)
class Rule:
    """Of points that lose at most ``allow`` of the mean of ``general``, the one with the best mean of ``domain``.

    The loss is that against the point of alpha 0. Of equal points, the one with the better general mean and then the
    one of the smaller alpha is chosen.
    """

    domain: Sequence[str]
    general: Sequence[str] = ()
    allow: float = 0.005

    def __post_init__(self) -> None:
        if both := set(self.domain) & set(self.general):
            raise UserError(f"{min(both)} is a metric of the domain and a general one. Name it once.")

    def choose(self, points: Sequence[Point]) -> Point:
        """Raises UserError without a point of alpha 0, or if a metric is missing of it."""
        start = next((point for point in points if point.alpha == 0), None)
        if start is None:
            raise UserError("the metrics of alpha 0, with which others are compared, are missing.")
        for name in (*self.domain, *self.general):
            if not math.isfinite(start.metrics.get(name, math.nan)):
                raise UserError(f"{name} has no value for the first model; see the set's line above.")
        least = mean(start.metrics, self.general) - self.allow - 1e-9
        kept: dict[tuple[float, float, float], Point] = {}
        for point in points:
            domain, general = mean(point.metrics, self.domain), mean(point.metrics, self.general)
            if math.isfinite(domain) and (not self.general or general >= least):
                kept[domain, general if self.general else 0.0, -point.alpha] = point
        return kept[max(kept)]

    def means(self, metrics: Mapping[str, float]) -> str:
        """The means of metrics in a short line: ``domain 71.20 %, general 65.00 %``."""
        names = {"domain": self.domain} | ({"general": self.general} if self.general else {})
        return ", ".join(f"{name} {100 * mean(metrics, of):.2f} %" for name, of in names.items())

    def describe(self) -> str:
        """The rule in one sentence."""
        domain = ", ".join(self.domain)
        if not self.general:
            return f"best {domain}"
        return f"best {domain} that loses at most {100 * self.allow:g} points of the mean of {', '.join(self.general)}"
