"""Events of a run, with a storage that fails for a while."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reinforce.config import parse_config
from reinforce.dataset.store import Store
from reinforce.engine import events
from reinforce.errors import StorageError


def test_events_that_cannot_be_written_are_written_later_or_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "_FLUSH_SECONDS_LOCAL", -1.0)
    record = events.Events(Store(str(tmp_path)), parse_config({"source": "x", "output": "y"}), str)
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
    [written] = runs.glob("*/events-00000.jsonl")
    assert [json.loads(line)["event"] for line in written.read_text().splitlines()] == ["first", "second"]
