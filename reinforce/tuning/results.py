"""Results of a search: the state of its trials, the best value and plateau of each curve, tables, and a picture.

Each trial's folder holds the output of an ordinary training, from which the trial's state is read. ``trial.json``
identifies the training run, ``log.jsonl`` holds the evaluations so far, ``results.json`` exists once it is finished,
``stopped.json`` once it was stopped early. A search keeps no other state.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import yaml
from rich.table import Table

from reinforce import reports
from reinforce.errors import UserError
from reinforce.storage import Storage
from reinforce.student.config import READING, StudentConfig
from reinforce.training.checkpoints import CheckpointFolder
from reinforce.training.config import describe_changes, make_job
from reinforce.training.log import read_rows
from reinforce.training.results import read_results
from reinforce.tuning.config import LAMBDA, Setting, Trial
from reinforce.tuning.screening import MEASURES, SubsetScreening, TeacherScreening, search_fault

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TRIAL, _STOPPED = "trial.json", "stopped.json"
_LABELS = {
    "entropy": "entropy / log B",
    "true_pair": "probability of the true pair",
    "agreement": "agreement of the teachers",
    "calibration": "calibration loss / its maximum",
}
_GREY = "#6b7280"


@dataclass(frozen=True)
class TrialOutcome:
    """State of a trial.

    ``curve`` holds (step, metric) of its evaluations; ``continued`` is whether it took steps after the last of them.
    ``error`` is why it failed in this search; a failed trial is retried by the next one.
    """

    state: Literal["open", "finished", "stopped"]
    curve: Sequence[tuple[int, float]] = ()
    continued: bool = False
    seconds: float = 0.0
    error: str | None = None

    @property
    def value(self) -> float | None:
        """The final metric, that of the exported weights; None unless the trial is finished."""
        return self.curve[-1][1] if self.curve and self.state == "finished" else None


def begin_trial(config: StudentConfig, steps: int) -> None:
    """Record the training run in its folder. Raises UserError if the folder holds another training run."""
    store = Storage(config.output)
    now: dict[str, Any] = {"train.steps": steps, **make_job(config, (), READING).fixed_config}
    now = json.loads(json.dumps(now))
    then = store.read_json(_TRIAL)
    if then is None:
        store.write_json(now, _TRIAL)
    elif changed := describe_changes(then, now):
        raise UserError(
            f"{store.url} holds a trial of another training:\n  " + "\n  ".join(changed) + "\n"
            "Write to another `output`, restore these values, or delete the folder to train it again."
        )


def read_outcome(config: StudentConfig, steps: int, metric: str) -> TrialOutcome:
    """Read a trial's state from its folder. A trial that was stopped by another metric is open again."""
    store = Storage(config.output)
    store.fs.invalidate_cache(store.root)  # a worker may have written there since
    values = {row["step"]: row["metrics"].get(metric) for row in read_rows(store) if "metrics" in row}
    curve = sorted((at, value) for at, value in values.items() if value is not None)
    results = read_results(store)
    if results is not None and results.steps == steps and curve and curve[-1][0] == steps:
        return TrialOutcome("finished", curve, seconds=results.seconds)
    stopped = store.read_json(_STOPPED)
    if stopped is not None and stopped["metric"] == metric:
        return TrialOutcome("stopped", [point for point in curve if point[0] <= stopped["step"]])
    latest = max(CheckpointFolder(store, 1).steps(), default=0)
    return TrialOutcome("open", curve, continued=bool(curve) and latest > curve[-1][0])


def mark_stopped(config: StudentConfig, metric: str, step: int, value: float) -> None:
    """Record that a trial was stopped early, and at which evaluation."""
    Storage(config.output).write_json({"metric": metric, "step": step, "value": value, "by": "ASHA"}, _STOPPED)


