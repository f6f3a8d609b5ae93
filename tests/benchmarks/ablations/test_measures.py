"""Measures and their format."""

from __future__ import annotations

import math

from benchmarks.ablations.measures import ALL_MEASURES, BYTES, REACHED_AT, step_of_level
from reinforce.demo.compare import SECONDS


def test_step_of_a_level_is_interpolated() -> None:
    curve = [(10, 0.1), (20, 0.3), (30, 0.2)]
    assert [step_of_level(curve, level) for level in (0, 0.05, 0.1, 0.2, 0.3)] == [0, 5, 10, 15, 20]
    assert math.isinf(step_of_level(curve, 0.31))


def test_values_are_formatted_by_their_unit() -> None:
    share, seconds, size = (ALL_MEASURES[name] for name in ("own_style", SECONDS, BYTES))
    assert (share.format(0.1234), seconds.format(0.5154), size.format(11714.2)) == ("12.3%", "0.515", "11,714")
    assert share.format_difference(0.31, 0.101) == "20.9 points"
    assert seconds.format_difference(1.216, 0.641) == "0.575, 1.90 times"
    assert share.format_cell([0.1, 0.3]) == "20.0% ± 14.1"
    assert share.format_cell([0.1]) == "10.0%"
    assert ALL_MEASURES["own_style" + REACHED_AT].format_cell([5, math.inf, math.inf]) == "never in 2 of 3"
