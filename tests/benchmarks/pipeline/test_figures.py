"""Figures, their limits and their medians."""

from __future__ import annotations

import pytest

from benchmarks.pipeline.figures import Figure, Rule, alternate, medians


def test_variants_alternate_and_medians_are_returned() -> None:
    calls: list[str] = []
    values = {"a": [5.0, 1.0, 3.0], "b": [10.0] * 3}

    def measure(name: str) -> dict[str, float]:
        calls.append(name)
        return {"ms": values[name].pop()}

    found = alternate({"a": lambda: measure("a"), "b": lambda: measure("b")}, rounds=3)
    assert calls == ["a", "b"] * 3
    assert found["a ms"] == [3.0, 1.0, 5.0]
    assert medians(found) == {"a ms": 3.0, "b ms": 10.0}


@pytest.mark.parametrize(
    ("value", "limit", "rule", "met"),
    [
        (1.0, 1.1, "at most", True),
        (1.2, 1.1, "at most", False),
        (0.98, 0.97, "at least", True),
        (0.96, 0.97, "at least", False),
        (2.0, 1.0, "limit", None),
        (2.0, None, "at most", None),
    ],
)
def test_targets_are_met_or_not(value: float, limit: float | None, rule: Rule, met: bool | None) -> None:
    assert Figure("section", "name", value, "ms", limit, rule).met is met