@dataclass(frozen=True)
class SettingResult:
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
    rows: Sequence[tuple[float, SettingResult]]
    best: float | None
    plateau: Plateau | None

    @property
    def neighbours(self) -> list[SettingResult]:
        """The rows on both sides of the plateau, or of the best where no plateau is known."""
        if self.best is None:
            return []
        low, high = (self.best, self.best) if self.plateau is None else (self.plateau.low, self.plateau.high)
        below = [row for value, row in self.rows if value < low]
        above = [row for value, row in self.rows if value > high]
        return below[-1:] + above[:1]

    @property
    def edge(self) -> str | None:
        """What to do where the best value is the lowest or the highest that was tried; else None."""
        if self.best is None or (self.axis == LAMBDA and self.best in (0, 1)):  # there is no lambda beyond
            return None
        for place, which, others in ((0, "lowest", "lower"), (-1, "highest", "higher")):
            if self.best == self.rows[place][0]:
                return f"the best value is the {which} that was tried, {self.best:g}: try {others} ones, too"
        return None

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


def make_rows(outcomes: Mapping[Trial, TrialOutcome], seeds: Sequence[int]) -> list[SettingResult]:
    """Return one row for each setting, in order."""
    by_setting: dict[str, dict[int, TrialOutcome]] = {}
    settings: dict[str, Setting] = {}
    for trial, outcome in outcomes.items():
        key = f"{trial.setting.curve}: {trial.setting.name}"
        settings[key] = trial.setting
        by_setting.setdefault(key, {})[trial.seed] = outcome
    rows = []
    for key, by_seed in by_setting.items():
        values = {seed: outcome.value for seed, outcome in by_seed.items() if outcome.value is not None}
        errors = [outcome.error for outcome in by_seed.values() if outcome.error]
        finished = set(values) == set(seeds)
        state: Literal["finished", "stopped", "failed"] = "finished" if finished else "failed" if errors else "stopped"
        first = next(iter(by_seed.values())).curve
        last_step, last_value = first[-1] if first else (0, None)
        rows.append(SettingResult(settings[key], state, values, last_step, last_value, errors[0] if errors else None))
    return rows


def make_curves(rows: Sequence[SettingResult]) -> list[Curve]:
    """Return one curve for each teacher, and for lambda, of which several values were tried."""
    curves = []
    for name in dict.fromkeys(row.setting.curve for row in rows):
        of_curve = [row for row in rows if row.setting.curve == name]
        # the standard error of a finished setting's mean: pooled deviation / sqrt(seeds)
        finished = [row for row in of_curve if row.mean is not None and row.deviation is not None]
        noise = None
        if finished:
            pooled = math.sqrt(float(np.mean([(row.deviation or 0.0) ** 2 for row in finished])))
            noise = pooled / math.sqrt(len(finished[0].values))
        for axis in of_curve[0].setting.values:
            values = sorted({row.setting.values[axis] for row in of_curve})
            if len(values) > 1:
                by_value = []  # the best finished setting at each value, else the one that was trained the furthest
                for value in values:
                    there = [row for row in of_curve if row.setting.values[axis] == value]
                    reached = [(r.mean is not None, r.mean or 0.0, r.last_step, r.last_value or 0.0) for r in there]
                    by_value.append((value, there[reached.index(max(reached))]))
                curves.append(_make_curve(axis, by_value, noise))
    return curves


def best_row(rows: Sequence[SettingResult], curve: str) -> SettingResult | None:
    """Return the finished setting of a curve with the highest mean; the first among equals."""
    finished = [row for row in rows if row.setting.curve == curve and row.mean is not None]
    return max(finished, key=lambda row: row.mean or 0.0, default=None)


