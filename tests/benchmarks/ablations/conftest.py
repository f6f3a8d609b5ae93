"""A study of the ablations in a temporary folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.ablations.arms import Study
from tests.helpers.demo import ROOT


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    monkeypatch.chdir(ROOT)
    return Study(tmp_path / "out")
