"""`reinforce tune` on a tiny dataset: complete, resumed, and with errors that are reported before anything trains."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from reinforce import settings
from reinforce.cli import main
from reinforce.dataset.manifest import read_manifest
from reinforce.dataset.store import Store
from reinforce.settings import parse
from reinforce.student.config import StudentConfig
from reinforce.student.train import build
from reinforce.terminal import Screen
from reinforce.training.log import LOG
from reinforce.tuning.command import _run_stage
from reinforce.tuning.config import BaseStudent, Trial, TuneConfig, scale_settings
from reinforce.tuning.results import TrialOutcome
from reinforce.tuning.screening import SUBSETS
from reinforce.tuning.search import Search
from teachers.runtime.accelerator import Accelerator
from tests.helpers.reinforced import small_dataset
from tests.helpers.students import student_folder

STEPS = 4
METRIC = "retrieval/own/text_to_image/r10"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A tuning without its output."""
    folder = tmp_path_factory.mktemp("tuning")
    url = small_dataset(folder, sizes=(21, 9))
    student = {
        "output": str(folder / "student"),
        "student": {"model": student_folder(folder / "model")},
        "data": {"datasets": url, "workers": 0, "streams": 2, "window": 16},
        "loss": {"logit_scales": {"blue": 30.0}},
        "train": {"epochs": 40, "batch": 8, "optimizer": {"lr": 0.002, "warmup": 1}},
        "evaluate": {"every": 500, "retrieval": {"own": {"pairs": url}}},
    }
    (folder / "student.yaml").write_text(yaml.safe_dump(student))
    return {
        "output": "",
        "student": str(folder / "student.yaml"),
        "trial": {"train": {"steps": STEPS, "compute": {"cpus": 2}}, "evaluate": {"every": 2}},
        "scales": {"red": [5.0, 50.0]},
        "seeds": [0],  # each stage of a search starts a process
        "metric": METRIC,
        "screening": {"batches": 2},
    }


def tune(config: dict[str, Any], output: Path, *options: str, path: Path | None = None) -> int:
    path = path or output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({**config, "output": str(output)}))
    with pytest.raises(SystemExit) as ended:
        main(["tune", str(path), *options])
    return ended.value.code if isinstance(ended.value.code, int) else 0


def table_of(output: Path) -> dict[str, Any]:
    """table.json without its times."""
    table: dict[str, Any] = json.loads((output / "table.json").read_text())
    return {key: value for key, value in table.items() if key != "seconds"}


