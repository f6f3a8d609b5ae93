"""Rank correlation between the screening's measures and the metric of the trained students."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from reinforce.tuning.results import Curve
from reinforce.tuning.screening import MEASURES, TeacherScreening


@dataclass(frozen=True)
class ScreeningCheck:
    """How well the screening of one teacher agrees with training.

    ``correlations`` are Spearman's rank correlations of each measure with the metric over ``count`` scales: at the end
    of training (``step`` is None), or, where trials were stopped early, at the last ``step`` that all of them reached,
    first seed only. ``calibrated`` is the most likely scale by the screening, ``nearest`` the tried scale closest to it
    in ratio, and ``gap`` the metric of ``best`` minus that of ``nearest``; None if ``nearest`` was not trained to the
    end.
    """

    correlations: dict[str, float | None]
    count: int
    step: int | None
    calibrated: float
    best: float | None
    nearest: float
    gap: float | None

    def json(self) -> dict[str, Any]:
        return {
            "ranks": self.correlations,
            "count": self.count,
            "step": self.step,
            "calibrated": self.calibrated,
            "best": self.best,
            "nearest": self.nearest,
            "lost": self.gap,
        }

    def describe(self, teacher: str) -> str:
        when = "at the end" if self.step is None else f"at step {self.step:,}, which all trials reached"
        ranks = ", ".join(f"{name} {'-' if r is None else f'{r:+.2f}'}" for name, r in self.correlations.items())
        text = f"screening of {teacher}: rank correlation with the metric over {self.count} scales {when}: {ranks}; "
        text += f"most likely scale {self.calibrated:g}"
        if self.best is not None:
            text += f", best {self.best:g}"
            gap = "was not trained to the end" if self.gap is None else f"is {self.gap:.4f} below the best"
            text += f"; {self.nearest:g}, the nearest value tried, {gap}"
        return text


def check_screening(
    curve: Curve, screening: TeacherScreening, curves_by_step: Sequence[dict[int, float]]
) -> ScreeningCheck:
    """Compare a screening with a curve. ``curves_by_step``: first seed's metric by step, for each value in order."""
    means = [row.mean for _, row in curve.rows]
    step = None
    accuracies: list[float] = [mean for mean in means if mean is not None]
    if len(accuracies) < len(means):
        shared = set.intersection(*(set(by_step) for by_step in curves_by_step)) if curves_by_step else set()
        step = max(shared, default=0)
        accuracies = [by_step[step] for by_step in curves_by_step] if shared else []
    values = [value for value, _ in curve.rows]
    by_scale = {measured.scale: measured for measured in screening.scales}
    correlations: dict[str, float | None] = {}
    for measure in MEASURES:
        numbers = [getattr(by_scale[value], measure) for value in values]
        comparable = accuracies and None not in numbers
        correlations[measure] = spearman(numbers, accuracies) if comparable else None
    nearest = min(range(len(values)), key=lambda i: abs(np.log(values[i] / screening.calibrated)))
    mean, top = means[nearest], max((m for m in means if m is not None), default=None)
    gap = None if mean is None or top is None else top - mean
    return ScreeningCheck(correlations, len(values), step, screening.calibrated, curve.best, values[nearest], gap)


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation, with mean ranks for ties; None if either sequence is constant."""
    correlation = pd.DataFrame({"first": first, "second": second}).corr("spearman").loc["first", "second"]
    return None if pd.isna(correlation) else float(correlation)
