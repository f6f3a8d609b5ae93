"""The step benchmark on a tiny student, and its stored results."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import step


def test_stored_targets_add_operations_to_a_plain_step(tmp_path: Path) -> None:
    result = step.Bench(tmp_path, "cpu").measure(step.Case("tiny", batch=4, rounds=1, online=0))
    assert set(result["ratio"]) == {"plain", "stored"}
    assert result["ratio"]["plain"] == result["limit"]["plain"] == 1
    assert result["operations"]["stored"] > result["operations"]["plain"]
    assert result[f"limit of stored at {step.LARGE}"] > result["limit"]["stored"] > 1


def test_stored_results_are_shown_as_a_table() -> None:
    stored = json.loads(step.RESULTS.read_text())
    lines = step.table(stored["students"]).splitlines()
    assert lines[0].split() == ["student", "batch", "step", "seconds", "x", "plain", "limit"]
    assert len(lines) == 1 + sum(len(result["ratio"]) + 1 for result in stored["students"].values())
    assert max(result["ratio"]["stored"] for result in stored["students"].values()) <= stored["bound"]
