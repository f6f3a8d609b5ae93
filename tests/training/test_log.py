"""What a training writes and shows: log, events, curves, speed, trace, results, and the trackers that get its rows."""

from __future__ import annotations

import gzip
import json
import logging
import math
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from reinforce.errors import UserError
from reinforce.storage import Storage
from reinforce.student.config import StudentConfig
from reinforce.student.train import student_job
from reinforce.training import log as curves
from reinforce.training import log as log_module
from reinforce.training.checkpoints import BestCheckpoint
from reinforce.training.config import Job, Trackers
from reinforce.training.log import (
    RUNS,
    Log,
    Scalars,
    Throughput,
    Tracker,
    TrackerRun,
    check_trackers,
    draw_curves,
    format_row,
    open_trackers,
)
from reinforce.training.results import Results, read_results
from reinforce.training.trials import Trials
from tests.helpers.trainings import WIDTH, PairFeed, before_batches, job, rows, run, stopped_after


def row(step: int, loss: float = 1.0) -> dict[str, Any]:
    return {"step": step, "loss": loss, "losses": {"clip": loss}}


def test_a_row_is_on_disk_at_once_and_a_scalar_for_every_number_in_the_events(tmp_path: Path) -> None:
    """Numbers that are not finite are null."""
    with Log(Storage(str(tmp_path)), 0) as log:
        log.add({**row(1, 0.25), "lr": 0.1})
        log.add(row(2, math.nan))
        written = [{**row(1, 0.25), "lr": 0.1}, {"step": 2, "loss": None, "losses": {"clip": None}}]
        assert log.rows == rows(tmp_path) == written
        log.publish()
        assert not (tmp_path / "curves.png").exists()
        log.publish(last=True)
    assert (tmp_path / "curves.png").exists()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "losses/clip", "lr"}
    first, second = events.Scalars("losses/clip")
    assert (first.step, first.value, second.step) == (1, 0.25, 2)


def test_in_an_object_store_rows_appear_with_publish_and_are_continued() -> None:
    storage = Storage("memory://logs/one")
    with Log(storage, 0) as log:
        log.add(row(1))
        assert not storage.fs.exists(storage.path("log.jsonl"))
        log.publish()
    with Log(storage, 1) as log:
        log.add(row(2))
        log.publish()
    lines = storage.fs.cat_file(storage.path("log.jsonl")).decode().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert len(storage.fs.ls(storage.path("tensorboard"), detail=False)) == 2


ROWS: list[dict[str, Any]] = [
    {"step": 1, "loss": 2.0, "losses": {"clip": 2.0}, "lr": 0.1, "scalars": {"logit_scale": 14.0}},
    {"step": 2, "loss": None, "losses": {"clip": None}, "lr": 0.2, "scalars": {"logit_scale": 15.0}},
    {"step": 2, "shares": {"loss": {"one": 0.4, "two": 0.6}, "gradient": {"one": 0.9}, "rows": {"one": 7}}},
    {"step": 2, "metrics": {"retrieval/own/r1": 0.5, "zero_shot/top1": 0.4, "caption_loss": 3.0}},
]


def test_the_picture_has_three_panels_a_line_and_a_series_for_each_number(tmp_path: Path) -> None:
    titles = {"Loss": ["all", "clip"], "Learning rate": [""], "Learnt scalars": ["logit_scale"]}
    titles |= {"Teachers: share of the loss": ["one", "two"], "Teachers: share of the gradient": ["one"]}
    titles |= {"Evaluation: losses": ["caption_loss"], "Evaluation: retrieval": ["own/r1"]}
    titles |= {"Evaluation": ["zero_shot/top1"]}
    assert {title: [*curves._series(ROWS, values)] for title, _, values in curves._PANELS} == titles
    assert curves._series(ROWS, lambda row: {"": row.get("loss")}) == {"": [(1, 2.0)]}, "nulls are skipped"
    draw_curves([{"step": 0, "metrics": {}}], f"{tmp_path}/curves.png")
    assert not (tmp_path / "curves.png").exists(), "none without values"
    for drawn, lines in ((ROWS, 3), (ROWS[:1], 1)):
        draw_curves(drawn, f"{tmp_path}/curves.png")
        with Image.open(tmp_path / "curves.png") as picture:
            assert picture.width / picture.height == pytest.approx(3 * 4.6 / (lines * 3.6), rel=0.1)


