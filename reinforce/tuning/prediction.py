"""How well the screening foretold what training found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from reinforce.tuning.screening import MEASURES, Screened
from reinforce.tuning.table import Curve


@dataclass(frozen=True)
class Prediction:
    """Of one teacher. ``ranks`` are Spearman's correlations over ``count`` scales of each measure with the metric,
    at the end of training, or, where some were stopped early, at the last ``step`` that all of them reached (first
    seed alone). ``calibrated`` is the most likely scale, ``lost`` what the tried scale next to it (in ratio) falls
    short of the best, None where it was not trained to the end.
    """

    ranks: dict[str, float | None]
    count: int
    step: int | None
    calibrated: float
    best: float | None
    nearest: float
    lost: float | None

    def json(self) -> dict[str, Any]:
        return asdict(self)

    def text(self, teacher: str) -> str:
        when = "at the end" if self.step is None else f"at step {self.step:,}, which all reached"
        ranks = ", ".join(f"{name} {'-' if r is None else f'{r:+.2f}'}" for name, r in self.ranks.items())
        told = f"screening of {teacher}: rank correlation with the metric over {self.count} scales {when}: {ranks}; "
        told += f"most likely scale {self.calibrated:g}"
        if self.best is not None:
            told += f", best {self.best:g}"
            short = "was not trained to the end" if self.lost is None else f"is {self.lost:.4f} below the best"
            told += f"; {self.nearest:g}, the value next to it, {short}"
        return told


def predict(curve: Curve, screened: Screened, curves_by_step: Sequence[dict[int, float]]) -> Prediction:
    """``curves_by_step`` are the first seed's evaluations at each of the curve's values, in order."""
    means = [row.mean for _, row in curve.rows]
    step = None
    accuracies: list[float] = [mean for mean in means if mean is not None]
    if len(accuracies) < len(means):
        shared = set.intersection(*(set(by_step) for by_step in curves_by_step)) if curves_by_step else set()
        step = max(shared, default=0)
        accuracies = [by_step[step] for by_step in curves_by_step] if shared else []
    values = [value for value, _ in curve.rows]
    at = {measured.scale: measured for measured in screened.scales}
    ranks: dict[str, float | None] = {}
    for measure in MEASURES:
        numbers = [getattr(at[value], measure) for value in values]
        known = accuracies and None not in numbers
        ranks[measure] = spearman(numbers, accuracies) if known else None
    nearest = min(range(len(values)), key=lambda i: abs(np.log(values[i] / screened.calibrated)))
    mean, top = means[nearest], max((m for m in means if m is not None), default=None)
    lost = None if mean is None or top is None else top - mean
    return Prediction(ranks, len(values), step, screened.calibrated, curve.best, values[nearest], lost)


def spearman(one: Sequence[float], two: Sequence[float]) -> float | None:
    """Rank correlation, with mean ranks for ties; None where one of both does not vary."""
    ranks = [_ranks(np.asarray(values, np.float64)) for values in (one, two)]
    deviations = [r - r.mean() for r in ranks]
    scale = np.sqrt((deviations[0] ** 2).sum() * (deviations[1] ** 2).sum())
    return float((deviations[0] * deviations[1]).sum() / scale) if scale > 0 else None


def _ranks(values: np.ndarray) -> np.ndarray:
    return np.array([(values < value).sum() + ((values == value).sum() - 1) / 2 for value in values])
