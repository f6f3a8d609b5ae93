"""The measures of an arm, and their format in text."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from examples.demo.compare import MEASURES, SECONDS

BYTES, RETAINED = "bytes_per_sample", "kept"
MILLISECONDS, MILLISECONDS_ALONE = "milliseconds", "milliseconds_alone"
REACHED_AT = "_reached_at"  # suffix of a measure's name: the step at which it reaches a level
#: By label of an arm, then by measure: a value for each seed, in order.
Numbers = Mapping[str, Mapping[str, Sequence[float]]]
#: (step, value), in order.
Curve = Sequence[tuple[int, float]]

#: Digits after the point; others have none.
_DIGITS = {"seconds": 3, "milliseconds": 2}


@dataclass(frozen=True)
class Measure:
    """A measure's title and unit. Shares are in percent, their differences in points; steps may be infinite (never)."""

    title: str
    unit: Literal["share", "seconds", "milliseconds", "bytes", "steps"] = "share"

    def format(self, value: float) -> str:
        if not math.isfinite(value):
            return "never"
        if self.unit == "share":
            return f"{value:.1%}"
        return f"{value:,.{_DIGITS.get(self.unit, 0)}f}"

    def format_difference(self, first: float, second: float) -> str:
        difference = abs(first - second)
        if self.unit == "share":
            return f"{100 * difference:.1f} points"
        low, high = sorted((first, second))
        return self.format(difference) + (f", {high / low:.2f} times" if low > 0 else "")

    def format_noise(self, value: float) -> str:
        return f"{100 * value:.1f}" if self.unit == "share" else self.format(value)

    def format_cell(self, values: Sequence[float]) -> str:
        """Return mean ± sample standard deviation over the seeds."""
        if not all(map(math.isfinite, values)):
            return f"never in {sum(not math.isfinite(v) for v in values)} of {len(values)}"
        mean = self.format(statistics.fmean(values))
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        return f"{mean} ± {self.format_noise(deviation)}" if deviation else mean


ALL_MEASURES: Mapping[str, Measure] = {
    **{name: Measure(title) for name, (title, _) in MEASURES.items()},
    SECONDS: Measure("s/step", "seconds"),
    BYTES: Measure("bytes/sample", "bytes"),
    MILLISECONDS: Measure("ms/image, 64 together", "milliseconds"),
    MILLISECONDS_ALONE: Measure("ms/image, one alone", "milliseconds"),
    RETAINED: Measure("training pictures, retained"),
    **{name + REACHED_AT: Measure(f"{title}: steps", "steps") for name, (title, _) in MEASURES.items()},
}


def step_of_level(curve: Curve, level: float) -> float:
    """Return the step at which a curve from (0, 0) first reaches ``level``, by linear interpolation; inf if never."""
    before, lower = 0, 0.0
    for step, value in curve:
        if value >= level:
            return step if value == lower else before + (step - before) * max(0.0, level - lower) / (value - lower)
        before, lower = step, value
    return math.inf