def test_a_row_is_one_line_with_samples_waiting_and_the_share_of_a_known_peak_since_the_last_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for peak, mfu, shown in ((None, {}, ""), (6.4e12, {"mfu": 0.4}, "  MFU 40%")):
        now = iter([100.0, 130.0])
        monkeypatch.setattr(log_module.time, "monotonic", lambda now=now: next(now))
        throughput = Throughput(start=10, steps=40, flops=4e10, peak=peak)
        throughput.add_step(seconds=1.5, idle=0.5)
        throughput.add_step(seconds=0.5, idle=0.0)
        speed = throughput.measure(batch=64)
        assert speed == {"samples_per_second": 64.0, "waiting": 0.25, "flops_per_second": 2.56e12, **mfu}
        throughput.add_step(seconds=0.5, idle=0.5)
        assert throughput.measure(batch=64)["waiting"] == 1.0
        row = {"step": 1200, "epoch": 0.5, "loss": 3.25, **speed, "skipped": 0}
        line = f"step 1,200 of 5,000  ETA 0:01:00  epoch 0.50  loss 3.2500  64 samples/s{shown}  waiting for data 25%"
        left = throughput.seconds_left(20)  # 3 s a step, 20 steps left
        monkeypatch.undo()
        assert format_row(row, 5000, left) == line
        assert format_row({**row, "skipped": 3}, 5000, left) == f"{line}  3 steps skipped"


RESULTS = Results(
    output="out", export="student", steps=100, samples=3200, seconds=50.0, parameters=12_300_000, loss=1.25,
    metrics={"top1": 0.5, "recall": None}, best=BestCheckpoint(80, "top1", 0.75), skipped=0, exported=100,
)  # fmt: skip