def test_tuning_writes_results_resumes_and_records_scales(
    ray_session: None, config: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert tune(config, output) == 0
    printed, _ = capfd.readouterr()
    table = table_of(output)
    (curve,) = table["curves"]
    assert (curve["axis"], table["found"]) == ("red", {"red": curve["best"]})
    assert "1 trial at a time, 2 CPUs each" in printed, "as `train.compute.cpus` says"
    assert curve["told"] in printed.replace("\n", " ")
    finished = [row for row in table["rows"] if row["state"] == "finished"]
    assert len(finished) == 2  # one may be stopped first, and then resumed as a neighbour of the best
    for row in finished:
        for seed, value in row["values"].items():
            results = json.loads((output / "trials" / f"red-{row['red']:g}_seed-{seed}" / "results.json").read_text())
            assert (results["steps"], results["metrics"][METRIC]) == (STEPS, value)
    assert (output / "scales.png").read_bytes().startswith(b"\x89PNG")
    screened = json.loads((output / "screening.json").read_text())
    assert set(screened) == {"red", SUBSETS}
    assert table["subsets"] == screened[SUBSETS]
    assert [len(one["teachers"]) for one in table["subsets"]["subsets"]].count(1) == 2
    assert not (output / ".ray").exists()
    written = settings.load(StudentConfig, output / "student.yaml")
    assert written.loss.logit_scales == {"blue": 30.0, **table["found"]}
    assert (written.train.epochs, written.train.steps) == (40, None)
    build(written, Accelerator("cpu"))

    # Finished trials are not trained again; an interrupted one gives the same result.
    logs = {path: path.read_bytes() for path in output.glob(f"trials/*/{LOG}")}
    best = output / "trials" / f"red-{curve['best']:g}_seed-0"
    (best / "results.json").unlink()
    shutil.rmtree(best / "student")
    (best / "checkpoints" / f"step-{STEPS:09d}.safetensors").unlink()
    (best / "checkpoints" / "best.json").unlink()
    del logs[best / LOG]
    assert tune(config, output, "--record", "--json") == 0
    shown, printed = capfd.readouterr()
    found = json.loads(shown)  # only JSON is on standard output
    [recorded] = found.pop("recorded")
    assert found == {"output": str(output), **json.loads((output / "table.json").read_text()), "errors": []}
    assert f"red-{curve['best']:g}_seed-0: step {STEPS} of {STEPS}" in printed
    assert table_of(output) == table
    assert {path: path.read_bytes() for path in logs} == logs

    url = str(written.data.datasets[0].url)
    entry = read_manifest(Store(url))["teachers"]["red"]
    assert entry["logit_scale"] == curve["best"]
    assert entry["logit_scale_from"].startswith(f"tuned by {METRIC}")
    assert f"logit scale of red is now {curve['best']:g}, was 50 (config)" in recorded

    # Trials that fit no machine: Ray itself would wait without limit.
    trial = {**config["trial"], "train": {"steps": STEPS, "compute": {"cpus": 64}}}
    assert tune({**config, "trial": trial}, tmp_path / "large") == 2
    assert "each needs 64 CPUs on one node" in capfd.readouterr().err


def test_settings_that_are_not_stopped_are_trained_with_every_seed_and_then_the_neighbours_of_the_plateau(
    config: dict[str, Any],
) -> None:
    values = {10.0: 0.1, 20.0: 0.6, 40.0: 0.6, 80.0: 0.2}
    asked: list[tuple[bool, list[str]]] = []

    class Answers(Search):
        def run(self, trials: Mapping[Trial, StudentConfig], stop_early: bool) -> dict[Trial, TrialOutcome]:
            asked.append((stop_early, [trial.name for trial in trials]))
            return {
                trial: TrialOutcome("stopped" if stop_early and trial.setting.scales["red"] in (10.0, 80.0)
                               else "finished", [(STEPS, values[trial.setting.scales["red"]] + 0.02 * trial.seed)])
                for trial in trials
            }  # fmt: skip

    made = parse(TuneConfig, {**config, "output": "out", "scales": {"red": [*values]}, "seeds": [0, 1]})
    search = Answers(made, METRIC, STEPS, Screen(), lambda: None)
    outcomes = _run_stage(BaseStudent(made), search, scale_settings(made))
    assert asked == [
        (True, [f"red-{scale:g}_seed-0" for scale in values]),
        (False, ["red-20_seed-1", "red-40_seed-1"]),
        (False, [f"red-{scale}_seed-{seed}" for seed in (0, 1) for scale in (10, 80)]),
    ]
    assert len(outcomes) == 8


def test_screen_only_trains_nothing_and_asks_for_no_trials(
    config: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "both"
    assert tune({**config, "scales": {"red": [5.0, 50.0], "blue": [5.0, 9.0]}}, output, "--screen-only") == 0
    out = capfd.readouterr().out
    assert "likely" in out
    assert "Subsets of the teachers" in out
    assert "best subset of the teachers, expected log-likelihood -" in out
    assert {path.name for path in output.iterdir()} == {".tmp", "screening.json", "scales.png"}
    without = with_student(lambda student: student.pop("evaluate"))(config)
    without = {**without, "trial": {}, "metric": None}
    assert tune(without, tmp_path / "trials") == 2
    assert "no evaluation set" in capfd.readouterr().err
    assert tune(without, tmp_path / "out", "--screen-only") == 0
    assert set(json.loads((tmp_path / "out/screening.json").read_text())) == {"red", SUBSETS}
    assert tune({**without, "scales": {}, "lambda": [0.5, 1.0]}, tmp_path / "none", "--screen-only") == 2
    assert "has no scales to screen" in capfd.readouterr().err
    before = Path(config["student"]).read_bytes()
    assert tune(without, tmp_path / "recorded", "--screen-only", "--record") == 2
    assert "--record writes the scales that trials found, and --screen-only trains none" in capfd.readouterr().err
    assert (Path(config["student"]).read_bytes(), (tmp_path / "recorded").exists()) == (before, False)


def test_teachers_of_one_side_are_named_as_left_out_and_one_teacher_has_no_table_of_subsets(
    config: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    teachers = {
        "red": {"class": "tests.helpers.models:ColorTeacher"},
        "eye": {"class": "tests.helpers.models:ImageOnly"},
        "ear": {"class": "tests.helpers.models:TextOnly"},
    }
    url = small_dataset(tmp_path, (13,), teachers=teachers)
    changed = with_student(lambda student: (student["data"].update(datasets=url), student.pop("loss")))(config)
    assert tune(changed, tmp_path / "one", "--screen-only") == 0
    out = capfd.readouterr().out
    assert "subsets of the teachers: eye is left out, it has embeddings of images only" in out
    assert "subsets of the teachers: ear is left out, it has embeddings of texts only" in out
    assert "Subsets" not in out
    assert "best subset" not in out
    assert tune(changed, tmp_path / "one", "--screen-only", "--json") == 0
    found = json.loads(capfd.readouterr().out)[SUBSETS]
    assert (found["subsets"], list(found["left_out"])) == ([], ["eye", "ear"])


def with_student(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def changed(config: dict[str, Any]) -> dict[str, Any]:
        student = yaml.safe_load(Path(config["student"]).read_text())
        change(student)
        return {**config, "student": student}

    return changed


FAULTS: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "no set": (with_student(lambda s: s.pop("evaluate")), "has no evaluation set"),
    "one value": (lambda c: {**c, "scales": {"red": [50.0]}}, "nothing to compare"),
    "another teacher": (lambda c: {**c, "scales": {"green": [5.0, 9.0]}}, "no teacher 'green'; it has: red, blue"),
    "another metric": (lambda c: {**c, "metric": "loss"}, "no evaluation set has 'loss'; available: retrieval/own"),
    "no early evaluation": (lambda c: {**c, "trial": {"train": {"steps": 4}}}, "Set evaluate.every to 1 in `trial`"),
    "no teacher counts": (with_student(lambda s: s.update(loss={"lambda": 0})), "loss.lambda is 0"),
    "two ranks": (with_student(lambda s: s["train"].update(compute={"ranks": 2})), "a trial is one rank"),
    "moving scales": (with_student(lambda s: s.update(loss={"learn_scales": True})), "set it to false"),
    "no such file": (lambda c: {**c, "student": "nowhere.yaml"}, "config nowhere.yaml: No such file"),
}


def test_errors_are_reported_before_anything_trains(
    config: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for fault, (change, message) in FAULTS.items():
        assert tune(change(config), tmp_path / "out") == 2, fault
        assert message in capfd.readouterr().err, fault
    assert not (tmp_path / "out" / "trials").exists()
    (tmp_path / "file").write_text("in the way")
    assert tune(config, tmp_path / "file" / "out", path=tmp_path / "tune.yaml") == 2
    assert "cannot be written" in capfd.readouterr().err