def _make_curve(axis: str, rows: Sequence[tuple[float, SettingResult]], noise: float | None) -> Curve:
    means = [row.mean for _, row in rows]
    finished = [(mean, index) for index, mean in enumerate(means) if mean is not None]
    if not finished:
        return Curve(axis, rows, None, None)
    top, best = max(finished, key=lambda pair: (pair[0], -pair[1]))
    if noise is None:
        return Curve(axis, rows, rows[best][0], None)
    within = [mean is not None and mean >= top - noise for mean in means]
    low = high = best
    while low > 0 and within[low - 1]:
        low -= 1
    while high + 1 < len(rows) and within[high + 1]:
        high += 1
    unknown = []
    if low > 0 and means[low - 1] is None:
        unknown.append("below")
    if high + 1 < len(rows) and means[high + 1] is None:
        unknown.append("above")
    return Curve(axis, rows, rows[best][0], Plateau(rows[low][0], rows[high][0], noise, unknown))


def results_table(rows: Sequence[SettingResult], metric: str) -> Table:
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


def subsets_table(subsets: SubsetScreening) -> Table:
    """Return a table with one line for each subset of the teachers, that of the highest likelihood first."""
    table = Table(
        "teachers", "log-likelihood", "entropy", "agreement", "accuracy", "alone right",
        title="Subsets of the teachers, without training", title_justify="left",
    )  # fmt: skip
    for subset in subsets.subsets:
        agreement = "-" if subset.agreement is None else f"{subset.agreement:.1%}"
        alone = "" if subset.alone is None else f"{subset.alone:.1%}"
        numbers = (f"{subset.likelihood:.3f}", f"{subset.entropy:.3f}", agreement, f"{subset.accuracy:.1%}", alone)
        table.add_row(", ".join(subset.teachers), *numbers)
    return table


def subsets_lines(subsets: SubsetScreening) -> list[str]:
    """What to set for the subset of the highest likelihood, and a line for each teacher that is left out."""
    lines = [f"subsets of the teachers: {name} is left out, it {why}" for name, why in subsets.left_out.items()]
    if subsets.subsets:
        best = subsets.subsets[0]
        scales = {name: subsets.scales[name] for name in best.teachers}
        keys = {"data.teachers": [*best.teachers], "loss.logit_scales": scales}
        text = yaml.safe_dump(keys, default_flow_style=True, sort_keys=False, width=math.inf).strip()[1:-1]
        lines.append(f"best subset of the teachers, expected log-likelihood {best.likelihood:.3f}: set {text}")
    return lines


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


def draw(
    curves: Sequence[Curve],
    screenings: Mapping[str, TeacherScreening],
    checks: Mapping[str, ScreeningCheck],
    metric: str,
    url: str,
) -> None:
    """Write a PNG to a path or URL: one column for each curve, and for each teacher that was only screened.

    Nothing is written where there is nothing to draw, and, with a note, without matplotlib.
    """
    if not (curves or screenings) or not reports.drawable(f"{url} is"):
        return
    columns: list[tuple[str, Curve | None]] = [(curve.axis, curve) for curve in curves]
    drawn = {axis for axis, _ in columns}
    columns += [(teacher, None) for teacher in screenings if teacher not in drawn]
    upper, lower = bool(curves), bool(screenings)
    rows = upper + lower
    figure, axes = reports.figure(
        len(columns) * rows, width=max(6.0, 5.2 * len(columns)), height=3.9 * rows, columns=len(columns)
    )
    for number, (axis, curve) in enumerate(columns):
        screening = screenings.get(axis)
        if curve is not None:
            _draw_curve(axes[number], curve, metric, screening, number)
        elif upper:
            axes[number].set_axis_off()
        if lower:
            panel = axes[number + len(columns) * upper]
            if screening is None:
                panel.set_axis_off()
                continue
            _draw_screening(panel, axis, screening, checks.get(axis))
            if curve is not None:
                panel.set_xlim(axes[number].get_xlim())
    reports.save(figure, url)


