"""The series of metrics: their names, and what is given to Ray."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from reinforce.engine.messages.results import ShardResult
from reinforce.engine.record import metrics
from reinforce.engine.record.metrics import SERIES, Recorder, totals_values
from reinforce.engine.record.summary import RunTotals

PAGE = Path(__file__).parents[2] / "docs" / "monitoring.md"


class Recorded:
    """Takes the place of Ray's metrics."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, float, dict[str, str]]] = []

    def __call__(self, name: str) -> Any:
        def add(value: float, tags: dict[str, str]) -> None:
            self.calls.append((name, value, tags))

        return type("Metric", (), {"inc": staticmethod(add), "set": staticmethod(add)})

    def take(self) -> list[tuple[str, float, dict[str, str]]]:
        calls, self.calls = self.calls, []
        return calls


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    found = Recorded()
    monkeypatch.setattr(metrics, "_metric", found)
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    return found


def test_names_follow_the_rules_of_prometheus() -> None:
    for series in SERIES.values():
        assert re.fullmatch(r"reinforce_[a-z]+(_[a-z]+)*", series.name)
        assert series.name.endswith("_total") == (series.kind == "counter")
        assert (series.source == "worker") == (series.label == "worker")
        assert series.label in (None, "reason", "stage", "layer", "result", "worker")
        assert not re.search(r"_(ms|kb|mb|percent)(_|$)", series.name)


def test_the_page_has_a_row_for_each_series() -> None:
    rows = re.findall(r"^\| `ray_(reinforce_\w+)` \|(.*)\|(.*)\|(.*)\|(.*)\|$", PAGE.read_text("utf-8"), re.MULTILINE)
    found = {name: tuple(cell.strip(" `") for cell in cells) for name, *cells in rows}
    expected = {one.name: (one.kind, one.source, one.label or "", one.text.rstrip(".")) for one in SERIES.values()}
    assert found == expected


def test_counters_receive_their_growth_and_gauges_their_value(recorded: Recorded) -> None:
    recorder = Recorder()
    quarantined = Counter(no_text=2)
    for samples, workers in ((5, 2), (5, 0), (9, 1)):
        recorder.record({"reinforce_samples_total": samples, "reinforce_workers": workers})
    recorder.record({"reinforce_quarantined_total": quarantined})
    quarantined.update(no_text=1, image_broken=4)
    recorder.record({"reinforce_quarantined_total": quarantined})
    samples = ("reinforce_samples_total", {})
    assert recorded.take() == [
        (samples[0], 5.0, {}), ("reinforce_workers", 2.0, {}),
        ("reinforce_workers", 0.0, {}),
        (samples[0], 4.0, {}), ("reinforce_workers", 1.0, {}),
        ("reinforce_quarantined_total", 2.0, {"reason": "no_text"}),
        ("reinforce_quarantined_total", 1.0, {"reason": "no_text"}),
        ("reinforce_quarantined_total", 4.0, {"reason": "image_broken"}),
    ]  # fmt: skip


def test_series_of_a_worker_have_its_number(recorded: Recorded) -> None:
    Recorder("3").record({"reinforce_worker_memory_bytes": 7})
    assert recorded.take() == [("reinforce_worker_memory_bytes", 7.0, {"worker": "3"})]


def test_without_ray_nothing_is_recorded(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    Recorder().record({"reinforce_workers": 7})
    assert recorded.take() == []


def test_the_totals_of_a_run_are_the_series_that_the_driver_records() -> None:
    totals = RunTotals()
    stages = {
        "captions/c": {"inputs": 6, "seconds": 2.0, "tokens": 50},
        "embeddings/t/images": {"inputs": 4, "seconds": 1},
    }
    times, refused = {"reading": 3.0}, {"no_text": 1}
    totals.add(
        ShardResult(
            shard="a", samples=2, refused=refused, seconds=3.0, busy=2.5, bytes=100,
            stages=stages, read_bytes=70, times=times,
        )
    )  # fmt: skip
    refused, times = {"shard_missing": 1}, {"reading": 1.0}
    totals.add(
        ShardResult(shard="b", refused=refused, quarantine_reason="shard_missing", seconds=1.0, times=times)
    )  # fmt: skip
    totals.add_quarantined("c", "samples", "shard_crashed", "it died")
    totals.retries["error"] += 1
    values = totals_values(totals, {"worker_died": 2, "shard": 2})
    assert values.keys() <= SERIES.keys()
    assert values["reinforce_samples_total"] == 2
    assert values["reinforce_shards_total"] == {"finished": 1, "quarantined": 2}
    assert (values["reinforce_captions_total"], values["reinforce_tokens_total"]) == (6, 50)
    assert (values["reinforce_read_bytes_total"], values["reinforce_written_bytes_total"]) == (70, 100)
    assert values["reinforce_quarantined_total"] == {"no_text": 1, "shard_missing": 1, "shard_crashed": 1}
    assert values["reinforce_stage_seconds_total"] == {"reading": 4.0}
    assert values["reinforce_model_inputs_total"] == {"captions/c": 6, "embeddings/t/images": 4}
    assert values["reinforce_retries_total"] == {"error": 1}
    ended = values["reinforce_workers_ended_total"]
    assert isinstance(ended, dict)
    assert {reason: count for reason, count in ended.items() if count} == {"died": 2}
