"""Summaries, tables and JSON of evaluation results."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from reinforce.errors import UserError
from reinforce.evaluation.report import Report, Result, SetSummary
from reinforce.source.samples import Refusal
from schemas import Reason


def refusals(count: int) -> list[Refusal]:
    return [Refusal(f"k{i}", Reason.IMAGE_BROKEN, "cut") for i in range(count)]


@pytest.fixture
def report() -> Report:
    report = Report()
    report.add("a", Result({"zero_shot/x/top1": 0.25, "zero_shot/x/top5": 1.0}, {"zero_shot/x": SetSummary(4, [])}))
    report.add("b", Result({"zero_shot/x/top1": 0.5}, {"zero_shot/x": SetSummary(4, refusals(1))}))
    return report


def test_summary_counts_images_and_names_the_first_refused_ones() -> None:
    assert str(SetSummary(1234, [])) == "1,234 images"
    assert str(SetSummary(5, refusals(1))) == "5 images; 1 refused: k0 (image_broken)"
    assert str(SetSummary(5, refusals(4))).endswith(
        "4 refused: k0 (image_broken), k1 (image_broken), k2 (image_broken), ..."
    )


def test_table_has_a_column_per_model_in_percent(report: Report) -> None:
    console = Console(width=80, file=io.StringIO())
    with console.capture() as capture:
        console.print(report.table())
    lines = [line.split() for line in capture.get().splitlines()]
    assert lines == [["%", "a", "b"], ["zero_shot/x/top1", "25.00", "50.00"], ["zero_shot/x/top5", "100.00"]]


def test_equal_summaries_share_a_line(report: Report) -> None:
    assert report.lines() == ["zero_shot/x: 4 images", "zero_shot/x: 4 images; 1 refused: k0 (image_broken)"]
    report.add("c", Result({}, {"zero_shot/x": SetSummary(4, [])}))
    assert len(report.lines()) == 2


def test_json_has_all_metrics_and_refused_images(report: Report, tmp_path: Path) -> None:
    report.write(f"{tmp_path}/sub/report.json")
    models = json.loads((tmp_path / "sub" / "report.json").read_text())["models"]
    assert models["a"]["metrics"] == {"zero_shot/x/top1": 0.25, "zero_shot/x/top5": 1.0}
    assert models["b"]["sets"] == {
        "zero_shot/x": {"images": 4, "refused": [{"key": "k0", "reason": "image_broken", "detail": "cut"}]}
    }
    with pytest.raises(UserError, match="cannot be written"):
        report.write(f"{tmp_path}/sub/report.json/x.json")
