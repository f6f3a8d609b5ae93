"""Trial folders: what identifies a trial, and how its state is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reinforce.errors import UserError
from reinforce.student.config import StudentConfig
from reinforce.tuning.trials import Outcome, begin_trial, mark_stopped, read_outcome
from tests.helpers.tuning import METRIC, trial_student


def write_log(config: StudentConfig, *lines: str) -> None:
    Path(config.output).mkdir(exist_ok=True)
    Path(config.output, "log.jsonl").write_text("\n".join(lines))


def evaluation(step: int, value: float) -> str:
    return json.dumps({"step": step, "metrics": {METRIC: value}})


def test_trial_without_a_log_is_open(tmp_path: Path) -> None:
    assert read_outcome(trial_student(tmp_path / "one"), 12, METRIC) == Outcome("open", [])


def test_log_is_read_up_to_a_line_that_a_kill_truncated(tmp_path: Path) -> None:
    config = trial_student(tmp_path / "one")
    write_log(config, evaluation(4, 0.1), json.dumps({"step": 5, "loss": 1.0}), evaluation(8, 0.2), '{"step": 9, "lo')
    assert read_outcome(config, 12, METRIC) == Outcome("open", [(4, 0.1), (8, 0.2)])


def test_stopped_trial_ends_at_the_evaluation_that_stopped_it(tmp_path: Path) -> None:
    config = trial_student(tmp_path / "one")
    write_log(config, evaluation(4, 0.1), evaluation(8, 0.2))
    mark_stopped(config, METRIC, 4, 0.1)
    assert read_outcome(config, 12, METRIC) == Outcome("stopped", [(4, 0.1)])
    assert read_outcome(config, 12, "another").state == "open"
    stored = json.loads((tmp_path / "one" / "stopped.json").read_text())
    assert stored == {"metric": METRIC, "step": 4, "value": 0.1, "by": "ASHA"}


def test_folder_of_another_training_is_rejected(tmp_path: Path) -> None:
    begin_trial(trial_student(tmp_path / "one"), 12)
    begin_trial(trial_student(tmp_path / "one", checkpoints={"every": 5}), 12)  # no effect on the weights
    with pytest.raises(UserError, match=r"train\.batch: 8 before, 16 now"):
        begin_trial(trial_student(tmp_path / "one", batch=16), 12)
    with pytest.raises(UserError, match=r"train\.steps: 12 before, 13 now"):
        begin_trial(trial_student(tmp_path / "one"), 13)
