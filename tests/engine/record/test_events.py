"""Events of a run, with a storage that fails for a while, and what they show of the run as a whole."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import unquote

import pytest
import s3fs

from reinforce.config import parse_config
from reinforce.dataset.files.store import Store
from reinforce.dataset.runs.progress import list_runs
from reinforce.dataset.runs.shard_records import read_records
from reinforce.engine.record import events
from reinforce.engine.record.events import EventDigest, Events
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


def test_the_runs_of_one_second_are_listed_in_their_order(tmp_path: Path) -> None:
    runs = [record_in(tmp_path).run for _ in range(8)]
    assert list_runs(Store(str(tmp_path))) == runs[::-1]


def test_a_new_part_begins_after_a_mebibyte(tmp_path: Path) -> None:
    record = record_in(tmp_path)
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
