"""Trial folders, and decisions of the scheduler, which are the same after a search is killed and resumed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from reinforce.errors import UserError
from reinforce.student.config import StudentConfig
from reinforce.terminal import Screen
from reinforce.tuning.config import EarlyStopping
from reinforce.tuning.search import Search, _Scheduler
from reinforce.tuning.space import Setting, Trial
from reinforce.tuning.trials import Outcome, begin_trial, mark_stopped, read_outcome
from tests.helpers.tuning import METRIC, trial_student


def write_log(config: StudentConfig, *lines: str) -> None:
    Path(config.output).mkdir(exist_ok=True)
    Path(config.output, "log.jsonl").write_text("\n".join(lines))


def evaluation(step: int, value: float) -> str:
    return json.dumps({"step": step, "metrics": {METRIC: value}})


def test_log_is_read_up_to_a_line_that_a_kill_truncated_and_to_the_evaluation_that_stopped_a_trial(
    tmp_path: Path,
) -> None:
    config = trial_student(tmp_path / "one")
    assert read_outcome(config, 12, METRIC) == Outcome("open", []), "no log yet"
    write_log(config, evaluation(4, 0.1), json.dumps({"step": 5, "loss": 1.0}), evaluation(8, 0.2), '{"step": 9, "lo')
    assert read_outcome(config, 12, METRIC) == Outcome("open", [(4, 0.1), (8, 0.2)])
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


STEPS = 12
#: The metric at steps 4, 8 and 12, by scale.
CURVES = {
    10.0: [0.2, 0.3, 0.4],
    20.0: [0.3, 0.35, 0.5],
    30.0: [0.1, 0.2, 0.3],
    40.0: [0.4, 0.5, 0.6],
    50.0: [0.31, 0.32, 0.4],
}


def trials(folder: Path) -> dict[Trial, StudentConfig]:
    made = [Trial(Setting("red", {"red": scale}, alone=True), 0) for scale in CURVES]
    return {trial: trial_student(folder / trial.name, STEPS) for trial in made}


def make_scheduler(configs: dict[Trial, StudentConfig]) -> _Scheduler:
    early = EarlyStopping(grace=0.3, reduction=2.0)
    search = Search("out", METRIC, STEPS, early, None, Screen(), lambda: None)
    return _Scheduler(search, configs, stop_early=True)


def evaluate(scheduler: _Scheduler, configs: dict[Trial, StudentConfig], trial: Trial, step: int, value: float) -> str:
    """Write an evaluation to the log of a training, then report it."""
    folder = Path(configs[trial].output)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.jsonl", "a", encoding="utf-8") as log:
        log.write(json.dumps({"step": step, "metrics": {METRIC: value}}) + "\n")
    tuned = SimpleNamespace(config={"name": trial.name})
    return scheduler.on_trial_result(None, tuned, {"step": step, "value": value})


def run_trials(scheduler: _Scheduler, configs: dict[Trial, StudentConfig], kill_after: int | None = None) -> None:
    """Run one trial after another; the search is killed after ``kill_after`` evaluations."""
    count = 0
    for trial, config in configs.items():
        outcome = read_outcome(config, STEPS, METRIC)
        if outcome.state != "open":
            continue
        for step, value in zip((4, 8, 12), CURVES[trial.setting.scales["red"]], strict=True):
            if step <= max([0, *(at for at, _ in outcome.curve)]):
                continue
            if kill_after is not None and count == kill_after:
                return
            count += 1
            if evaluate(scheduler, configs, trial, step, value) == "STOP":
                break
            if step == STEPS:
                results = {"steps": STEPS, "seconds": 1.0, "best": None, "output": "", "export": "student"}
                rest = {"samples": 96, "parameters": 1, "loss": 0.0, "metrics": {}, "skipped": 0}
                (Path(config.output) / "results.json").write_text(json.dumps(results | rest))


def states(configs: dict[Trial, StudentConfig]) -> dict[float, tuple[str, int]]:
    outcomes = {trial: read_outcome(configs[trial], STEPS, METRIC) for trial in configs}
    return {t.setting.scales["red"]: (o.state, o.curve[-1][0]) for t, o in outcomes.items()}


def test_trials_that_fall_behind_at_a_rung_are_stopped_also_in_a_search_that_was_killed_and_resumed(
    tmp_path: Path,
) -> None:
    whole = trials(tmp_path / "whole")
    run_trials(make_scheduler(whole), whole)
    assert states(whole) == {
        10.0: ("finished", 12), 20.0: ("finished", 12), 30.0: ("stopped", 4), 40.0: ("finished", 12),
        50.0: ("stopped", 8),
    }  # fmt: skip
    for kill_after in range(1, 13):
        killed = trials(tmp_path / str(kill_after))
        run_trials(make_scheduler(killed), killed, kill_after=kill_after)
        again = make_scheduler(killed)
        for trial in killed:
            again.replay(trial, read_outcome(killed[trial], STEPS, METRIC))
        run_trials(again, killed)
        assert states(killed) == states(whole)


def test_evaluation_that_was_logged_but_not_reported_is_decided_on_resume(tmp_path: Path) -> None:
    """The next search replays the log before it continues the trial, and stops it."""
    configs = trials(tmp_path)
    scheduler = make_scheduler(configs)
    first, second, third, *_ = configs
    for trial in (first, second):
        for step, value in zip((4, 8, 12), CURVES[trial.setting.scales["red"]], strict=True):
            evaluate(scheduler, configs, trial, step, value)
    folder = Path(configs[third].output)
    folder.mkdir()
    (folder / "log.jsonl").write_text(json.dumps({"step": 4, "metrics": {METRIC: 0.1}}) + '\n{"step": 5, "lo')
    again = make_scheduler(configs)
    for trial in (first, second, third):
        again.replay(trial, read_outcome(configs[trial], STEPS, METRIC))
    assert read_outcome(configs[third], STEPS, METRIC).state == "stopped"
