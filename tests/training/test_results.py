"""results.json and the summary of a training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from reinforce.storage import Storage
from reinforce.training.checkpoint import BestCheckpoint
from reinforce.training.record.results import Results, read_results

RESULTS = Results(
    output="out",
    export="student",
    steps=100,
    samples=3200,
    seconds=50.0,
    parameters=12_300_000,
    loss=1.25,
    metrics={"top1": 0.5, "recall": None},
    best=BestCheckpoint(80, "top1", 0.75),
    skipped=0,
)


@pytest.mark.parametrize("results", [RESULTS, replace(RESULTS, best=None, loss=None)])
def test_results_are_read_as_they_were_written(tmp_path: Path, results: Results) -> None:
    storage = Storage(str(tmp_path))
    assert read_results(storage) is None
    results.write(storage)
    assert read_results(storage) == results


def test_the_keys_of_results_json_stay(tmp_path: Path) -> None:
    RESULTS.write(Storage(str(tmp_path)))
    written = json.loads((tmp_path / "results.json").read_text())
    assert list(written) == [
        "output", "export", "steps", "samples", "seconds", "parameters", "loss", "metrics", "best", "skipped",
        "seconds_per_step", "samples_per_second", "files",
    ]  # fmt: skip
    assert (written["seconds_per_step"], written["samples_per_second"]) == (0.5, 64.0)
    assert written["best"] == {"step": 80, "metric": "top1", "value": 0.75}
    assert written["files"] == {
        "weights": "student",
        "checkpoints": "checkpoints",
        "log": "log.jsonl",
        "tensorboard": "tensorboard",
        "curves": "curves.png",
    }


def test_the_summary_has_a_line_for_each_number() -> None:
    assert replace(RESULTS, skipped=2).summary().splitlines() == [
        "trained 12.3 million parameters for 100 steps on 3,200 samples in 0:00:50 (0.5 s per step, 64 samples/s)",
        "final loss: 1.2500",
        "top1: 0.5000",
        "recall: not finite",
        "best top1: 0.7500 at step 80, kept as a checkpoint",
        "2 steps were skipped because their gradient was not finite",
        "weights: out/student   curves: out/curves.png",
    ]


def test_the_summary_does_not_repeat_a_best_step_that_is_the_last() -> None:
    assert "best" not in replace(RESULTS, best=BestCheckpoint(100, "top1", 0.5)).summary()
