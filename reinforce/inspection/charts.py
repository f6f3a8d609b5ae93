"""Charts as vector graphics: what a chart shows, and where each line and label of it is drawn.

Templates draw them as inline SVG with the colours of the page, so that they follow light and dark, and need no script.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

WIDTH, HEIGHT = 460, 280  # units of a chart, about pixels on a phone
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 12, 48
_TICKS = 5
_ROW = 22  # height of a row of dots
COLOURS = 8

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A line through points, or a filled area below it; ``band`` has (x, low, high) around the line.

    ``colour`` is an index of the palette, None for the grey of true captions.
    """

    label: str
    points: Sequence[Point]
    colour: int | None = None
    filled: bool = False
    steps: bool = False
    band: Sequence[tuple[float, float, float]] = ()
    dots: bool = False


@dataclass(frozen=True)
class Mark:
    """A vertical line at x with a label."""

    x: float
    label: str
    colour: int


@dataclass(frozen=True)
class Chart:
    """A chart of lines. ``table`` has the same numbers for readers who cannot see it, under its ``heads``."""

    title: str
    text: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    heads: Sequence[str]
    table: Sequence[Sequence[str]]
    marks: Sequence[Mark] = ()
    x_log: bool = False
    x_share: bool = False
    y_share: bool = False
    y_zero: bool = False


@dataclass(frozen=True)
class Dot:
    """A value with its interval in a row of a dot chart."""

    value: float
    low: float
    high: float
    colour: int


@dataclass(frozen=True)
class DotChart:
    """Rows of dots with intervals around a zero line."""

    title: str
    text: str
    x_label: str
    labels: Sequence[str]
    dots: Sequence[Sequence[Dot]]
    legend: Sequence[tuple[str, int]]
    heads: Sequence[str]
    table: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Text:
    """A label in a drawing."""

    x: float
    y: float
    text: str
    anchor: str = "middle"
    kind: str = ""


@dataclass
class Drawing:
    """Paths with their classes, texts, and the legend (label, class of its colour, whether it is filled)."""

    height: float
    paths: list[tuple[str, str]] = field(default_factory=list)
    circles: list[tuple[float, float, str]] = field(default_factory=list)
    texts: list[Text] = field(default_factory=list)
    legend: list[tuple[str, str, bool]] = field(default_factory=list)


def colour_class(colour: int | None) -> str:
    """Name of the class that has a colour of the palette."""
    return "grey" if colour is None else f"c{colour % COLOURS}"


def draw_chart(chart: Chart) -> Drawing:
    """Lay out a chart of lines."""
    xs = [x for series in chart.series for x, _ in series.points] + [mark.x for mark in chart.marks]
    ys = [y for series in chart.series for _, y in series.points]
    ys += [y for series in chart.series for _, low, high in series.band for y in (low, high)]
    if chart.y_zero or any(series.filled for series in chart.series):
        ys.append(0.0)
    x_axis = _Axis(min(xs), max(xs), LEFT, WIDTH - RIGHT, chart.x_log)
    top = TOP + (14 if chart.marks else 0)
    y_axis = _Axis(min(ys), max(ys), HEIGHT - BOTTOM, top, nice=True)
    drawing = Drawing(HEIGHT)
    for y in y_axis.ticks():
        drawing.paths.append((f"M{LEFT} {_n(y_axis(y))}H{WIDTH - RIGHT}", "grid"))
        drawing.texts.append(Text(LEFT - 7, y_axis(y) + 4, _label(y, y_axis.step, chart.y_share), "end"))
    for x in x_axis.ticks():
        drawing.texts.append(Text(x_axis(x), HEIGHT - BOTTOM + 18, _label(x, x_axis.step, chart.x_share)))
    drawing.texts.append(Text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, chart.x_label, kind="axis"))
    for series in chart.series:
        _draw_series(drawing, series, x_axis, y_axis)
    for mark in chart.marks:
        place = x_axis(mark.x)
        drawing.paths.append((f"M{_n(place)} {top}V{HEIGHT - BOTTOM}", f"mark {colour_class(mark.colour)}"))
    _label_marks(drawing, chart.marks, x_axis)
    return drawing


def _label_marks(drawing: Drawing, marks: Sequence[Mark], axis: _Axis) -> None:
    """Label the marks above the chart; several at one place share a label."""
    by_place: dict[float, list[str]] = {}
    for mark in marks:
        by_place.setdefault(axis(mark.x), []).append(mark.label)
    for place, labels in by_place.items():
        anchor = "start" if place < WIDTH / 3 else "end" if place > 2 * WIDTH / 3 else "middle"
        drawing.texts.append(Text(place, TOP + 6, ", ".join(dict.fromkeys(labels)), anchor, "mark-label"))


