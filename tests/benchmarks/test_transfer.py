"""docs/transfer.md and its stored numbers."""

from __future__ import annotations

import json

import pytest

from benchmarks import transfer


def test_summary_has_mean_range_and_seeds() -> None:
    names = (*transfer.MEASURES, transfer.SECONDS)
    rows = {"plain": [dict.fromkeys(names, 0.25), dict.fromkeys(names, 0.75)]}
    measure = transfer.summarise(rows)["plain"]["own_style"]
    assert measure == {"mean": pytest.approx(0.5), "min": 0.25, "max": 0.75, "seeds": [0.25, 0.75]}


def test_committed_page_is_rendered_from_the_stored_numbers() -> None:
    stored = json.loads(transfer.RESULTS.read_text())
    page = transfer.render_page(stored)
    assert transfer.PAGE.read_text() == page