def _draw_curve(panel: Axes, curve: Curve, metric: str, screening: TeacherScreening | None, number: int) -> None:
    colour = reports.colour(number)
    _label_axes(panel, curve.axis, metric, [value for value, _ in curve.rows])
    if curve.plateau is not None and curve.plateau.low < curve.plateau.high:
        low, high = curve.plateau.low, curve.plateau.high
        panel.axvspan(low, high, color=colour, alpha=0.12, linewidth=0, label=f"plateau {low:g} to {high:g}")
    finished = [(value, row) for value, row in curve.rows if row.mean is not None]
    stopped = [(value, row) for value, row in curve.rows if row.mean is None and row.last_value is not None]
    if finished:
        values, means = zip(*[(value, row.mean) for value, row in finished], strict=True)
        errors = [row.deviation or 0.0 for _, row in finished]
        seeds = len(finished[0][1].values)
        label = f"mean and deviation of {seeds} seeds" if seeds > 1 else "one seed"
        panel.errorbar(values, means, yerr=errors, color=colour, marker="o", markersize=4, capsize=3, label=label)
        for value, row in finished:
            panel.plot(
                [value] * len(row.values), list(row.values.values()), ".", color=colour, alpha=0.45, markersize=4
            )
    if stopped:
        values, lasts = zip(*[(value, row.last_value) for value, row in stopped], strict=True)
        panel.plot(
            values, lasts, "o", markerfacecolor="none", color=_GREY, markersize=5, label="stopped early, last value"
        )
        for value, row in stopped:
            panel.annotate(
                f"step {row.last_step:,}", (value, row.last_value or 0.0), (0, -12), textcoords="offset points",
                ha="center", fontsize=7, color=_GREY,
            )  # fmt: skip
    if screening is not None:
        found = "most likely" if screening.fault is None else "search ended at"
        _mark_most_likely(panel, screening, f"{found}: {screening.calibrated:g}")
    if curve.best is not None:
        panel.axvline(curve.best, color=colour, linestyle="--", linewidth=1, label=f"best: {curve.best:g}")
    low, high = panel.get_ylim()
    panel.set_ylim(low - 0.1 * (high - low), high + 0.45 * (high - low))  # room for the legend
    panel.legend(frameon=False, fontsize=8, loc="upper left")


def _mark_most_likely(panel: Axes, screening: TeacherScreening, label: str | None = None) -> None:
    """Draw a line at the most likely scale; only a legend entry if it is far outside the tried scales."""
    scales = [measured.scale for measured in screening.scales]
    if min(scales) / 1.5 <= screening.calibrated <= max(scales) * 1.5:
        panel.axvline(screening.calibrated, color=_GREY, linestyle=":", label=label)
    elif label is not None:
        panel.plot([], [], color=_GREY, linestyle=":", label=f"{label}, out of range")


def _draw_screening(panel: Axes, axis: str, screening: TeacherScreening, check: ScreeningCheck | None) -> None:
    scales = [measured.scale for measured in screening.scales]
    _label_axes(panel, f"{axis}: screening without training", "share", scales)
    for number, (measure, label) in enumerate(_LABELS.items()):
        numbers = screening.curve(measure)
        known = [number for number in numbers if number is not None]
        if len(known) < len(numbers):
            continue
        highest = max(known) if measure == "calibration" else 1.0
        rank = check.ranks[measure] if check is not None else None
        text = label if rank is None else f"{label}, rank correlation {rank:+.2f}"
        points = [number / highest for number in known]
        panel.plot(scales, points, color=reports.colour(number + 1), marker="o", markersize=3, label=text)
    _mark_most_likely(panel, screening)
    panel.set_ylim(0, 1.35)  # room for the legend
    panel.set_yticks([0, 0.25, 0.5, 0.75, 1])
    panel.legend(frameon=False, fontsize=8, loc="upper left")


def _label_axes(panel: Axes, title: str, y: str, values: Sequence[float]) -> None:
    from matplotlib.ticker import NullLocator

    reports.label(panel, title, "lambda" if title == LAMBDA else "logit scale", y)
    if title != LAMBDA:
        panel.set_xscale("log")
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_xticks(values, [f"{value:g}" for value in values])
