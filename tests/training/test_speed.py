"""What a training reports about its speed: rows of the log, FLOPs, and a trace of some steps."""

from __future__ import annotations

import gzip
import json
import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from reinforce.training import loop
from reinforce.training.distributed.ranks import Ranks
from reinforce.training.job import Job
from reinforce.training.loop import fit
from teachers.device.accelerator import Accelerator
from tests.helpers.trainings import WIDTH, PairFeed, TowersTask, before_batches, job, rows

pytestmark = pytest.mark.usefixtures("no_pictures")
LAST = "checkpoints/step-000000003.safetensors"


def run(job: Job, feed: PairFeed | None = None, **options: Any) -> None:
    torch.manual_seed(job.seed)
    fit(TowersTask(**options), feed or PairFeed(), job, Ranks(0, 1, Accelerator("cpu")))


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


def test_logs_have_the_flops_of_the_model_and_counting_them_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(job(tmp_path / "counted", steps=3), norm=True, dropout=0.3)
    row = rows(tmp_path / "counted")[-2]
    products = 3 * (2 * WIDTH * 16 + 2 * 16 * 8 + 2 * WIDTH * 8) - 2 * WIDTH * 16 - 2 * WIDTH * 8  # none of inputs
    assert row["flops_per_second"] == pytest.approx(products * row["samples_per_second"])
    assert "mfu" not in row, "no peak of a CPU"
    monkeypatch.setattr(loop, "flops_of_sample", lambda *_: 0.0)
    run(job(tmp_path / "not", steps=3), norm=True, dropout=0.3)
    assert "flops_per_second" not in rows(tmp_path / "not")[-2]
    counted, without = (load_file(tmp_path / name / LAST) for name in ("counted", "not"))
    assert all(torch.equal(tensor, without[name]) for name, tensor in counted.items())


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
