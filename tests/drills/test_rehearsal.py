"""The steps of docs/recipes.md, in the process of the test."""

from __future__ import annotations

from pathlib import Path

import pytest

import reinforce
from drills.rehearsal.__main__ import ROOT, rehearse
from reinforce.config import load_config
from tests.helpers.commands import printed_by
from tests.helpers.reinforced import reinforce_here


@pytest.mark.usefixtures("no_pictures")
def test_published_labels_become_a_student_that_is_compared_with_published_models(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    printed = {}

    def run(words: list[str]) -> None:
        command, config, *options = words
        if command == "run":
            reinforce_here(load_config(config, options[1::2]))
        else:
            printed[command] = printed_by(capfd, *words)

    metrics = rehearse(tmp_path, run, samples=36, steps=16)
    assert "1 shard, 1 with something missing" in printed["plan"]
    assert len([*reinforce.open(f"{tmp_path}/dataset")]) == 36, "joined by URL, since the keys differ"
    assert "embeddings/dfn2b-s39b/coca        1/1" in printed["status"]
    assert metrics["cifar10"] >= 0.9, "chance is 0.17"
    assert "mobileclip2_b" in printed["evaluate"]
    assert "mean of 9 of 38 sets" in printed["evaluate"]
    assert min(metrics[f"wilds/{name}"] for name in ("iwildcam", "camelyon17", "fmow")) >= 0.8
    assert metrics["fairness/dollar_street"] >= 0.9, "of the worst group; chance is 0.83"
    assert metrics["misc/winogavil"] >= 0.4, "chance is 0.1"
