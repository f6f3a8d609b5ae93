"""The latency report: table and JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from reinforce.cli.training import show_report
from reinforce.errors import UserError
from reinforce.shipping.report import LatencyReport


def model(image: float, text: float) -> dict[str, Any]:
    """Measurements with these median milliseconds."""
    times = {"image": image, "text": text}
    ranges = {
        side: {"median": t, "lower quartile": t, "upper quartile": t + 1, "fastest": t} for side, t in times.items()
    }
    sizes = {"image": 2_000_000, "text": 1_000_000}
    return {"parameters": sizes, "gflop": {"image": 1.0, "text": 2.0}, "milliseconds": {"torch": ranges}}


def test_table_shows_the_speedup_over_the_slowest_line() -> None:
    table = LatencyReport({}, {"slow": model(8.0, 2.0), "fast": model(2.0, 2.0)}).table()
    columns = [list(column.cells) for column in table.columns]
    assert columns == [
        ["slow", "fast"],
        ["2.0 + 1.0"] * 2,
        ["1.0 + 2.0"] * 2,
        ["8.0 ±0.5", "2.0 ±0.5"],
        ["2.0 ±0.5"] * 2,
        ["1.0x", "2.5x"],
    ]


def test_a_report_is_shown_and_written_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    about = {"cpu": "a cpu", "threads": 1, "cores": 2, "load average": 0, "rounds": 3, "clock": "clock", "versions": {}}
    report = LatencyReport(about, {"fast": model(2.0, 2.0)})
    show_report(report, str(tmp_path / "sub" / "report.json"), print)
    assert json.loads((tmp_path / "sub" / "report.json").read_text()) == {**about, "models": report.models}
    assert "a cpu, 1 of 2 cores" in capsys.readouterr().out
    with pytest.raises(UserError, match="Name another file"):
        show_report(report, str(tmp_path / "sub" / "report.json" / "inside"), print)
