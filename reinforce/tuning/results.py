"""Results of the trials: settings, the best value and plateau of each curve, tables, and how the screening agrees."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from rich.table import Table

from reinforce.tuning.screening import MEASURES, TeacherScreening, search_fault
from reinforce.tuning.space import Setting, Trial
from reinforce.tuning.trials import Outcome


@dataclass(frozen=True)
class Row:
    """Result of a setting.

    ``values`` is the final metric by seed; ``last_step`` the last evaluated step of the first seed's trial, and
    ``last_value`` the metric there.
    """

    setting: Setting
    state: Literal["finished", "stopped", "failed"]
    values: Mapping[int, float]
    last_step: int
    last_value: float | None
    error: str | None = None

    @property
    def mean(self) -> float | None:
        """Mean over the seeds; None unless every seed is finished, since fewer seeds would not be comparable."""
        return float(np.mean(list(self.values.values()))) if self.state == "finished" else None

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation over the seeds; None for fewer than two."""
        return float(np.std(list(self.values.values()), ddof=1)) if len(self.values) > 1 else None

    def json(self) -> dict[str, Any]:
        return {
            "curve": self.setting.curve,
            **self.setting.values,
            "state": self.state,
            "mean": self.mean,
            "deviation": self.deviation,
            "values": {str(seed): value for seed, value in self.values.items()},
            "reached": self.last_step,
            "last": self.last_value,
            **({"fault": self.error} if self.error else {}),
        }


@dataclass(frozen=True)
class Plateau:
    """Adjacent values around the best whose mean is within ``width`` of it.

    ``width`` is one standard error of a mean over the seeds, from the pooled deviations of all finished settings.
    ``unknown`` names the sides ("below", "above") where the next value was not trained to the end, so that the plateau
    may be wider there.
    """

    low: float
    high: float
    width: float
    unknown: Sequence[str]


@dataclass(frozen=True)
class Curve:
    """The metric as a function of one tuned value, ``axis`` (a teacher's name, or LAMBDA).

    Where several values vary together, ``rows`` hold the best setting for each value of the axis.
    """

    axis: str
    rows: Sequence[tuple[float, Row]]
    best: float | None
    plateau: Plateau | None

    @property
    def neighbours(self) -> list[Row]:
        """The rows on both sides of the plateau, or of the best where no plateau is known."""
        if self.best is None:
            return []
        low, high = (self.best, self.best) if self.plateau is None else (self.plateau.low, self.plateau.high)
        below = [row for value, row in self.rows if value < low]
        above = [row for value, row in self.rows if value > high]
        return below[-1:] + above[:1]

    def describe(self) -> str:
        """Return the best value and the plateau as one line."""
        if self.best is None:
            return f"{self.axis}: no value was trained to the end with every seed"
        means = {value: row.mean for value, row in self.rows}
        text = f"{self.axis}: best at {self.best:g} ({means[self.best]:.4f})"
        if self.plateau is None:
            return text + ", plateau unknown: at least two seeds are needed to estimate the noise"
        low, high, width = self.plateau.low, self.plateau.high, self.plateau.width
        text += f", plateau {low:g} to {high:g}" if low < high else ", no neighbour is as good"
        text += f" (within {width:.4f}, one standard error)"
        if self.plateau.unknown:
            text += f"; the value {' and '.join(self.plateau.unknown)} it was not trained to the end"
        return text


def make_rows(outcomes: Mapping[Trial, Outcome], seeds: Sequence[int]) -> list[Row]:
    """Return one row for each setting, in order."""
    by_setting: dict[str, dict[int, Outcome]] = {}
    settings: dict[str, Setting] = {}
    for trial, outcome in outcomes.items():
        key = f"{trial.setting.curve}: {trial.setting.name}"
        settings[key] = trial.setting
        by_setting.setdefault(key, {})[trial.seed] = outcome
    return [_make_row(settings[key], by_seed, seeds) for key, by_seed in by_setting.items()]


def _make_row(setting: Setting, outcomes: Mapping[int, Outcome], seeds: Sequence[int]) -> Row:
    values = {seed: o.value for seed, o in outcomes.items() if o.value is not None}
    errors = [outcome.error for outcome in outcomes.values() if outcome.error]
    finished = set(values) == set(seeds)
    state: Literal["finished", "stopped", "failed"] = "finished" if finished else "failed" if errors else "stopped"
    first = next(iter(outcomes.values())).curve
    last_step, last_value = first[-1] if first else (0, None)
    return Row(setting, state, values, last_step, last_value, errors[0] if errors else None)


def make_curves(rows: Sequence[Row]) -> list[Curve]:
    """Return one curve for each teacher, and for lambda, of which several values were tried."""
    curves = []
    for name in dict.fromkeys(row.setting.curve for row in rows):
        of_curve = [row for row in rows if row.setting.curve == name]
        noise = _standard_error(of_curve)
        for axis in of_curve[0].setting.values:
            values = sorted({row.setting.values[axis] for row in of_curve})
            if len(values) > 1:
                by_value = [(v, _best_at([row for row in of_curve if row.setting.values[axis] == v])) for v in values]
                curves.append(_make_curve(axis, by_value, noise))
    return curves


def best_row(rows: Sequence[Row], curve: str) -> Row | None:
    """Return the finished setting of a curve with the highest mean; the first among equals."""
    finished = [row for row in rows if row.setting.curve == curve and row.mean is not None]
    return max(finished, key=lambda row: row.mean or 0.0, default=None)


