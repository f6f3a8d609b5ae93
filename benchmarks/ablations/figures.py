"""A figure for each question, with a dot for each seed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.ablations.measures import ALL_MEASURES, Measure
from benchmarks.ablations.results import Answer
from reinforce import reports

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_GREY = "#6b7280"


def draw(answer: Answer, path: Path) -> None:
    """Write a PNG with a panel for each measure in the question's ``panels``."""
    question = answer.question
    sweep = question.axis is not None
    height = 3.6 if sweep or answer.curves else 1.4 + 0.42 * len(question.arms)
    figure, axes = reports.figure(len(question.panels), width=3.3 * len(question.panels) + 1.0, height=height)
    for number, (panel, name) in enumerate(zip(axes, question.panels, strict=True)):
        if answer.curves:
            _draw_curves(panel, answer, name)
        elif sweep:
            _draw_sweep(panel, answer, name, number)
        else:
            _draw_rows(panel, answer, name, number)
    reports.save(figure, str(path))


def _draw_rows(panel: Axes, answer: Answer, name: str, number: int) -> None:
    """Draw one row for each arm."""
    arms = answer.question.arms
    for row, arm in enumerate(arms):
        values = _to_axis(ALL_MEASURES[name], answer.numbers[arm.label][name])
        panel.plot(values, [row] * len(values), ".", color=reports.colour(row), alpha=0.5, markersize=6)
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        panel.errorbar(statistics.fmean(values), row, xerr=spread, color=reports.colour(row), marker="o", capsize=3)
    panel.set_yticks(range(len(arms)), [arm.label if number == 0 else "" for arm in arms])
    panel.set_ylim(len(arms) - 0.5, -0.5)
    panel.set_xlim(left=0)
    panel.grid(axis="x", color="#e1e4e8", linewidth=0.8)
    reports.label(panel, ALL_MEASURES[name].title, _unit(ALL_MEASURES[name]), "")


def _draw_sweep(panel: Axes, answer: Answer, name: str, number: int) -> None:
    """Draw arms along an axis, and horizontal lines for arms without an ``x``."""
    from matplotlib.ticker import NullLocator

    question, measure, colour = answer.question, ALL_MEASURES[name], reports.colour(number)
    if question.log:
        panel.set_xscale("log")
    points = []
    for arm in question.arms:
        values = _to_axis(measure, answer.numbers[arm.label][name])
        mean, spread = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
        if arm.x is None:
            panel.axhline(mean, color=_GREY, linestyle="--", linewidth=1, label=arm.label)
        else:
            panel.plot([arm.x] * len(values), values, ".", color=colour, alpha=0.5, markersize=6)
            points.append((arm.x, mean, spread))
    places, means, spreads = zip(*points, strict=True)
    label = f"mean and deviation of {len(values)} seeds"
    panel.errorbar(places, means, yerr=spreads, color=colour, marker="o", markersize=4, capsize=3, label=label)
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_xticks(places, [f"{place:g}" for place in places])
    low, high = panel.get_ylim()
    panel.set_ylim(max(0.0, low), high + 0.25 * (high - low))  # room for the legend
    reports.label(panel, measure.title, question.axis or "", _unit(measure))
    reports.legend(panel)


def _draw_curves(panel: Axes, answer: Answer, name: str) -> None:
    """Draw a measure over steps: thin lines for seeds, a thick one for their mean, the target's end as a level."""
    for number, (label, curves) in enumerate(answer.curves.items()):
        colour = reports.colour(number)
        steps = [step for step, _ in curves[name][0]]
        seeds = [_to_axis(ALL_MEASURES[name], [value for _, value in curve]) for curve in curves[name]]
        for values in seeds:
            panel.plot(steps, values, color=colour, alpha=0.35, linewidth=0.8)
        means = [statistics.fmean(at) for at in zip(*seeds, strict=True)]
        panel.plot(steps, means, color=colour, marker="o", markersize=3, label=label)
        if label == answer.question.target:
            panel.axhline(means[-1], color=_GREY, linestyle="--", linewidth=1)
    panel.set_ylim(bottom=0)
    reports.label(panel, ALL_MEASURES[name].title, "step", _unit(ALL_MEASURES[name]))
    reports.legend(panel)


def _to_axis(measure: Measure, values: Sequence[float]) -> list[float]:
    """Return values in the unit of the axis: shares in percent."""
    return [100 * value if measure.unit == "share" else value for value in values]


def _unit(measure: Measure) -> str:
    return "%" if measure.unit == "share" else measure.unit
