"""The page of the pipeline benchmark and its stored figures."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.pipeline import page
from benchmarks.pipeline.figures import Figure
from benchmarks.pipeline.memory import pixel_cell_bytes

EMPTY = "# Title\n\n<!-- figures -->\n<!-- end of figures -->\nmore\n<!-- sizing -->\nold\n<!-- end of sizing -->\n"


@pytest.fixture
def stored() -> dict[str, Any]:
    results: dict[str, Any] = json.loads(page.RESULTS.read_text(encoding="utf-8"))
    return results


def test_figures_of_a_quick_run_are_shown_as_such(stored: dict[str, Any]) -> None:
    text = [page.render_page(EMPTY, {**stored, "quick": quick}) for quick in (False, True)]
    assert ["quick run" in each for each in text] == [False, True]


def test_page_is_that_of_the_stored_figures(stored: dict[str, Any]) -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.render_page(text, stored) == text, "run `python -m benchmarks.pipeline --page`"


def test_generated_parts_are_replaced_and_the_rest_stays(stored: dict[str, Any]) -> None:
    text = page.render_page(EMPTY, {**stored, "quick": False})
    assert text.startswith("# Title\n\n<!-- figures -->\n\nMeasured on ")
    assert "<!-- end of figures -->\nmore\n<!-- sizing -->" in text
    assert "\nold\n" not in text
    assert page.render_page(text, {**stored, "quick": False}) == text
    with pytest.raises(ValueError, match="sizing"):
        page.render_page(EMPTY.replace("end of sizing", "end"), stored)


def test_every_figure_is_a_row_with_its_limit(stored: dict[str, Any]) -> None:
    figures = [
        Figure("first", "speed", 1234.4, "samples/s", 2000.0, "limit"),
        Figure("first", "CPU", 0.123, "ms", 0.6, "at most"),
        Figure("second", "share", 0.9612, "", 0.97, "at least"),
        Figure("second", "size", 12.3, "MB"),
    ]
    text = page.render_page(EMPTY, {**stored, "figures": [vars(figure) for figure in figures]})
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows[2:8] == [
        "| **first** | | | |",
        "| speed | 1,234 samples/s | 2,000 samples/s |  |",
        "| CPU | 0.12 ms | at most 0.60 ms | yes |",
        "| **second** | | | |",
        "| share | 0.961 | at least 0.970 | no |",
        "| size | 12 MB |  |  |",
    ]
    assert page.make_table(figures).row_count == 6


def test_sizing_follows_from_the_figures(stored: dict[str, Any]) -> None:
    label = "2 augmentations"
    figures = [
        Figure("worker", f"CPU per sample of its own process, {label}", 0.5, "ms"),
        Figure("worker", f"CPU per sample of its decode processes, {label}", 6.0, "ms"),
        Figure("worker", f"written per sample, {label}", 85.0, "kB"),
    ]
    results = {**stored, "photograph bytes": 80_000, "figures": [vars(figure) for figure in figures]}
    row = next(line for line in page.render_page(EMPTY, results).splitlines() if line.startswith("| 2 aug"))
    assert row == "| 2 augmentations | 6.5 | 0.5 | 80 MB/s | 85 MB/s | 232 MB |"


def test_pixel_cells_are_those_of_two_shards() -> None:
    assert pixel_cell_bytes(2, cores=2) == 2 * (2 * 128 + 1 + 128) * 2 * 224 * 224 * 3
    assert pixel_cell_bytes(10, cores=2) == 2 * (2 * 25 + 1 + 25) * 10 * 224 * 224 * 3