def _best_at(rows: Sequence[Row]) -> Row:
    """Return the best finished setting at one value of an axis, else the one that was trained the furthest."""
    return max(rows, key=lambda row: (row.mean is not None, row.mean or 0.0, row.last_step, row.last_value or 0.0))


def _standard_error(rows: Sequence[Row]) -> float | None:
    """Return the standard error of a finished setting's mean: pooled deviation / sqrt(seeds)."""
    pairs = [(row.deviation, len(row.values)) for row in rows if row.mean is not None]
    known = [(deviation, count) for deviation, count in pairs if deviation is not None]
    if not known:
        return None
    pooled = math.sqrt(float(np.mean([deviation**2 for deviation, _ in known])))
    return pooled / math.sqrt(known[0][1])


def _make_curve(axis: str, rows: Sequence[tuple[float, Row]], noise: float | None) -> Curve:
    means = [row.mean for _, row in rows]
    finished = [(mean, index) for index, mean in enumerate(means) if mean is not None]
    if not finished:
        return Curve(axis, rows, None, None)
    top, best = max(finished, key=lambda pair: (pair[0], -pair[1]))
    if noise is None:
        return Curve(axis, rows, rows[best][0], None)

    def is_within_noise(index: int) -> bool:
        mean = means[index]
        return mean is not None and mean >= top - noise

    low = high = best
    while low > 0 and is_within_noise(low - 1):
        low -= 1
    while high + 1 < len(rows) and is_within_noise(high + 1):
        high += 1
    unknown = []
    if low > 0 and means[low - 1] is None:
        unknown.append("below")
    if high + 1 < len(rows) and means[high + 1] is None:
        unknown.append("above")
    return Curve(axis, rows, rows[best][0], Plateau(rows[low][0], rows[high][0], noise, unknown))


def results_table(rows: Sequence[Row], metric: str) -> Table:
    """Return a table with one line for each setting."""
    table = Table("curve", "setting", metric, "deviation", "seeds", "", title="Trials", title_justify="left")
    best = [best_row(rows, curve) for curve in dict.fromkeys(row.setting.curve for row in rows)]
    for row in rows:
        values = ", ".join(f"{name} {value:g}" for name, value in row.setting.values.items())
        if row.mean is not None:
            note = "best" if any(row is one for one in best) else ""
            deviation = "-" if row.deviation is None else f"{row.deviation:.4f}"
            table.add_row(row.setting.curve, values, f"{row.mean:.4f}", deviation, str(len(row.values)), note)
        elif row.state == "stopped":
            last = "-" if row.last_value is None else f"{row.last_value:.4f}"
            table.add_row(row.setting.curve, values, f"({last})", "", "", f"stopped at step {row.last_step:,}")
        else:
            table.add_row(row.setting.curve, values, "", "", str(len(row.values)), f"failed: {row.error}")
    return table


def screening_table(screenings: Mapping[str, TeacherScreening]) -> Table:
    """Return a table with one line for each scale; ``reinforce.tuning.screening`` defines the measures."""
    table = Table(
        "teacher", "logit scale", "entropy", "true pair", "calibration loss", "agreement", "",
        title="Screening without training", title_justify="left",
    )  # fmt: skip
    for teacher, screening in screenings.items():
        best = screening.calibrated
        nearest = min(screening.scales, key=lambda measured: max(measured.scale / best, best / measured.scale))
        for measured in screening.scales:
            agreement = "-" if measured.agreement is None else f"{measured.agreement:.3f}"
            found = "most likely" if screening.fault is None else "not found, search ended at"
            note = f"{found}: {best:g}" if measured is nearest else ""
            numbers = (f"{measured.entropy:.3f}", f"{measured.true_pair:.3f}", f"{measured.calibration:.3f}")
            table.add_row(teacher, f"{measured.scale:g}", *numbers, agreement, note)
    return table


def screening_lines(screenings: Mapping[str, TeacherScreening]) -> list[str]:
    """A line for each teacher whose most likely scale was not found."""
    return [f"screening of {name}: {one.fault}" for name, one in screenings.items() if one.fault]


@dataclass(frozen=True)
class ScreeningCheck:
    """Agreement of one teacher's screening with training.

    The field names are keys of table.json. ``ranks`` are Spearman's rank correlations of each measure with the metric
    over ``count`` scales: at the end of training (``step`` is None), or, where trials were stopped early, at the last
    ``step`` that all of them reached, first seed only. ``calibrated`` is the most likely scale by the screening,
    ``nearest`` the tried scale closest to it in ratio, and ``lost`` the metric of ``best`` minus that of ``nearest``;
    None if ``nearest`` was not trained to the end.
    """

    ranks: dict[str, float | None]
    count: int
    step: int | None
    calibrated: float
    best: float | None
    nearest: float
    lost: float | None

    def describe(self, teacher: str) -> str:
        when = "at the end" if self.step is None else f"at step {self.step:,}, which all trials reached"
        ranks = ", ".join(f"{name} {'-' if r is None else f'{r:+.2f}'}" for name, r in self.ranks.items())
        text = f"screening of {teacher}: rank correlation with the metric over {self.count} scales {when}: {ranks}; "
        found = (
            "most likely scale" if search_fault(self.calibrated) is None else "no most likely scale, search ended at"
        )
        text += f"{found} {self.calibrated:g}"
        if self.best is not None:
            text += f", best {self.best:g}"
            gap = "was not trained to the end" if self.lost is None else f"is {self.lost:.4f} below the best"
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
