"""Trainings that run in parallel."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from reinforce.demo import students
from reinforce.demo.students import train_side_by_side
from reinforce.errors import UserError
from tests.helpers.demo import ROOT


def test_failed_training_is_named_and_terminates_the_others(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    trainings = {
        name: [f"output={tmp_path}/{name}", f"no-{name}=1"]  # found before models are imported
        for name in ("first", "second", "third")
    }
    with pytest.raises(UserError, match=r"the training '(first|second)' failed with status 2"):
        train_side_by_side(trainings, tmp_path)
    printed = capfd.readouterr().out
    assert re.search(r"(first |second) \| error: ", printed)
    assert re.search(r"(first |second) \|   no-(first|second): unknown key", printed)
    assert "third" not in printed
    assert "unknown key" in "".join(path.read_text() for path in tmp_path.glob("*.log"))


def test_progress_is_shown_and_metrics_are_not() -> None:
    shown = ["step 1,040 of 2,000  loss 4.5", "resuming after step 40 of 200"]
    lines = [*shown, "step 200: zero_shot/own-style/top1 0.3", "final loss: 2.1"]
    assert [line for line in lines if students._SHOWN.match(line)] == shown
