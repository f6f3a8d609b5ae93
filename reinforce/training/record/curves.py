"""The curves of a training run in one picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from reinforce import plots

T = TypeVar("T")
_COLUMNS = 3
#: Title, label of the y axis, and the values that a row of the log contributes, by series.
_PANELS: tuple[tuple[str, str, Callable[[Mapping[str, Any]], Mapping[str, Any]]], ...] = (
    ("Loss", "loss", lambda row: {"all": row["loss"], **row["losses"]} if "losses" in row else {}),
    ("Learning rate", "learning rate", lambda row: {"": row["lr"]} if "lr" in row else {}),
    ("Learnt scalars", "value", lambda row: row.get("scalars", {})),
    ("Evaluation: losses", "loss", lambda row: _metrics(row, "loss")),
    ("Evaluation: retrieval", "metric", lambda row: _metrics(row, "retrieval")),
    ("Evaluation", "metric", lambda row: _metrics(row, "")),
)


def name_part(metric: str, parts: Mapping[str, str]) -> str:
    """A metric's name, which says what part it is of, such as ``datacomp/mean of 2 of 38 sets``."""
    return f"{metric} of {parts[metric]}" if metric in parts else metric


def draw_curves(rows: Sequence[Mapping[str, Any]], url: str) -> None:
    """Draw the rows of a log as PNG to a path or URL: one panel each for losses, learning rate, scalars and metrics.

    Panels without values are left out; nothing is written if all are empty.
    """
    panels = [(title, y, _series(rows, values)) for title, y, values in _PANELS]
    panels = [panel for panel in panels if panel[2]]
    if not panels:
        return
    columns = min(len(panels), _COLUMNS)
    lines = -(-len(panels) // columns)
    made, axes = plots.figure(len(panels), width=4.6 * columns, height=3.6 * lines, columns=columns)
    for panel, (title, y, series) in zip(axes, panels, strict=True):
        plots.label(panel, title, "step", y)
        for index, (label, points) in enumerate(series.items()):
            marker = "o" if len(points) == 1 else None
            panel.plot(*zip(*points, strict=True), color=plots.colour(index), label=label or None, marker=marker)
        plots.legend(panel)
    plots.save(made, url)


def _metrics(row: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    metrics, parts = row.get("metrics", {}), row.get("parts", {})
    of_kind = {name_part(name, parts): value for name, value in metrics.items() if _metric_kind(name) == kind}
    return {name.removeprefix("retrieval/"): value for name, value in of_kind.items()}


def _metric_kind(metric: str) -> str:
    """``loss`` (on a scale of its own), ``retrieval``, or an empty string for all other metrics."""
    first = metric.partition("/")[0]
    return "loss" if metric.endswith("_loss") else first if first == "retrieval" else ""


def _series(
    rows: Sequence[Mapping[str, Any]], values: Callable[[Mapping[str, Any]], Mapping[str, Any]]
) -> dict[str, list[tuple[int, float]]]:
    """Points (step, value) by series; null values are skipped."""
    series: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in values(row).items():
            if value is not None:
                series.setdefault(name, []).append((row["step"], value))
    return series
