"""Several ranks, in separate processes, have the curve of one rank, stop together and fail together."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from reinforce.errors import UserError
from reinforce.training.distributed.ranks import join_ranks, share_from_first
from reinforce.training.launch import launch
from reinforce.training.loop import run_rank
from reinforce.training.stop import Stopped, StopSignal
from reinforce.training.task import Batch, Feed, Task
from teachers.device.accelerator import Accelerator
from tests.helpers.data import free_port
from tests.helpers.trainings import PairFeed, TowersTask, builder, curve, job, rows

RANKS = 3
BATCH = 24
#: More gradients than the first bucket of DistributedDataParallel holds.
WIDE = {"width": 40_000}


class Failing(TowersTask):
    def evaluate(self, model: torch.nn.Module) -> dict[str, float]:
        raise UserError("the set is gone")


def failing(accelerator: Accelerator) -> tuple[Task, Feed]:
    return Failing(), PairFeed()


class HangingFeed(PairFeed):
    """Rank 1 hangs while it reads the third batch."""

    def batches(self, rank: int, ranks: int, batch: int, start: int) -> Iterator[Batch]:
        for step, made in enumerate(super().batches(rank, ranks, batch, start), start=start):
            if (rank, step) == (1, 2):
                time.sleep(3)
            yield made


def hanging(accelerator: Accelerator) -> tuple[Task, Feed]:
    return TowersTask(), HangingFeed()


def work(rank: int, folder: str, port: int, port_of_hanging: int) -> None:
    """All the trainings of this file, one after the other, because processes take seconds to start."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(1)
    outcomes: dict[str, Any] = {}
    with join_ranks(job(folder).training.compute) as ranks:

        def train(
            name: str, stop: StopSignal | None = None, build: Any = None, output: str = "", **changes: Any
        ) -> None:
            made = job(f"{folder}/{output or name}", evaluate_every=6, **{"batch": BATCH, **changes})
            try:
                results = run_rank(build or builder(), made, ranks, stop or StopSignal())
                outcomes[name] = results.steps
            except (UserError, Stopped, RuntimeError) as error:
                outcomes[name] = f"{type(error).__name__}: {error}"

        def gone() -> None:
            raise UserError(f"gone on rank {rank}")

        outcomes["shared"] = share_from_first(lambda: f"of rank {rank}")
        try:
            share_from_first(gone)
        except UserError as error:
            outcomes["gone"] = str(error)
        train("ranks")
        train("parts", compute={"accumulate": 4})
        stop = StopSignal()
        stop.signum = signal.SIGTERM if rank == 1 else 0
        train("wide", build=builder(**WIDE), steps=6)
        train("stopped", stop, builder(**WIDE), steps=6)
        train("resumed", build=builder(**WIDE), output="stopped", steps=6)
        train("apart", output=f"apart-{rank}")  # like a folder that two machines do not share
        train("failed", build=failing)
        train("poisoned", build=builder({"poisoned": range(4, 6)}))
    os.environ["MASTER_PORT"] = str(port_of_hanging)
    reports: list[str] = []
    try:
        with join_ranks(job(folder).training.compute, None, None, reports.append, timedelta(seconds=1)) as ranks:
            run_rank(hanging, job(f"{folder}/hanging", batch=BATCH), ranks, StopSignal())
    except RuntimeError as error:
        outcomes["hanging"] = f"{type(error).__name__}: {error}"
    Path(folder, f"{rank}.json").write_text(json.dumps(outcomes))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, (str(folder), free_port(), free_port()), nprocs=RANKS)
    return folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("one")
    launch(builder(), job(output, evaluate_every=6, batch=BATCH))
    return output


@pytest.mark.slow
def test_several_ranks_have_the_curve_of_one_with_the_whole_batch(trained: tuple[Path, Any], one: Path) -> None:
    np.testing.assert_allclose(curve(trained[0] / "ranks"), curve(one), rtol=2e-4)
    metrics = [[row["metrics"] for row in rows(output) if "metrics" in row] for output in (trained[0] / "ranks", one)]
    assert len(metrics[0]) == 2
    for ours, theirs in zip(*metrics, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)


def test_gradient_accumulation_on_several_ranks_has_the_same_curve(trained: tuple[Path, Any], one: Path) -> None:
    np.testing.assert_allclose(curve(trained[0] / "parts"), curve(one), rtol=2e-4)


def test_all_ranks_stop_after_the_same_step_when_one_gets_a_signal(trained: tuple[Path, list[dict[str, Any]]]) -> None:
    assert [outcomes["stopped"] for outcomes in trained[1]] == [f"Stopped: {int(signal.SIGTERM)}"] * RANKS
    assert [outcomes["resumed"] for outcomes in trained[1]] == [6] * RANKS
    stopped, whole = (
        load_file(trained[0] / f"{name}/checkpoints/step-000000006.safetensors") for name in ("stopped", "wide")
    )
    assert all(torch.equal(stopped[name], tensor) for name, tensor in whole.items()), "bit for bit"
    assert curve(trained[0] / "stopped") == curve(trained[0] / "wide")


def test_an_output_that_ranks_do_not_share_is_refused_at_the_start(trained: tuple[Path, list[dict[str, Any]]]) -> None:
    for outcomes in trained[1]:
        assert "not every rank sees what another writes" in outcomes["apart"]
        assert "Set `output` to a folder that all nodes share" in outcomes["apart"]
    assert not (trained[0] / "apart-0/log.jsonl").exists()


def test_an_error_on_rank_0_ends_all_ranks(trained: tuple[Path, list[dict[str, Any]]]) -> None:
    assert [outcomes["failed"] for outcomes in trained[1]] == [
        "UserError: the set is gone",
        *["UserError: rank 0 failed: see its message"] * (RANKS - 1),
    ]


def test_what_rank_0_finds_is_shared_and_its_error_ends_all_ranks(
    trained: tuple[Path, list[dict[str, Any]]],
) -> None:
    assert [outcomes["shared"] for outcomes in trained[1]] == ["of rank 0"] * RANKS
    others = ["rank 0 failed: see its message"] * (RANKS - 1)
    assert [outcomes["gone"] for outcomes in trained[1]] == ["gone on rank 0", *others]


def test_all_ranks_skip_the_same_steps(trained: tuple[Path, list[dict[str, Any]]]) -> None:
    """Only rank 0 gets data without a finite loss."""
    assert [outcomes["poisoned"] for outcomes in trained[1]] == [12] * RANKS
    skipped = [row["skipped"] for row in rows(trained[0] / "poisoned") if "loss" in row]
    assert skipped == [0, 0, 0, 0, 1, 2, 2, 2, 2, 2, 2, 2]


def test_a_rank_that_others_wait_for_in_vain_is_named_with_where_it_is(
    trained: tuple[Path, list[dict[str, Any]]],
) -> None:
    for rank in (0, 2):
        error = trained[1][rank]["hanging"]
        assert error.startswith(f"AbsentRanks: rank {rank} waits at the update of step 2 for rank 1. Rank 1 (pid ")
        assert "has been at reading the batch of step 3 for " in error
        assert "tests/training/test_ranks.py" in error
        assert "in batches. Look at what it waits for there: `py-spy dump --pid" in error
        assert "Timed out waiting 1000ms" in error
