"""The picture of a training's curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from reinforce.training.record import curves
from reinforce.training.record.curves import draw_curves

ROWS: list[dict[str, Any]] = [
    {"step": 1, "loss": 2.0, "losses": {"clip": 2.0}, "lr": 0.1, "scalars": {"logit_scale": 14.0}},
    {"step": 2, "loss": None, "losses": {"clip": None}, "lr": 0.2, "scalars": {"logit_scale": 15.0}},
    {"step": 2, "metrics": {"retrieval/own/r1": 0.5, "zero_shot/top1": 0.4, "caption_loss": 3.0}},
]


def test_series_are_grouped_by_panel_and_nulls_are_skipped() -> None:
    panels = {title: curves._series(ROWS, values) for title, _, values in curves._PANELS}
    assert panels == {
        "Loss": {"all": [(1, 2.0)], "clip": [(1, 2.0)]},
        "Learning rate": {"": [(1, 0.1), (2, 0.2)]},
        "Learnt scalars": {"logit_scale": [(1, 14.0), (2, 15.0)]},
        "Evaluation: losses": {"caption_loss": [(2, 3.0)]},
        "Evaluation: retrieval": {"own/r1": [(2, 0.5)]},
        "Evaluation": {"zero_shot/top1": [(2, 0.4)]},
    }


@pytest.mark.parametrize(("rows", "lines"), [(ROWS, 2), (ROWS[:1], 1)])
def test_the_picture_has_three_panels_a_line(tmp_path: Path, rows: list[dict[str, Any]], lines: int) -> None:
    draw_curves(rows, f"{tmp_path}/curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width / picture.height == pytest.approx(3 * 4.6 / (lines * 3.6), rel=0.1)


def test_without_values_there_is_no_picture(tmp_path: Path) -> None:
    draw_curves([{"step": 0, "metrics": {}}], f"{tmp_path}/curves.png")
    assert not (tmp_path / "curves.png").exists()
