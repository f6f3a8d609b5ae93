"""Trackers of trainings: they get the rows of the log, continue their run, and never end a training."""

from __future__ import annotations

import json
import logging
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from reinforce.errors import UserError
from reinforce.storage import Storage
from reinforce.student.config import StudentConfig
from reinforce.student.train import make_job
from reinforce.training.config import Trackers
from reinforce.training.job import Job
from reinforce.training.record.trackers import RUNS, Scalars, Tracker, check_trackers, open_trackers
from tests.helpers.trainings import job, rows
from tests.training.test_loop import run, stopped_after

STEPS = 12


def tracked(output: Path, **sections: Any) -> Job:
    return replace(job(output, evaluate_every=6), trackers=Trackers(**sections))


class Kept:
    """A tracker that keeps what it gets."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, Scalars]] = []
        self.failed: bool | None = None

    def log(self, step: int, scalars: Scalars) -> None:
        self.rows.append((step, scalars))

    def close(self, failed: bool) -> None:
        self.failed = failed


# --- a tracker that fails


def test_a_tracker_gets_finite_numbers_in_order_and_how_the_training_ended() -> None:
    kept = Kept()
    tracker = Tracker("x", lambda: kept)
    tracker.add(1, {"loss": 2.0, "memory": float("inf")})
    tracker.add(2, {"loss": float("nan")})
    tracker.add(3, {"loss": 1.0, "skipped": 0})
    tracker.close(failed=True)
    assert kept.rows == [(1, {"loss": 2.0}), (3, {"loss": 1.0, "skipped": 0.0})]
    assert kept.failed is True


class Broken(Kept):
    def __init__(self, where: str, error: BaseException) -> None:
        super().__init__()
        if where == "start":
            raise error

        def fail(*_: object) -> None:
            raise error

        setattr(self, where, fail)


@pytest.mark.parametrize("where", ["start", "log", "close"])
@pytest.mark.parametrize("error", [ValueError("no access to https://me:secret@host/x?k=1"), SystemExit(3)], ids=repr)
def test_a_tracker_that_fails_is_reported_once(
    where: str, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Tracker("wandb", lambda: Broken(where, error))
    for step in range(50):
        tracker.add(step, {"loss": 1.0})
    tracker.close(failed=False)
    tracker._thread.join(600)
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "log.wandb failed, and gets no further rows; the training goes on: " in record.getMessage()
    assert "secret" not in record.getMessage()


def test_a_tracker_that_does_not_answer_costs_no_step_and_does_not_hold_the_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    answer = threading.Event()

    class Slow(Kept):
        def log(self, step: int, scalars: Scalars) -> None:
            answer.wait(600)

    tracker = Tracker("mlflow", Slow, closing_seconds=0.2)
    for step in range(10_100):
        tracker.add(step, {"loss": 1.0})
    tracker.close(failed=False)
    answer.set()
    assert [record.getMessage().rpartition(": ")[2] for record in caplog.records] == ["10,000 rows wait for it"]


# --- the config


def test_trackers_are_no_part_of_what_a_checkpoint_fixes_and_need_their_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"output": "o", "student": {"model": "m"}, "data": {"datasets": "d"}, "train": {"steps": 2000}}
    plain = StudentConfig.model_validate(values)
    named = StudentConfig.model_validate({**values, "log": {"wandb": {"project": "p", "entity": "me"}}})
    assert make_job(named).fixed_config == make_job(plain).fixed_config
    assert make_job(named).trackers == Trackers.model_validate({"wandb": {"project": "p", "entity": "me"}})
    assert '"log":' not in plain.model_dump_json(exclude_none=True), "recipes of ablations leave unset keys out"
    assert open_trackers(job(tmp_path), Storage(str(tmp_path))) == []
    assert not (tmp_path / RUNS).exists()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_trackers(Trackers())
    for name in ("wandb", "mlflow", "trackio"):
        with pytest.raises(UserError, match=rf"log\.{name}: .* Run: pip install -e '\.\[{name}\]'"):
            check_trackers(Trackers.model_validate({name: {}}))


# --- the packages, offline


@pytest.fixture
def wandb_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("wandb", reason="needs the extra wandb")
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb-files"))
    (tmp_path / "wandb-files").mkdir()
    return tmp_path / "wandb-files"


def resumed_training(output: Path, **sections: Any) -> list[tuple[int, float]]:
    """Train to step 6, stop, and resume; returns steps and losses of the log."""
    stopped_after(6, tracked(output, **sections))
    before = json.loads((output / RUNS).read_text())
    run(tracked(output, **sections))
    assert json.loads((output / RUNS).read_text()) == before, "the same run continues"
    return [(row["step"], row["loss"]) for row in rows(output) if "loss" in row]


def test_mlflow_has_one_run_with_the_rows_of_both_parts(tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="needs the extra mlflow")
    from mlflow import MlflowClient

    uri = f"file:{tmp_path}/mlruns"
    expected = resumed_training(tmp_path / "student-1", mlflow={"uri": uri, "experiment": "tests"})
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("tests")
    assert experiment is not None
    [found] = client.search_runs([experiment.experiment_id])
    assert (found.info.run_name, found.info.status) == ("student-1", "FINISHED")
    assert found.data.params["batch"] == "16"
    metrics = client.get_metric_history(found.info.run_id, "loss")
    assert sorted((metric.step, metric.value) for metric in metrics) == expected
    assert "losses/closeness" in found.data.metrics


def test_trackio_has_one_run_with_the_rows_of_both_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio", reason="needs the extra trackio")
    resumed_training(tmp_path / "student-2", trackio={"project": "tests"})
    runs = trackio.Api().runs("tests")
    assert [one.name.rpartition("-")[0] for one in runs] == ["student-2"]


def test_wandb_writes_a_run_for_later(tmp_path: Path, wandb_folder: Path) -> None:
    resumed_training(tmp_path / "student-3", wandb={"mode": "offline", "folder": str(wandb_folder)})
    number = json.loads((tmp_path / "student-3" / RUNS).read_text())["wandb"]
    assert len([*wandb_folder.glob(f"wandb/offline-run-*-{number}/run-{number}.wandb")]) >= 1
