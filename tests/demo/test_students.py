"""Trainings that run in parallel."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

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
