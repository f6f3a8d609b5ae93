"""Events of a run, with a storage that fails for a while."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reinforce.config import parse_config
from reinforce.dataset.files.store import Store
from reinforce.engine.record import events
from reinforce.errors import StorageError
from teachers.redact import Redactor


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


def test_a_new_part_begins_after_a_mebibyte(tmp_path: Path) -> None:
    record = events.Events(Store(str(tmp_path)), parse_config({"source": "x", "output": "y"}), str)
    for number in range(3):
        record.add("long", text=str(number) * 600_000)
        record.flush()
    record.finish({"status": 0})
    parts = sorted(tmp_path.glob("runs/*/events-*.jsonl"))
    assert [[json.loads(line)["event"] for line in part.read_text().splitlines()] for part in parts] == [
        ["long", "long"],
        ["long", "end"],
    ]
    assert json.loads((parts[0].parent / "summary.json").read_text()) == {"status": 0}


def test_the_recorded_config_and_events_have_no_secrets(tmp_path: Path) -> None:
    teachers = {"t": {"class": "tests.helpers.models:TextOnly", "options": {"hf_token": "hf_t0ken-of-eve"}}}
    config = parse_config({"source": "s3://eve:p4ssw0rd@bucket/x.tar", "output": "y", "teachers": teachers})
    record = events.Events(Store(str(tmp_path)), config, Redactor(config.model_dump(mode="json")))
    record.add("shard_raised", error="s3://eve:p4ssw0rd@bucket/x.tar does not accept hf_t0ken-of-eve")
    record.finish({})
    [folder] = (tmp_path / "runs").iterdir()
    written = "".join(path.read_text() for path in folder.iterdir())
    assert "p4ssw0rd" not in written
    assert "hf_t0ken" not in written
    assert "s3://bucket/x.tar" in written
