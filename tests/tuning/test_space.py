"""The config of a tuning, its settings and trials, and the decisions of its scheduler, also after a kill."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from reinforce import settings
from reinforce.errors import UserError
from reinforce.storage import Storage
from reinforce.student.config import StudentConfig
from reinforce.terminal import Screen
from reinforce.training.results import Results
from reinforce.tuning.config import (
    LAMBDA,
    BaseStudent,
    Setting,
    Trial,
    TuneConfig,
    lambda_settings,
    render_student_yaml,
    scale_settings,
)
from reinforce.tuning.results import TrialOutcome, begin_trial, mark_stopped, read_outcome
from reinforce.tuning.search import Search, _Scheduler
from tests.helpers.tuning import METRIC, STUDENT, trial_student, tune_config

INVALID: list[tuple[dict[str, Any], str]] = [
    ({"scales": {"red": [10.0]}}, "scales.red: 10 is the only value, nothing to compare"),
    ({"scales": {}, "lambda": [1.0]}, "lambda: 1 is the only value, nothing to compare"),
    ({"scales": {}}, "nothing to try"),
    ({"mode": "joint", "scales": {"red": [10.0], "blue": [20.0]}}, "nothing to try"),
    ({"scales": {"red": [10.0, 10.0, 20.0]}}, "scales.red: duplicate value"),
    ({"seeds": [1, 1]}, "seeds: duplicate seed"),
    ({"scales": {"red": [0.0, 10.0]}}, "greater than 0"),
    ({"scales": {"red": {"from": 10, "to": 90}}}, "must be a list of values, or {from, to, count}"),
    ({"scales": {"red": {"from": -1, "to": 90, "count": 3}}}, "`from` and `to` must be numbers above 0"),
    ({"sample": 3}, "`sample` requires `mode: joint`"),
    ({"early_stopping": {"grace": 0.2}}, "early_stopping: Input should be a valid boolean"),
]


def test_invalid_configs_are_rejected_and_a_grid_has_equal_ratios() -> None:
    for keys, message in INVALID:
        with pytest.raises(UserError, match=message):
            tune_config(**keys)
    assert tune_config(scales={"red": {"from": 10, "to": 90, "count": 3}}).scales == {"red": [10.0, 30.0, 90.0]}


def test_independent_mode_tries_each_teacher_alone_and_lambda_with_all() -> None:
    tuning = tune_config(scales={"red": [10.0, 20.0], "blue": [5.0, 50.0]}, **{"lambda": [0.5, 1.0]})
    settings_ = scale_settings(tuning)
    assert [s.name for s in settings_] == ["red-10", "red-20", "blue-5", "blue-50"]
    base = BaseStudent(tuning)
    alone = base.trial_config(Trial(settings_[3], 7))
    assert (alone.data.teachers, alone.loss.logit_scales, alone.loss.lambda_) == (["blue"], {"blue": 50.0}, 0.7)
    assert (alone.seed, alone.output) == (7, "tuning/trials/blue-50_seed-7")
    later = lambda_settings(tuning, {"red": 20.0, "blue": 5.0})
    both = base.trial_config(Trial(later[0], 0))
    assert (both.data.teachers, both.loss.lambda_) == (["red", "blue"], 0.5)
    assert both.loss.logit_scales == {"red": 20.0, "blue": 5.0}


def test_joint_mode_tries_every_combination_or_a_sample() -> None:
    keys: dict[str, Any] = {"mode": "joint", "scales": {"red": [10.0, 20.0], "blue": [5.0, 50.0]}, "lambda": [0.5, 1.0]}
    every = scale_settings(tune_config(**keys))
    assert len({setting.name for setting in every}) == 8
    assert Setting("joint", {"red": 20.0, "blue": 5.0}, 1.0) in every
    some = scale_settings(tune_config(**keys, sample=3))
    assert some == scale_settings(tune_config(**keys, sample=3))
    assert len(some) == 3
    assert set(some) < set(every)


def test_trial_keys_replace_those_of_the_student_and_leave_it_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "student.yaml"
    path.write_text(yaml.safe_dump(STUDENT))
    base = BaseStudent(tune_config(student=str(path), trial={"train": {"steps": 100}}))
    assert (base.short.train.steps, base.short.train.epochs, base.short.train.batch) == (100, None, 64)
    assert base.short.train.optimizer.warmup == 10
    assert base.full.train.epochs == 3
    with pytest.raises(UserError, match=r"trial\.seed: set for each trial by the tuning"):
        BaseStudent(tune_config(trial={"seed": 3}))
    with pytest.raises(UserError, match=r"(?s)with the keys of `trial`.*known keys here"):
        BaseStudent(tune_config(trial={"train": {"stepps": 100}}))


def test_demo_tuning_config_matches_its_student(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    tuning = settings.load(TuneConfig, "configs/tune-demo.yaml")
    base = BaseStudent(tuning)
    assert set(tuning.scales) == set(base.full.data.teachers or [])
    assert tuning.metric in base.short.evaluate.metrics
    assert base.short.train.steps is not None
    assert list(base.short.evaluate.zero_shot) == ["held-out"]  # none of the demo's tests
    assert not base.short.evaluate.retrieval
    assert (base.short.evaluate.every or 0) < base.short.train.steps


def raw_student(url: str, loss: dict[str, Any] | None = None) -> dict[str, Any]:
    """A student's config as a user writes it."""
    return {
        "output": "before",
        "student": {"model": "MobileCLIP2-S0"},
        "data": {"datasets": url, "teachers": ["red", "blue", "x"], "captioners": {"coca": 2.0}},
        **({} if loss is None else {"loss": loss}),
        "train": {"epochs": 8, "batch": 128, "optimizer": {"lr": 1e-3}},
    }


