"""Stored datasets stay valid: their fingerprints and their content are those of tests/golden."""

import json
from pathlib import Path

import pytest

from tests.helpers.golden import GOLDEN, different, fingerprints, small_dataset


def test_the_fingerprints_of_the_shipped_configs_are_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])  # configs name models by relative paths
    assert fingerprints() == json.loads((GOLDEN / "fingerprints.json").read_text())


def test_the_files_of_a_small_dataset_are_unchanged() -> None:
    dataset, vectors = small_dataset()
    assert dataset == json.loads((GOLDEN / "dataset.json").read_text())
    assert different(vectors, json.loads((GOLDEN / "vectors.json").read_text())) == []
