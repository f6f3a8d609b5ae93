"""What is measured of an arm, and how it is told."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from reinforce.demo.compare import MEASURES, SECONDS

BYTES, KEPT = "bytes_per_sample", "kept"
REACH = "_reached_at"  # added to the name of a measure
#: By label of an arm, then by measure: a value for each seed, in their order.
Numbers = Mapping[str, Mapping[str, Sequence[float]]]
#: (step, value), in order.
Curve = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Measure:
    """``unit``: shares are told in per cent, their differences in points; steps may be infinite, for never."""

    title: str
    unit: Literal["share", "seconds", "bytes", "steps"] = "share"

    def text(self, value: float) -> str:
        if not math.isfinite(value):
            return "never"
        if self.unit == "share":
            return f"{value:.1%}"
        return f"{value:.3f}" if self.unit == "seconds" else f"{value:,.0f}"

    def distance(self, first: float, second: float) -> str:
        """How far two values are apart."""
        apart = abs(first - second)
        if self.unit == "share":
            return f"{100 * apart:.1f} points"
        low, high = sorted((first, second))
        return self.text(apart) + (f" ({high / low:.2f} times)" if low > 0 else "")

    def noise(self, value: float) -> str:
        return f"{100 * value:.1f}" if self.unit == "share" else self.text(value)

    def cell(self, values: Sequence[float]) -> str:
        """Mean and deviation over the seeds."""
        if not all(map(math.isfinite, values)):
            return f"never in {sum(not math.isfinite(v) for v in values)} of {len(values)}"
        mean = self.text(statistics.fmean(values))
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        return f"{mean} ± {self.noise(deviation)}" if deviation else mean


ALL: Mapping[str, Measure] = {
    **{name: Measure(title) for name, (title, _) in MEASURES.items()},
    SECONDS: Measure("s a step", "seconds"),
    BYTES: Measure("bytes a sample", "bytes"),
    KEPT: Measure("kept of own style"),
    **{name + REACH: Measure(f"{title}: steps", "steps") for name, (title, _) in MEASURES.items()},
}


def reached_at(curve: Curve, level: float) -> float:
    """The step at which a curve that starts at (0, 0) first has ``level``, in straight lines; infinite: never."""
    before, lower = 0, 0.0
    for step, value in curve:
        if value >= level:
            return step if value == lower else before + (step - before) * max(0.0, level - lower) / (value - lower)
        before, lower = step, value
    return math.inf
