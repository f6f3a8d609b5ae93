"""The series of metrics: their names, what is given to Ray, and the dashboard that shows them. The dashboard's queries
are tested in tests/integration/test_models_run.py."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from reinforce.engine.messages.results import ShardResult
from reinforce.engine.record import metrics
from reinforce.engine.record.metrics import NAME, SERIES, Recorder, dashboard_text, totals_values, write_dashboard
from reinforce.engine.record.summary import RunTotals
from reinforce.errors import UserError

PAGE = Path(__file__).parents[3] / "docs" / "monitoring.md"


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float, dict[str, str]]]:
    """The calls of Ray's metrics."""
    calls: list[tuple[str, float, dict[str, str]]] = []

    def metric(name: str) -> Any:
        def add(value: float, tags: dict[str, str]) -> None:
            calls.append((name, value, tags))

        return type("Metric", (), {"inc": staticmethod(add), "set": staticmethod(add)})

    monkeypatch.setattr(metrics, "_metric", metric)
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    return calls


def test_names_follow_the_rules_of_prometheus() -> None:
    for series in SERIES.values():
        assert re.fullmatch(r"reinforce_[a-z]+(_[a-z]+)*", series.name)
        assert series.label in (None, "reason", "stage", "layer", "result", "worker")
        assert not re.search(r"_(ms|kb|mb|percent)(_|$)", series.name)


def test_the_page_has_a_row_for_each_series() -> None:
    rows = re.findall(r"^\| `ray_(reinforce_\w+)` \|(.*)\|(.*)\|(.*)\|(.*)\|$", PAGE.read_text("utf-8"), re.MULTILINE)
    found = {name: tuple(cell.strip(" `") for cell in cells) for name, *cells in rows}
    expected = {one.name: (one.kind, one.source, one.label or "", one.text.rstrip(".")) for one in SERIES.values()}
    assert found == expected


def test_counters_receive_their_growth_and_gauges_their_value(
    recorded: list[tuple[str, float, dict[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder, quarantined = Recorder(), Counter(no_text=2)
    for samples, workers in ((5, 2), (5, 0), (9, 1)):
        recorder.record({"reinforce_samples_total": samples, "reinforce_workers": workers})
    recorder.record({"reinforce_quarantined_total": quarantined})
    quarantined.update(no_text=1, image_broken=4)
    recorder.record({"reinforce_quarantined_total": quarantined})
    Recorder("3").record({"reinforce_worker_memory_bytes": 7})
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    recorder.record({"reinforce_workers": 7})
    samples = "reinforce_samples_total"
    assert recorded == [
        (samples, 5.0, {}), ("reinforce_workers", 2.0, {}),
        ("reinforce_workers", 0.0, {}),
        (samples, 4.0, {}), ("reinforce_workers", 1.0, {}),
        ("reinforce_quarantined_total", 2.0, {"reason": "no_text"}),
        ("reinforce_quarantined_total", 1.0, {"reason": "no_text"}),
        ("reinforce_quarantined_total", 4.0, {"reason": "image_broken"}),
        ("reinforce_worker_memory_bytes", 7.0, {"worker": "3"}),
    ]  # fmt: skip


def test_the_totals_of_a_run_are_the_series_that_the_driver_records() -> None:
    totals = RunTotals()
    stages = {
        "captions/c": {"inputs": 6, "seconds": 2.0, "tokens": 50},
        "embeddings/t/images": {"inputs": 4, "seconds": 1},
    }
    results: list[dict[str, Any]] = [
        {"shard": "a", "samples": 2, "refused": {"no_text": 1}, "bytes": 100, "stages": stages, "read_bytes": 70},
        {"shard": "b", "refused": {"shard_missing": 1}, "quarantine_reason": "shard_missing"},
    ]
    for result in results:
        totals.add(ShardResult(**result, seconds=2.0, times={"reading": 2.0}))
    totals.add_quarantined("c", "samples", "shard_crashed", "it died")
    totals.retries["error"] += 1
    values = totals_values(totals, {"worker_died": 2, "shard": 2})
    assert values.keys() <= SERIES.keys()
    ended = values.pop("reinforce_workers_ended_total")
    assert isinstance(ended, dict)
    assert {reason: count for reason, count in ended.items() if count} == {"died": 2}
    assert values == {
        "reinforce_samples_total": 2,
        "reinforce_shards_total": {"finished": 1, "quarantined": 2},
        "reinforce_captions_total": 6,
        "reinforce_tokens_total": 50,
        "reinforce_read_bytes_total": 70,
        "reinforce_written_bytes_total": 100,
        "reinforce_quarantined_total": {"no_text": 1, "shard_missing": 1, "shard_crashed": 1},
        "reinforce_stage_seconds_total": {"reading": 4.0},
        "reinforce_model_seconds_total": {"captions/c": 2.0, "embeddings/t/images": 1},
        "reinforce_model_inputs_total": {"captions/c": 6, "embeddings/t/images": 4},
        "reinforce_retries_total": {"error": 1},
    }


def test_the_dashboard_is_written_to_a_folder_or_to_that_of_rays_dashboards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert write_dashboard(tmp_path / "new") == tmp_path / "new" / NAME
    monkeypatch.setenv("RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR", str(tmp_path / "ray"))
    with pytest.raises(UserError, match="ray does not exist: name a folder, or start Ray"):
        write_dashboard()
    (tmp_path / "ray").mkdir()
    assert json.loads(write_dashboard().read_text()) == json.loads(dashboard_text())


def test_panels_of_the_dashboard_have_numbers_and_places_of_their_own() -> None:
    panels = json.loads(dashboard_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}) == len(panels)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in panels)
    assert all(panel["description"] and panel["targets"] for panel in panels)
