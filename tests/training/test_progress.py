"""The speed of a training, as numbers and as a line."""

from __future__ import annotations

import pytest

import reinforce.training.record.progress
from reinforce.training.record.progress import Throughput, TimeLeft, format_row

ROW = {"step": 1200, "epoch": 0.5, "loss": 3.25, "samples_per_second": 2048.0, "waiting": 0.125, "skipped": 0}


def test_throughput_counts_samples_and_waiting_since_the_last_row() -> None:
    throughput = Throughput()
    throughput.add_step(seconds=1.5, idle=0.5)
    throughput.add_step(seconds=0.5, idle=0.0)
    assert throughput.measure(batch=64) == {"samples_per_second": 64.0, "waiting": 0.25}
    throughput.add_step(seconds=0.5, idle=0.5)
    assert throughput.measure(batch=64) == {"samples_per_second": 128.0, "waiting": 1.0}


def test_the_time_left_follows_from_the_average_step_since_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([100.0, 130.0])
    monkeypatch.setattr(reinforce.training.record.progress.time, "monotonic", lambda: next(now))
    assert TimeLeft(start=10, steps=40).seconds(20) == 60.0  # 3 s a step, 20 steps left


def test_a_row_is_one_line() -> None:
    line = "step 1,200 of 5,000  epoch 0.50  loss 3.2500  2,048 samples/s  waiting for data 12%  ETA 0:01:30"
    assert format_row(ROW, 5000, 90.0) == line
    assert format_row({**ROW, "skipped": 3}, 5000, 90.0) == f"{line}  3 steps skipped"