def test_results_are_read_as_they_were_written_and_their_summary_has_a_line_for_each_number(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    assert read_results(storage) is None
    for results in (replace(RESULTS, best=None, loss=None), RESULTS):
        results.write(storage)
        assert read_results(storage) == results
    written = json.loads((tmp_path / "results.json").read_text())
    assert list(written) == [
        "output", "export", "steps", "samples", "seconds", "parameters", "loss", "metrics", "best", "skipped",
        "exported", "parts", "fast_paths", "seconds_per_step", "samples_per_second", "files",
    ]  # fmt: skip
    assert (written["seconds_per_step"], written["samples_per_second"]) == (0.5, 64.0)
    assert written["best"] == {"step": 80, "metric": "top1", "value": 0.75}
    names = ("weights", "checkpoints", "log", "tensorboard", "curves")
    files = ("student", "checkpoints", "log.jsonl", "tensorboard", "curves.png")
    assert written["files"] == dict(zip(names, files, strict=True))
    assert replace(RESULTS, skipped=2).summary().splitlines() == [
        "trained 12.3 million parameters for 100 steps on 3,200 samples in 0:00:50 (0.5 s per step, 64 samples/s)",
        "final loss: 1.2500",
        "metric, %    step 100",
        "top1            50.00",
        "recall     not finite",
        "best top1: 75.00 at step 80, kept as a checkpoint",
        "2 steps skipped, because the gradient was not finite",
        "weights: out/student   curves: out/curves.png",
    ]
    assert "best" not in replace(RESULTS, best=BestCheckpoint(100, "top1", 0.5)).summary(), "the last step is the best"


def test_a_training_without_the_extra_writes_no_curves_and_no_events_and_names_it_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("matplotlib", "tensorboard", "sacrebleu"):
        monkeypatch.setitem(sys.modules, package, None)
    results, _ = run(job(tmp_path))
    line = "without matplotlib and tensorboard there is no curves.png and tensorboard, only log.jsonl: pip install"
    assert capsys.readouterr().out.count(f"{line} -e '.[train]'") == 1
    written = {path.name for path in tmp_path.iterdir()} - {".tmp"}
    assert written == {"checkpoints", "log.jsonl", "results.json", "student"}
    assert len([row for row in rows(tmp_path) if "loss" in row]) == results.steps
    assert [*results.as_json()["files"]] == ["weights", "checkpoints", "log"]
    assert results.summary().endswith(f"weights: {tmp_path}/student   log: {tmp_path}/log.jsonl")


LAST = "checkpoints/step-000000003.safetensors"


@pytest.mark.usefixtures("no_pictures")
def test_a_profile_has_a_trace_of_steps_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(job(tmp_path, steps=6, profile=2))
    files = sorted(path.name for path in (tmp_path / "profile").iterdir())
    assert files == ["steps-000000005-000000006.json.gz", "steps-000000005-000000006.txt"]
    with gzip.open(tmp_path / "profile" / files[0]) as trace:
        events = [event for event in json.load(trace)["traceEvents"] if event.get("name") == "aten::addmm"]
    table = (tmp_path / "profile" / files[1]).read_text().splitlines()
    of_product = next(line for line in table if line.endswith("aten::addmm"))
    assert float(of_product.split()[2]) * 2 == len(events) == 2 * 3, "three linear layers in two steps"
    shown = capsys.readouterr().out
    assert "profile of steps 5 to 6; trace: profile/steps-000000005-000000006.json.gz; table: profile/" in shown
    assert of_product in shown


@pytest.mark.usefixtures("no_pictures")
def test_logs_have_the_flops_of_the_model_and_counting_them_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(job(tmp_path / "counted", steps=3), norm=True, dropout=0.3)
    row = rows(tmp_path / "counted")[-2]
    products = 3 * (2 * WIDTH * 16 + 2 * 16 * 8 + 2 * WIDTH * 8) - 2 * WIDTH * 16 - 2 * WIDTH * 8  # none of inputs
    assert row["flops_per_second"] == pytest.approx(products * row["samples_per_second"])
    assert "mfu" not in row, "no peak of a CPU"
    monkeypatch.setattr(Trials, "flops_of_sample", lambda _: 0.0)
    run(job(tmp_path / "not", steps=3), norm=True, dropout=0.3)
    assert "flops_per_second" not in rows(tmp_path / "not")[-2]
    counted, without = (load_file(tmp_path / name / LAST) for name in ("counted", "not"))
    assert all(torch.equal(tensor, without[name]) for name, tensor in counted.items())


@pytest.mark.usefixtures("no_pictures")
def test_logs_have_the_speed_and_the_time_spent_waiting_for_data(tmp_path: Path) -> None:
    slow_feed = before_batches(PairFeed(), lambda *_: threading.Event().wait(0.3))
    run(job(tmp_path / "slow", log_every=5), slow_feed)
    run(job(tmp_path / "fast", log_every=5))
    slow, fast = rows(tmp_path / "slow"), rows(tmp_path / "fast")
    assert [row["step"] for row in slow if "loss" in row] == [5, 10, 12]
    assert slow[1]["waiting"] > max(0.5, fast[1]["waiting"])
    assert slow[1]["samples_per_second"] < 16 / 0.3
    assert slow[1]["memory"] > 10_000_000
    assert slow[1]["lr"] == pytest.approx(0.02 * 0.5 * (1 + math.cos(math.pi * 7 / 9)), rel=1e-3)


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
    tracker = Tracker("x", lambda: TrackerRun(kept.log, kept.close))
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
    def start() -> TrackerRun:
        broken = Broken(where, error)
        return TrackerRun(broken.log, broken.close)

    tracker = Tracker("wandb", start)
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

    slow = TrackerRun(lambda step, scalars: answer.wait(600), lambda failed: None)
    tracker = Tracker("mlflow", lambda: slow, closing_seconds=0.2)
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
    named = StudentConfig.model_validate({**values, "log": {"wandb": "p", "name": "n"}})
    assert student_job(named).fixed_config == student_job(plain).fixed_config
    assert student_job(named).trackers == Trackers(wandb="p", name="n")
    assert '"log":' not in plain.model_dump_json(exclude_none=True), "recipes of ablations leave unset keys out"
    assert open_trackers(job(tmp_path), Storage(str(tmp_path))) == []
    assert not (tmp_path / RUNS).exists()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_trackers(Trackers())
    for name in ("wandb", "mlflow", "trackio"):
        with pytest.raises(UserError, match=rf"log\.{name} needs {name}: run pip install -e '\.\[{name}\]'"):
            check_trackers(Trackers.model_validate({name: "p"}))


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


def test_mlflow_has_one_run_with_the_rows_of_both_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="needs the extra mlflow")
    from mlflow import MlflowClient

    uri = f"file:{tmp_path}/mlruns"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    expected = resumed_training(tmp_path / "out", mlflow="tests", name="student-1")
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
    resumed_training(tmp_path / "student-2", trackio="tests")
    runs = trackio.Api().runs("tests")
    assert [one.name.rpartition("-")[0] for one in runs] == ["student-2"]


def test_wandb_writes_a_run_for_later(tmp_path: Path, wandb_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    resumed_training(tmp_path / "student-3", wandb="tests")
    number = json.loads((tmp_path / "student-3" / RUNS).read_text())["wandb"]
    assert len([*wandb_folder.glob(f"wandb/offline-run-*-{number}/run-{number}.wandb")]) >= 1
