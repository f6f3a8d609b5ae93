"""Plot of scales and lambda: the results of training in the upper row, the screening in the lower row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from reinforce import plots
from reinforce.tuning.results import Curve, ScreeningCheck
from reinforce.tuning.screening import TeacherScreening
from reinforce.tuning.space import LAMBDA

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LABELS = {
    "entropy": "entropy / log B",
    "true_pair": "probability of the true pair",
    "agreement": "agreement of the teachers",
    "calibration": "calibration loss / its maximum",
}
_GREY = "#6b7280"


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
    if not (curves or screenings) or not plots.drawable(f"{url} is"):
        return
    columns: list[tuple[str, Curve | None]] = [(curve.axis, curve) for curve in curves]
    drawn = {axis for axis, _ in columns}
    columns += [(teacher, None) for teacher in screenings if teacher not in drawn]
    upper, lower = bool(curves), bool(screenings)
    rows = upper + lower
    figure, axes = plots.figure(
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
    plots.save(figure, url)


def _draw_curve(panel: Axes, curve: Curve, metric: str, screening: TeacherScreening | None, number: int) -> None:
    colour = plots.colour(number)
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
        panel.plot(scales, points, color=plots.colour(number + 1), marker="o", markersize=3, label=text)
    _mark_most_likely(panel, screening)
    panel.set_ylim(0, 1.35)  # room for the legend
    panel.set_yticks([0, 0.25, 0.5, 0.75, 1])
    panel.legend(frameon=False, fontsize=8, loc="upper left")


def _label_axes(panel: Axes, title: str, y: str, values: Sequence[float]) -> None:
    from matplotlib.ticker import NullLocator

    plots.label(panel, title, "lambda" if title == LAMBDA else "logit scale", y)
    if title != LAMBDA:
        panel.set_xscale("log")
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_xticks(values, [f"{value:g}" for value in values])
