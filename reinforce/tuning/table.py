"""What came of the trials: means and spreads of settings, the best of each curve, and its plateau."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from reinforce.tuning.space import Setting, Trial
from reinforce.tuning.trials import Outcome


@dataclass(frozen=True)
class Row:
    """A setting. ``values`` are the metric by seed at the end of training; ``reached`` the last step of any of its
    trials, and ``last`` the metric there, of the first seed."""

    setting: Setting
    state: Literal["finished", "stopped", "failed"]
    values: Mapping[int, float]
    reached: int
    last: float | None
    fault: str | None = None

    @property
    def mean(self) -> float | None:
        """Of a setting that is finished with every seed: others would be compared by luck."""
        return float(np.mean(list(self.values.values()))) if self.state == "finished" else None

    @property
    def deviation(self) -> float | None:
        """Over seeds, from two on."""
        return float(np.std(list(self.values.values()), ddof=1)) if len(self.values) > 1 else None

    def json(self) -> dict[str, Any]:
        return {
            "curve": self.setting.curve,
            **self.setting.values,
            "state": self.state,
            "mean": self.mean,
            "deviation": self.deviation,
            "values": {str(seed): value for seed, value in self.values.items()},
            "reached": self.reached,
            "last": self.last,
            **({"fault": self.fault} if self.fault else {}),
        }


@dataclass(frozen=True)
class Plateau:
    """Values next to one another, around the best, whose mean is within ``width`` of it.

    ``width`` is one standard error of a mean over the seeds, by the deviations of all finished settings together.
    ``unknown`` names the sides where the next value was not trained to the end: it may be wider there.
    """

    low: float
    high: float
    width: float
    unknown: Sequence[str]


@dataclass(frozen=True)
class Curve:
    """The metric against one thing that was tried, ``axis`` (a teacher's scale, or lambda).

    With several things at once, ``rows`` hold the best setting at each value.
    """

    axis: str
    rows: Sequence[tuple[float, Row]]
    best: float | None
    plateau: Plateau | None

    @property
    def neighbours(self) -> list[Row]:
        """What stands next to the plateau, or to the best alone where no plateau is known."""
        if self.best is None:
            return []
        low, high = (self.best, self.best) if self.plateau is None else (self.plateau.low, self.plateau.high)
        below = [row for value, row in self.rows if value < low]
        above = [row for value, row in self.rows if value > high]
        return below[-1:] + above[:1]

    def text(self) -> str:
        """The plateau by name."""
        if self.best is None:
            return f"{self.axis}: no value was trained to the end with every seed"
        means = {value: row.mean for value, row in self.rows}
        told = f"{self.axis}: best at {self.best:g} ({means[self.best]:.4f})"
        if self.plateau is None:
            return told + ", no plateau is known: it takes two seeds or more to tell the noise"
        low, high, width = self.plateau.low, self.plateau.high, self.plateau.width
        told += f", plateau {low:g} to {high:g}" if low < high else ", no neighbour is as good"
        told += f" (within {width:.4f}, one standard error)"
        if self.plateau.unknown:
            told += f"; the value {' and '.join(self.plateau.unknown)} it was not trained to the end"
        return told


def rows_of(outcomes: Mapping[Trial, Outcome], seeds: Sequence[int]) -> list[Row]:
    """A row for each setting, in order."""
    found: dict[str, dict[int, Outcome]] = {}
    settings: dict[str, Setting] = {}
    for trial, outcome in outcomes.items():
        key = f"{trial.setting.curve}: {trial.setting.name}"
        settings[key] = trial.setting
        found.setdefault(key, {})[trial.seed] = outcome
    return [_row(settings[key], of_seeds, seeds) for key, of_seeds in found.items()]


def _row(setting: Setting, outcomes: Mapping[int, Outcome], seeds: Sequence[int]) -> Row:
    values = {seed: o.value for seed, o in outcomes.items() if o.value is not None}
    faults = [outcome.fault for outcome in outcomes.values() if outcome.fault]
    finished = set(values) == set(seeds)
    state: Literal["finished", "stopped", "failed"] = "finished" if finished else "failed" if faults else "stopped"
    first = next(iter(outcomes.values())).curve
    reached, last = first[-1] if first else (0, None)
    return Row(setting, state, values, reached, last, faults[0] if faults else None)


def curves_of(rows: Sequence[Row]) -> list[Curve]:
    """A curve for each thing of which several values were tried."""
    curves = []
    for name in dict.fromkeys(row.setting.curve for row in rows):
        of_curve = [row for row in rows if row.setting.curve == name]
        noise = _noise(of_curve)
        for axis in of_curve[0].setting.values:
            values = sorted({row.setting.values[axis] for row in of_curve})
            if len(values) > 1:
                best_at = [(v, _best([row for row in of_curve if row.setting.values[axis] == v])) for v in values]
                curves.append(_curve(axis, best_at, noise))
    return curves


def best_of(rows: Sequence[Row], curve: str) -> Row | None:
    """The finished setting with the highest mean; the first among equals."""
    finished = [row for row in rows if row.setting.curve == curve and row.mean is not None]
    return max(finished, key=lambda row: row.mean or 0.0, default=None)


def _best(rows: Sequence[Row]) -> Row:
    """At one value of an axis: the best finished setting, else the one that came furthest."""
    return max(rows, key=lambda row: (row.mean is not None, row.mean or 0.0, row.reached, row.last or 0.0))


def _noise(rows: Sequence[Row]) -> float | None:
    """The standard error of a finished setting's mean."""
    pairs = [(row.deviation, len(row.values)) for row in rows if row.mean is not None]
    known = [(deviation, count) for deviation, count in pairs if deviation is not None]
    if not known:
        return None
    pooled = math.sqrt(float(np.mean([deviation**2 for deviation, _ in known])))
    return pooled / math.sqrt(known[0][1])


def _curve(axis: str, rows: Sequence[tuple[float, Row]], noise: float | None) -> Curve:
    means = [row.mean for _, row in rows]
    finished = [(mean, place) for place, mean in enumerate(means) if mean is not None]
    if not finished:
        return Curve(axis, rows, None, None)
    top, place = max(finished, key=lambda pair: (pair[0], -pair[1]))
    if noise is None:
        return Curve(axis, rows, rows[place][0], None)

    def reaches(at: int) -> bool:
        mean = means[at]
        return mean is not None and mean >= top - noise

    low = high = place
    while low > 0 and reaches(low - 1):
        low -= 1
    while high + 1 < len(rows) and reaches(high + 1):
        high += 1
    unknown = []
    if low > 0 and means[low - 1] is None:
        unknown.append("below")
    if high + 1 < len(rows) and means[high + 1] is None:
        unknown.append("above")
    return Curve(axis, rows, rows[place][0], Plateau(rows[low][0], rows[high][0], noise, unknown))