@pytest.mark.parametrize("loss", [None, {"lambda": 0.7, "logit_scales": {"red": 10.0, "x": 5.0}, "features": "all"}])
def test_written_config_differs_in_scales_and_lambda_and_states_their_origins(
    tmp_path: Path, loss: dict[str, Any] | None
) -> None:
    best = {"red": 43.0, LAMBDA: 0.5}
    origins = {
        "red": "reinforce tune: best at 43 (0.6), # plateau",
        "blue": "unchanged: 30, dataset: model",
        LAMBDA: "best",
    }
    path = tmp_path / "student.yaml"
    path.write_text(
        render_student_yaml(raw_student("data", loss), best, origins, "runs/tuning/student", "Written by a test.")
    )
    text = path.read_text()
    written = settings.load(StudentConfig, path)
    before = settings.parse(StudentConfig, raw_student("data", loss))
    assert written.loss.logit_scales == {**before.loss.logit_scales, "red": 43.0}
    assert (written.loss.lambda_, written.loss.features) == (0.5, before.loss.features)
    assert written.output == "runs/tuning/student"
    assert written.model_copy(update={"output": "before", "loss": before.loss}) == before
    assert text.startswith("# Written by a test.\n")
    lines = [line.strip() for line in text.splitlines()]
    assert lines[lines.index("red: 43.0") - 1] == "# reinforce tune: best at 43 (0.6), # plateau"
    assert "# blue: unchanged: 30, dataset: model" in lines
    assert yaml.safe_load(text)["data"] == json.loads(json.dumps(raw_student("data")["data"]))


def evaluation(step: int, value: float) -> str:
    return json.dumps({"step": step, "metrics": {METRIC: value}})


def test_log_is_read_up_to_a_line_that_a_kill_truncated_and_to_the_evaluation_that_stopped_a_trial(
    tmp_path: Path,
) -> None:
    config = trial_student(tmp_path / "one")
    assert read_outcome(config, 12, METRIC) == TrialOutcome("open", []), "no log yet"
    Path(config.output).mkdir()
    lines = [evaluation(4, 0.1), json.dumps({"step": 5, "loss": 1.0}), evaluation(8, 0.2), '{"step": 9, "lo']
    Path(config.output, "log.jsonl").write_text("\n".join(lines))
    assert read_outcome(config, 12, METRIC) == TrialOutcome("open", [(4, 0.1), (8, 0.2)])
    mark_stopped(config, METRIC, 4, 0.1)
    assert read_outcome(config, 12, METRIC) == TrialOutcome("stopped", [(4, 0.1)])
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
    search = Search(tune_config(), METRIC, STEPS, Screen(), lambda: None)
    return _Scheduler(search, configs, stop_early=True)


def log_evaluation(config: StudentConfig, step: int, value: float) -> None:
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.jsonl", "a", encoding="utf-8") as log:
        log.write(evaluation(step, value) + "\n")


def evaluate(scheduler: _Scheduler, configs: dict[Trial, StudentConfig], trial: Trial, step: int, value: float) -> str:
    """Write an evaluation to the log of a training, then report it."""
    log_evaluation(configs[trial], step, value)
    tuned = SimpleNamespace(config={"name": trial.name})
    return scheduler.on_trial_result(None, tuned, {"step": step, "value": value})


def run_trials(
    scheduler: _Scheduler, configs: dict[Trial, StudentConfig], kill_after: int | None = None, logged: bool = False
) -> None:
    """Run one trial after another; the search is killed after so many evaluations, of which one more is ``logged``."""
    count = 0
    for trial, config in configs.items():
        outcome = read_outcome(config, STEPS, METRIC)
        if outcome.state != "open":
            continue
        for step, value in zip((4, 8, 12), CURVES[trial.setting.scales["red"]], strict=True):
            if step > max([0, *(at for at, _ in outcome.curve)]):
                if kill_after is not None and count == kill_after:
                    if logged:
                        log_evaluation(config, step, value)
                    return
                count += 1
                if evaluate(scheduler, configs, trial, step, value) == "STOP":
                    break
            if step == STEPS:
                results = Results(config.output, "student", STEPS, 96, 1.0, 1, 0.0, {}, None, 0, STEPS)
                results.write(Storage(config.output))


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
    for kill_after, logged in itertools.product(range(1, 13), (False, True)):
        killed = trials(tmp_path / f"{kill_after}-{logged}")
        run_trials(make_scheduler(killed), killed, kill_after, logged)
        again = make_scheduler(killed)
        for trial in killed:
            again.replay(trial, read_outcome(killed[trial], STEPS, METRIC))
        run_trials(again, killed)
        assert states(killed) == states(whole)


def test_a_trial_whose_metric_is_not_finite_falls_behind(tmp_path: Path) -> None:
    configs = trials(tmp_path)
    scheduler = make_scheduler(configs)
    first, second, third, *_ = configs
    decisions = [evaluate(scheduler, configs, trial, 4, value) for trial, value in ((first, 0.2), (second, 0.3))]
    assert [*decisions, evaluate(scheduler, configs, third, 4, float("nan"))] == ["CONTINUE", "CONTINUE", "STOP"]
