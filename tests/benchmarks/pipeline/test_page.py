"""Figures of the pipeline benchmark, their limits and medians, and the page that shows them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.pipeline import page
from benchmarks.pipeline.figures import Figure, Rule, alternate, medians
from benchmarks.pipeline.host import cpu_figures
from benchmarks.pipeline.memory import pixel_cell_bytes

EMPTY = "# Title\n\n<!-- figures -->\n<!-- end of figures -->\nmore\n<!-- sizing -->\nold\n<!-- end of sizing -->\n"


def test_page_is_that_of_the_stored_figures_whose_parts_are_replaced_while_the_rest_stays() -> None:
    stored: dict[str, Any] = json.loads(page.RESULTS.read_text(encoding="utf-8"))
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.render_page(text, stored) == text, "run `python -m benchmarks.pipeline --page`"
    text = page.render_page(EMPTY, {**stored, "quick": False})
    assert text.startswith("# Title\n\n<!-- figures -->\n\nMeasured on ")
    assert "<!-- end of figures -->\nmore\n<!-- sizing -->" in text
    assert "\nold\n" not in text
    assert page.render_page(text, {**stored, "quick": False}) == text
    assert "quick run" not in text
    assert "quick run" in page.render_page(EMPTY, {**stored, "quick": True})
    with pytest.raises(ValueError, match="sizing"):
        page.render_page(EMPTY.replace("end of sizing", "end"), stored)


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


VALUES = {
    "alone 2 ms": [6.0, 6.0, 7.0],
    "worker 2 own": [0.5, 0.4, 0.5],
    "worker 2 decode": [6.1, 6.1, 6.0],
    "worker 2 samples/s": [300.0] * 3,
    "worker 2 written": [85.0] * 3,
}


def test_figures_of_the_host_follow_from_medians_and_pixel_cells_are_those_of_two_shards() -> None:
    assert pixel_cell_bytes(2, cores=2) == 2 * (2 * 128 + 1 + 128) * 2 * 224 * 224 * 3
    assert pixel_cell_bytes(10, cores=2) == 2 * (2 * 25 + 1 + 25) * 10 * 224 * 224 * 3
    figures = {figure.name: figure for figure in cpu_figures(2, 4, VALUES)}
    overhead = figures["all CPU / that of decoding and augmenting alone, 2 augmentations"]
    assert (overhead.value, overhead.limit, overhead.met) == (pytest.approx(1.1), 1.08, False)
    ceiling = figures["host ceiling: 1 / CPU of its own process, 2 augmentations"]
    assert (ceiling.value, ceiling.limit, ceiling.met) == (2000, pytest.approx(1 / 0.0006), True)
    speed = figures["speed on 4 cores, models that take no time, 2 augmentations"]
    assert speed.limit == pytest.approx(4000 / 6)
    assert figures["CPU per sample of its decode processes, 2 augmentations"].limit == 6.0
    values = {name.replace("2", "3"): each for name, each in VALUES.items()}
    assert {figure.met for figure in cpu_figures(3, 4, values) if "own process" in figure.name} == {None}
