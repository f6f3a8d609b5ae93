"""What ASHA decides, and that a search that was killed decides no other way."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from reinforce import settings
from reinforce.errors import UserError
from reinforce.student.config import StudentConfig
from reinforce.terminal import Screen
from reinforce.tuning.config import EarlyStopping
from reinforce.tuning.search import Search, _Judges
from reinforce.tuning.space import Setting, Trial
from reinforce.tuning.trials import begin, outcome_of

METRIC = "retrieval/own/text_to_image/r1"
STEPS = 12
#: The metric at steps 4, 8 and 12, by scale.
CURVES = {
    10.0: [0.2, 0.3, 0.4],
    20.0: [0.3, 0.35, 0.5],
    30.0: [0.1, 0.2, 0.3],
    40.0: [0.4, 0.5, 0.6],
    50.0: [0.31, 0.32, 0.4],
}


def config(output: Path, **train: Any) -> StudentConfig:
    return settings.parse(
        StudentConfig,
        {
            "output": str(output),
            "student": {"model": "MobileCLIP2-S0"},
            "data": {"datasets": "data"},
            "train": {"steps": STEPS, "batch": 8, **train},
        },
    )


def trials(folder: Path) -> dict[Trial, StudentConfig]:
    made = [Trial(Setting("red", {"red": scale}, alone=True), 0) for scale in CURVES]
    return {trial: config(folder / trial.name) for trial in made}


def judges(of: dict[Trial, StudentConfig]) -> _Judges:
    early = EarlyStopping(grace=0.3, reduction=2.0)
    search = Search("out", METRIC, STEPS, early, None, Screen(), lambda: None)
    return _Judges(search, of, judged=True)


def evaluate(judge: _Judges, of: dict[Trial, StudentConfig], trial: Trial, step: int, value: float) -> str:
    """A training writes its log, and then tells."""
    folder = Path(of[trial].output)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.jsonl", "a", encoding="utf-8") as log:
        log.write(json.dumps({"step": step, "metrics": {METRIC: value}}) + "\n")
    tuned = SimpleNamespace(config={"name": trial.name})
    return judge.on_trial_result(None, tuned, {"step": step, "value": value})


def run(judge: _Judges, of: dict[Trial, StudentConfig], upto: int | None = None) -> None:
    """One trial after another; the search is killed after ``upto`` evaluations."""
    count = 0
    for trial, config_ in of.items():
        outcome = outcome_of(config_, STEPS, METRIC)
        if outcome.state != "open":
            continue
        for step, value in zip((4, 8, 12), CURVES[trial.setting.scales["red"]], strict=True):
            if step <= max([0, *(at for at, _ in outcome.curve)]):
                continue
            if upto is not None and count == upto:
                return
            count += 1
            if evaluate(judge, of, trial, step, value) == "STOP":
                break
            if step == STEPS:
                results = {"steps": STEPS, "seconds": 1.0, "best": None, "output": "", "export": "student"}
                rest = {"samples": 96, "parameters": 1, "loss": 0.0, "metrics": {}, "skipped": 0}
                (Path(config_.output) / "results.json").write_text(json.dumps(results | rest))


def states(of: dict[Trial, StudentConfig]) -> dict[float, tuple[str, int]]:
    outcomes = {trial: outcome_of(of[trial], STEPS, METRIC) for trial in of}
    return {t.setting.scales["red"]: (o.state, o.curve[-1][0]) for t, o in outcomes.items()}


def test_trials_that_fall_behind_at_a_rung_are_stopped_there(tmp_path: Path) -> None:
    of = trials(tmp_path)
    run(judges(of), of)
    assert states(of) == {
        10.0: ("finished", 12), 20.0: ("finished", 12), 30.0: ("stopped", 4), 40.0: ("finished", 12),
        50.0: ("stopped", 8),
    }  # fmt: skip


@pytest.mark.parametrize("killed_after", range(1, 13))
def test_killed_anywhere_it_decides_as_if_it_had_not_been(tmp_path: Path, killed_after: int) -> None:
    whole, killed = trials(tmp_path / "whole"), trials(tmp_path / "killed")
    run(judges(whole), whole)
    run(judges(killed), killed, upto=killed_after)
    again = judges(killed)
    for trial in killed:
        again.remember(trial, outcome_of(killed[trial], STEPS, METRIC))
    run(again, killed)
    assert states(killed) == states(whole)


def test_a_decision_that_a_kill_has_swallowed_is_made_up_for(tmp_path: Path) -> None:
    """The evaluation is in the log, and nobody was told: it is judged at the next start, before the trial goes on."""
    of = trials(tmp_path)
    judge = judges(of)
    first, second, third, *_ = of
    for trial in (first, second):
        for step, value in zip((4, 8, 12), CURVES[trial.setting.scales["red"]], strict=True):
            evaluate(judge, of, trial, step, value)
    folder = Path(of[third].output)
    folder.mkdir()
    (folder / "log.jsonl").write_text(json.dumps({"step": 4, "metrics": {METRIC: 0.1}}) + '\n{"step": 5, "lo')
    again = judges(of)
    for trial in (first, second, third):
        again.remember(trial, outcome_of(of[trial], STEPS, METRIC))
    assert outcome_of(of[third], STEPS, METRIC).state == "stopped"


def test_a_trial_that_was_stopped_by_another_metric_goes_on(tmp_path: Path) -> None:
    of = trials(tmp_path)
    run(judges(of), of)
    stopped = next(trial for trial in of if trial.setting.scales["red"] == 30.0)
    assert outcome_of(of[stopped], STEPS, "another").state == "open"


def test_a_folder_with_another_training_is_told(tmp_path: Path) -> None:
    begin(config(tmp_path / "one"), STEPS)
    begin(config(tmp_path / "one", checkpoints={"every": 5}), STEPS)  # which changes nothing that is learnt
    with pytest.raises(UserError, match=r"train\.batch: 8 then, 16 now"):
        begin(config(tmp_path / "one", batch=16), STEPS)
    with pytest.raises(UserError, match=r"train\.steps: 12 then, 13 now"):
        begin(config(tmp_path / "one"), STEPS + 1)
