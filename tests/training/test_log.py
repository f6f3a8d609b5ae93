"""The rows of a log, on a disk and in an object store, and its TensorBoard events."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from reinforce.storage import Storage
from reinforce.training.record.log import Log


def row(step: int, loss: float = 1.0) -> dict[str, Any]:
    return {"step": step, "loss": loss, "losses": {"clip": loss}}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_row_is_on_disk_at_once_and_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    with Log(Storage(str(tmp_path)), 0) as log:
        log.add(row(1))
        log.add(row(2, math.nan))
        assert read(tmp_path / "log.jsonl") == [row(1), {"step": 2, "loss": None, "losses": {"clip": None}}]
        assert log.rows == read(tmp_path / "log.jsonl")


def test_rows_after_the_last_checkpoint_and_a_truncated_row_are_deleted(tmp_path: Path) -> None:
    rows = [json.dumps(row(step)) for step in (1, 2, 3)]
    (tmp_path / "log.jsonl").write_text("\n".join([*rows, '{"step": 4, "lo']))
    with Log(Storage(str(tmp_path)), 2) as log:
        assert read(tmp_path / "log.jsonl") == [row(1), row(2)]
        log.add(row(3, 0.5))
    assert read(tmp_path / "log.jsonl") == [row(1), row(2), row(3, 0.5)]


def test_events_have_a_scalar_for_every_number(tmp_path: Path) -> None:
    with Log(Storage(str(tmp_path)), 0) as log:
        log.add(row(1, 0.25))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "losses/clip"}
    assert [(event.step, event.value) for event in events.Scalars("losses/clip")] == [(1, 0.25)]


@pytest.mark.parametrize("last", [False, True])
def test_publish_draws_the_curves_at_the_end_but_not_at_once(tmp_path: Path, last: bool) -> None:
    with Log(Storage(str(tmp_path)), 0) as log:
        log.add({**row(1), "lr": 0.1})
        log.publish(last)
    assert (tmp_path / "curves.png").exists() == last


def test_in_an_object_store_rows_appear_with_publish_and_are_continued() -> None:
    storage = Storage("memory://logs/one")
    with Log(storage, 0) as log:
        log.add(row(1))
        assert not storage.fs.exists(storage.path("log.jsonl"))
        log.publish()
    with Log(storage, 1) as log:
        log.add(row(2))
        log.publish()
    lines = storage.fs.cat_file(storage.path("log.jsonl")).decode().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert len(storage.fs.ls(storage.path("tensorboard"), detail=False)) == 2
