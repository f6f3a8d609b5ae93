"""Trainings on Ray Train and on S3, of a student's stand-in and of a captioner."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load

from reinforce.errors import UserError
from reinforce.processes.signals import Stopped, StopSignal
from reinforce.training.launch import launch
from reinforce.training.loop import run_rank
from reinforce.training.ranks import Ranks
from teachers.runtime.accelerator import Accelerator
from tests.helpers.trainings import PairFeed, TowersTask, builder, curve, fatal, job, stopping

pytestmark = pytest.mark.usefixtures("ray_session", "no_pictures")


def test_after_a_killed_rank_all_ranks_restart_from_the_last_checkpoint(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"checkpoints": {"every": 5, "keep": 2}}
    made = job(tmp_path / "two", compute={"ranks": 2}, retries=1, **changes)
    results = launch(partial(fatal, folder=str(tmp_path)), made)
    assert results.steps == 12
    assert (tmp_path / "killed").exists()
    launch(builder(), job(tmp_path / "one", **changes))
    np.testing.assert_allclose(curve(tmp_path / "two"), curve(tmp_path / "one"), rtol=2e-4)
    with pytest.raises(UserError, match=r"training of another config:\n  batch: 16 before, 32 now"):
        launch(builder(), job(tmp_path / "two", batch=32, **changes))
    with pytest.raises(UserError, match=r"can hold 0 of 2 ranks: each needs 64 CPUs on one node"):
        launch(builder(), job(tmp_path / "large", compute={"ranks": 2, "cpus": 64}))


def test_a_training_in_s3_is_stopped_and_resumed_as_on_a_disk(s3: Any, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"checkpoints": {"every": 5, "keep": 1}, "ema": 0.9}
    launch(builder(), job(tmp_path / "disk", evaluate_every=5, **changes))

    remote = job("s3://bucket/trainings/one", evaluate_every=5, **changes)
    stop = StopSignal()

    def stopped(*_: object) -> tuple[TowersTask, PairFeed]:
        return TowersTask(), stopping(PairFeed(), stop, at=3)

    with pytest.raises(Stopped):
        run_rank(stopped, remote, Ranks(0, 1, Accelerator("cpu")), stop)
    assert s3.glob("bucket/trainings/one/checkpoints/*") == [
        "bucket/trainings/one/checkpoints/step-000000003.safetensors"
    ]
    results = launch(builder(), remote)
    assert results.steps == 12

    def lines(text: str) -> list[dict[str, Any]]:
        timing = ("samples_per_second", "flops_per_second", "waiting", "memory")
        return [{k: v for k, v in json.loads(line).items() if k not in timing} for line in text.splitlines()]

    assert lines(s3.cat_file("bucket/trainings/one/log.jsonl").decode()) == lines(
        (tmp_path / "disk/log.jsonl").read_text()
    )
    names = {name.removeprefix("bucket/trainings/one/") for name in s3.find("bucket/trainings/one")}
    events = {name for name in names if name.startswith("tensorboard/")}
    assert len(events) == 2, "one file per start"
    here = {path.relative_to(tmp_path / "disk").as_posix() for path in (tmp_path / "disk").rglob("*") if path.is_file()}
    assert names - events == {name for name in here if not name.startswith(("tensorboard/", ".tmp/"))}
    one = load(s3.cat_file("bucket/trainings/one/checkpoints/step-000000012.safetensors"))
    two = load((tmp_path / "disk/checkpoints/step-000000012.safetensors").read_bytes())
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], tensor) for name, tensor in two.items())