def _draw_series(drawing: Drawing, series: Series, x_axis: _Axis, y_axis: _Axis) -> None:
    name = colour_class(series.colour)
    drawing.legend.append((series.label, name, series.filled))
    if not series.points:
        return
    points = _stepped(series.points) if series.steps else list(series.points)
    places = [f"{_n(x_axis(x))} {_n(y_axis(y))}" for x, y in points]
    if series.band:
        upper = [f"{_n(x_axis(x))} {_n(y_axis(high))}" for x, _, high in series.band]
        lower = [f"{_n(x_axis(x))} {_n(y_axis(low))}" for x, low, _ in reversed(series.band)]
        drawing.paths.append((f"M{'L'.join([*upper, *lower])}Z", f"band {name}"))
    if series.filled:
        base = _n(y_axis(0.0))
        path = f"M{_n(x_axis(points[0][0]))} {base}L{'L'.join(places)}L{_n(x_axis(points[-1][0]))} {base}Z"
        drawing.paths.append((path, f"area {name}"))
    else:
        drawing.paths.append((f"M{'L'.join(places)}", f"line {name}"))
    if series.dots:
        drawing.circles += [(x_axis(x), y_axis(y), name) for x, y in series.points]


def _stepped(points: Sequence[Point]) -> list[Point]:
    """The outline of a histogram: each point is the left edge of a bin and its height, the last one only an edge."""
    stepped = [(points[0][0], 0.0)]
    for (left, height), (right, _) in itertools.pairwise(points):
        stepped += [(left, height), (right, height)]
    return [*stepped, (points[-1][0], 0.0)]


def draw_dots(chart: DotChart) -> Drawing:
    """Lay out a chart of dots."""
    bottom = TOP + _ROW * len(chart.labels)
    left = LEFT + 52
    ends = [value for row in chart.dots for dot in row for value in (dot.low, dot.high)] + [0.0]
    axis = _Axis(min(ends), max(ends), left, WIDTH - RIGHT, nice=True)
    drawing = Drawing(bottom + BOTTOM)
    for x in axis.ticks():
        drawing.paths.append((f"M{_n(axis(x))} {TOP}V{bottom}", "grid"))
        drawing.texts.append(Text(axis(x), bottom + 18, _label(x, axis.step, False)))
    drawing.paths.append((f"M{_n(axis(0.0))} {TOP}V{bottom}", "zero"))
    drawing.texts.append(Text((left + WIDTH - RIGHT) / 2, bottom + BOTTOM - 6, chart.x_label, kind="axis"))
    for row, (label, dots) in enumerate(zip(chart.labels, chart.dots, strict=True)):
        middle = TOP + _ROW * (row + 0.5)
        drawing.texts.append(Text(left - 8, middle + 4, label, "end"))
        for n, dot in enumerate(dots):
            y = middle + (n - (len(dots) - 1) / 2) * min(6.0, 14.0 / len(dots))
            name = colour_class(dot.colour)
            drawing.paths.append((f"M{_n(axis(dot.low))} {_n(y)}H{_n(axis(dot.high))}", f"interval {name}"))
            drawing.circles.append((axis(dot.value), y, name))
    drawing.legend += [(label, colour_class(colour), False) for label, colour in chart.legend]
    return drawing


class _Axis:
    """Maps values to places; ``nice`` widens the range to ticks."""

    def __init__(self, low: float, high: float, start: float, end: float, log: bool = False, nice: bool = False):
        if high - low < 1e-9:
            low, high = (low - 0.5, high + 0.5) if not log else (low / 2, high * 2)
        self.log, self.start, self.end = log, start, end
        self.step = 1.0 if log else _nice_step((high - low) / _TICKS)
        if nice:
            low = math.floor(low / self.step + 1e-9) * self.step
            high = math.ceil(high / self.step - 1e-9) * self.step
        self.low, self.high = low, high

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(v) for v in (self.low, self.high, value)) if self.log else (
            self.low, self.high, value,
        )  # fmt: skip
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            every = [factor * 10.0**decade for decade in decades for factor in (1, 2, 5)]
            return [tick for tick in every if self.low * 0.999 <= tick <= self.high * 1.001]
        first = math.ceil(self.low / self.step - 1e-6)
        last = math.floor(self.high / self.step + 1e-6)
        return [number * self.step for number in range(first, last + 1)]


def _nice_step(rough: float) -> float:
    base = 10.0 ** math.floor(math.log10(rough))
    return next(base * factor for factor in (1, 2, 2.5, 5, 10) if base * factor >= rough * 0.999)


def _label(value: float, step: float, share: bool) -> str:
    value = 0.0 if abs(value) < step * 1e-6 else value
    if share:
        return f"{100 * value:.{_digits(100 * step)}f} %"
    return f"{value:,.{_digits(step)}f}".replace("-", "\u2212")


def _digits(step: float) -> int:
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return digits + (abs(step * 10**digits - round(step * 10**digits)) > 1e-6)


def _n(value: float) -> str:
    """A coordinate with one digit after the point."""
    return f"{value:.1f}".removesuffix(".0")
