"""A study of the ablations in a temporary folder."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest

from benchmarks.ablations.arms import Study
from reinforce import settings
from tests.helpers.demo import ROOT

_PARSED = cache(settings.load_yaml)


@pytest.fixture(autouse=True)
def read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse each YAML text once: arms read the configs of the demo thousands of times."""
    monkeypatch.setattr(settings, "load_yaml", lambda text: deepcopy(_PARSED(text)))


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    monkeypatch.chdir(ROOT)
    return Study(tmp_path / "out")
