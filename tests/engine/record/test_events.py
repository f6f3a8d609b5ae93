"""Events of a run, with a storage that fails for a while, and what they show of the run as a whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reinforce.config import parse_config
from reinforce.dataset.files.store import Store
from reinforce.engine.record import events
from reinforce.engine.record.events import EventDigest, Events
from reinforce.errors import StorageError


def record_in(folder: Path) -> Events:
    return Events(Store(str(folder)), parse_config({"source": "x", "output": "y"}), str)


def written(part: Path) -> list[str]:
    return [json.loads(line)["event"] for line in part.read_text().splitlines()]


def test_events_that_cannot_be_written_are_written_later_or_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "_FLUSH_SECONDS_LOCAL", -1.0)
    record = record_in(tmp_path)
    runs, moved = tmp_path / "runs", tmp_path / "moved"
    runs.rename(moved)
    runs.touch()  # a file where the folder should be
    record.add("first")
    record.flush_when_due()
    record.add("second")
    monkeypatch.setattr(events, "_PATIENCE_SECONDS", -1.0)
    with pytest.raises(StorageError, match="cannot be written"):
        record.flush_when_due()
    runs.unlink()
    moved.rename(runs)
    record.flush_when_due()
    [part] = runs.glob("*/events-00000.jsonl")
    assert written(part) == ["first", "second"]


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
