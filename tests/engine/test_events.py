"""Events of a run, with a storage that fails for a while; the series of metrics, and the dashboard that shows them.

The dashboard's queries are tested in tests/integration/test_models_run.py.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import s3fs

from reinforce.config import parse_config
from reinforce.dataset.runs import list_runs, read_records
from reinforce.dataset.store import Store
from reinforce.engine import record as events
from reinforce.engine import record as metrics
from reinforce.engine.messages import ShardResult
from reinforce.engine.record import (
    NAME,
    SERIES,
    EventDigest,
    Events,
    Recorder,
    RunTotals,
    dashboard_text,
    totals_values,
    write_dashboard,
)
from reinforce.errors import UserError
from teachers.fast_paths.usage import Usage
from tests.helpers.s3_proxy import Proxy, refuse


def record_in(folder: Path) -> Events:
    return Events(Store(str(folder)), parse_config({"source": "x", "output": "y"}), str)


def written(part: Path) -> list[str]:
    return [json.loads(line)["event"] for line in part.read_text().splitlines()]


def test_events_that_cannot_be_written_are_written_later_and_end_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(events, "_FLUSH_SECONDS_LOCAL", -1.0)
    record = record_in(tmp_path)
    runs, moved = tmp_path / "runs", tmp_path / "moved"
    runs.rename(moved)
    runs.touch()  # a file where the folder should be
    record.add("first")
    record.flush_when_due()
    record.add("second")
    record.flush_when_due()
    assert [line.partition(" cannot be written")[1] for line in caplog.messages] == [" cannot be written"], (
        "one warning"
    )
    runs.unlink()
    moved.rename(runs)
    record.flush_when_due()
    [part] = runs.glob("*/events-00000.jsonl")
    assert written(part) == ["first", "second"]


def test_a_storage_that_refuses_the_records_of_runs_ends_no_run(
    s3: s3fs.S3FileSystem, s3_proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store("s3://bucket/refused")
    with s3_proxy.inject(refuse(403, "AccessDenied"), lambda r: "refused/runs" in unquote(r.key + r.query)) as refused:
        record = Events(store, parse_config({"source": "x", "output": "y"}), str)
        record.finish({"status": 0})
        assert read_records(store).sources == {}
    assert {request.method for request in refused} == {"PUT", "GET"}
    assert [line.rpartition(". ")[2] for line in caplog.messages] == [
        "The run goes on without its record.",
        "The records of earlier runs are not used.",
    ]


def test_the_runs_of_one_second_are_listed_in_their_order_and_a_new_part_begins_after_a_mebibyte(
    tmp_path: Path,
) -> None:
    records = [record_in(tmp_path) for _ in range(8)]
    assert list_runs(Store(str(tmp_path))) == [record.run for record in records][::-1]
    record = records[-1]
    for number in range(3):
        record.add("long", text=str(number) * 600_000)
        record.flush()
    record.finish({"status": 0})
    parts = sorted(tmp_path.glob("runs/*/events-*.jsonl"))
    assert [written(part) for part in parts] == [["long", "long"], ["long", "end"]]
    assert json.loads((parts[0].parent / "summary.json").read_text()) == {"status": 0}


def test_events_show_the_slowest_shards_and_those_that_fail_until_they_are_finished() -> None:
    digest = EventDigest()
    for number in range(8):
        times = {"reading": 0.1, "decoding": number}
        digest.add("shard", {"shard": f"s{number}", "seconds": float(number), "times": times})
    assert sorted(digest.slowest)[-1] == (7.0, "s7", "decoding")
    assert len(digest.slowest) == 5
    digest.add("shard_raised", {"shard": "a", "error": "one"})
    digest.add("shard_raised", {"shard": "a", "error": "two"})
    digest.add("worker_died", {"shards": ["a", "b"], "error": "killed", "node_lost": False})
    digest.add("worker_died", {"shards": ["c"], "error": "its node was lost", "node_lost": True})
    assert digest.failing == {"a": (3, "killed"), "b": (1, "killed")}
    digest.add("shard", {"shard": "a", "seconds": 1.0})
    digest.add("shard_quarantined", {"shard": "b"})
    assert digest.failing == {}
    assert (digest.counts["shard"], digest.counts["worker_died"]) == (9, 2)


PAGE = Path(__file__).parents[2] / "docs" / "clusters.md"


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


def test_the_page_has_a_row_for_each_series_whose_name_follows_the_rules_of_prometheus() -> None:
    rows = re.findall(r"^\| `ray_(reinforce_\w+)` \|(.*)\|(.*)\|(.*)\|(.*)\|$", PAGE.read_text("utf-8"), re.MULTILINE)
    found = {name: tuple(cell.strip(" `") for cell in cells) for name, *cells in rows}
    expected = {one.name: (one.kind, one.source, one.label or "", one.text.rstrip(".")) for one in SERIES.values()}
    assert found == expected
    for series in SERIES.values():
        assert re.fullmatch(r"reinforce_[a-z]+(_[a-z]+)*", series.name)
        assert series.label in (None, "reason", "stage", "layer", "result", "path", "worker")
        assert not re.search(r"_(ms|kb|mb|percent)(_|$)", series.name)


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
    totals.add_usage([Usage("t", "compile", used=7), Usage("t", "compile", plain=1)])
    totals.add_quarantined("c", "samples", "shard_crashed", "it died")
    totals.retries["error"] += 1
    values = totals_values(totals, {"worker_died": 2, "shard": 2})
    assert values.keys() <= SERIES.keys()
    ended = values.pop("reinforce_workers_ended_total")
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
        "reinforce_fast_calls_total": {"t/compile": 7},
        "reinforce_plain_calls_total": {"t/compile": 1},
        "reinforce_retries_total": {"error": 1},
    }


def test_the_dashboard_is_written_to_a_folder_or_to_that_of_rays_with_panels_of_their_own_numbers_and_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert write_dashboard(tmp_path / "new") == tmp_path / "new" / NAME
    monkeypatch.setenv("RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR", str(tmp_path / "ray"))
    with pytest.raises(UserError, match="ray does not exist: name a folder, or start Ray"):
        write_dashboard()
    (tmp_path / "ray").mkdir()
    dashboard = json.loads(write_dashboard().read_text())
    assert dashboard == json.loads(dashboard_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}) == len(panels)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in panels)
    assert all(panel["description"] and panel["targets"] for panel in panels)
