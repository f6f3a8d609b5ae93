"""Several ranks have the curve of one, stop together and fail together; absent ones are named."""

from __future__ import annotations

import contextlib
import gc
import json
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounter

from reinforce.errors import UserError
from reinforce.processes.signals import Stopped, StopSignal
from reinforce.training import gather, log
from reinforce.training.batch_norms import synchronize_batch_norms
from reinforce.training.checkpoints import CheckpointFolder, DamagedCheckpoint, State
from reinforce.training.launch import launch
from reinforce.training.loop import run_rank
from reinforce.training.ranks import Ranks, join_ranks, share_from_first, wrap_ddp
from reinforce.training.step import Prefetcher, backpropagate
from reinforce.training.task import Batch, Feed, Task
from reinforce.training.trials import Trials, compile_if_equal
from teachers.fast_paths import recompilation
from teachers.runtime.accelerator import Accelerator
from tests.helpers import sync_batch_norm  # noqa: F401  SyncBatchNorm's operations on CPUs
from tests.helpers.ranks import served_store, start_ranks, under_torchrun
from tests.helpers.stand_in_cuda import stand_in_cuda
from tests.helpers.trainings import PairFeed, StaticTask, TowersTask, before_batches, builder, curve, job, rows

#: The folder and the outcomes of each rank.
Trained = tuple[Path, list[dict[str, Any]]]
RANKS = 3
BATCH = 24
#: More gradients than the first bucket of DistributedDataParallel holds.
WIDE = {"width": 40_000}


class Failing(TowersTask):
    def evaluate(self, model: torch.nn.Module) -> dict[str, float]:
        raise UserError("the set is gone")


class Sharing(TowersTask):
    """Shares out its evaluation: each rank sums up the tensors that it evaluates."""

    def evaluate(self, model: torch.nn.Module) -> dict[str, float]:
        return {f"rank {gather.rank()}": sum(float(t.double().sum()) for t in model.state_dict().values())}

    def combine_evaluations(self, parts: list[dict[str, float]]) -> dict[str, float]:
        return {name: score for part in parts for name, score in part.items()}


class FailingShare(Sharing):
    def evaluate(self, model: torch.nn.Module) -> dict[str, float]:
        if gather.rank() == 1:
            raise UserError("the set of rank 1 is gone")
        return super().evaluate(model)


def failing(accelerator: Accelerator) -> tuple[Task, Feed]:
    return Failing(), PairFeed()


def hang(folder: Path, rank: int, ranks: Ranks) -> None:
    """Train until rank 1 hangs."""

    def wait(rank: int, step: int, batch: Batch) -> None:
        """Rank 1 hangs while it reads the third batch, until the others have failed."""
        while (rank, step) == (1, 2) and not all((folder / f"{other}.json").exists() for other in (0, 2)):
            time.sleep(0.05)

    feed = before_batches(PairFeed(), wait)
    run_rank(lambda _: (TowersTask(), feed), job(folder / "hanging", batch=BATCH), ranks, StopSignal())


@contextlib.contextmanager
def damaged(step: int) -> Iterator[None]:
    """The checkpoint of a step is damaged as this rank reads it."""
    load = CheckpointFolder.load

    def load_others(self: CheckpointFolder, found: int) -> Any:
        if found == step:
            raise DamagedCheckpoint("its file is not a whole checkpoint")
        return load(self, found)

    CheckpointFolder.load = load_others  # type: ignore[method-assign]
    yield
    CheckpointFolder.load = load  # type: ignore[method-assign]


def divide(rank: int, ranks: Ranks) -> dict[str, Any]:
    """Share batch statistics on a stand-in for CUDA, where rank 1 has less memory; the parts, and statistics."""
    with stand_in_cuda((60, 36, 60)[rank] * 1_000_000):
        accelerator, task, size = Accelerator("cuda"), TowersTask(norm=True, **WIDE), 64
        there = replace(ranks, accelerator=accelerator)
        synchronize_batch_norms(accelerator.place(task.model).train(), there)
        state = State(task.model, torch.optim.AdamW(task.model.parameters()))
        batches = Prefetcher(PairFeed().batches(rank, RANKS, size, 0), accelerator)
        batches.fetch()
        trials = Trials(task, state, batches.peek(), size, there)
        trials.flops_of_sample()
        parts = trials.fewest_microbatches(None)
        backpropagate(task, task.model, batches.take(), size, [0] * parts, accelerator)
        return {"parts": parts, "means": task.model.left[1].running_mean[:8].tolist()}


def compile_(rank: int, ranks: Ranks) -> dict[str, Any]:
    """Compile a model where the compiler fails on rank 1, then on none; whether it is compiled, and a gradient."""
    found = []
    batch = next(iter(PairFeed().batches(rank, RANKS, 8, 0)))

    def compile_graph(graph: Any, inputs: Any) -> Any:
        if fails and rank == 1:
            raise RuntimeError("no C compiler")
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    recompilation.inductor = compile_graph
    for fails in (True, False):  # noqa: B007
        torch.manual_seed(0)
        task = StaticTask(norm=True)
        model = wrap_ddp(task.model.train(), ranks)
        trials = Trials(task, State(task.model, torch.optim.SGD(task.model.parameters())), batch, 8, ranks)
        step = partial(trials.step, microbatches=2, kept=0)
        found.append(compile_if_equal(trials, model, step, recompilation.Compiler("Towers", False)))
        step(model)
    return {"compiled": found, "gradient": task.model.right.weight.grad.tolist()}


def work(rank: int, folder: str, port: int, port_of_hanging: int) -> None:
    """All the trainings of this file, one after the other, because processes take seconds to start."""
    under_torchrun(rank, RANKS, port)
    torch.set_num_threads(1)
    log.draw_curves = lambda *_: None  # half a second for each training
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
        train("kept parts", compute={"accumulate": 4, "keep_activations": True})
        stop = StopSignal()
        stop.signum = signal.SIGTERM if rank == 1 else 0
        train("wide", build=builder(**WIDE), steps=6)
        train("stopped", stop, builder(**WIDE), steps=6)
        train("resumed", build=builder(**WIDE), output="stopped", steps=6)
        train("apart", output=f"apart-{rank}")  # like a folder that two machines do not share
        train("failed", build=failing)
        train("alone", build=builder(norm=True), steps=8, ema=0.9)
        train("sharing", build=lambda _: (Sharing(norm=True), PairFeed()), steps=8, ema=0.9)
        train("failing share", build=lambda _: (FailingShare(), PairFeed()))
        train("poisoned", build=builder({"poisoned": range(4, 6)}))
        for parts, kept in ((1, False), (4, False), (4, True)):
            shared = {"accumulate": parts, "keep_activations": kept, "sync_batch_norm": True}
            name = f"shared statistics {parts}{' kept' * kept}"
            train(name, build=builder(norm=True), steps=8, compute=shared)
        train("torn", checkpoints={"every": 4})
        feed = PairFeed()
        with damaged(12) if rank == 1 else contextlib.nullcontext():
            train("torn", build=lambda _: (TowersTask(), feed), checkpoints={"every": 4})
        outcomes["torn"] = feed.seen
        outcomes["divided"] = divide(rank, ranks)
        outcomes["compiled"] = compile_(rank, ranks)
    under_torchrun(rank, RANKS, port_of_hanging)
    reports: list[str] = []
    try:
        with join_ranks(job(folder).training.compute, None, None, reports.append, timedelta(seconds=3)) as hanging:
            hang(Path(folder), rank, hanging)
    except RuntimeError as error:
        outcomes["hanging"] = f"{type(error).__name__}: {error}"
    del hanging
    gc.collect()  # the process can end: none of its threads waits for rank 1, which waits for the next line
    Path(folder, f"{rank}.json").write_text(json.dumps(outcomes))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("ranks")
    stores = [served_store(), served_store()]  # of the trainings, and of the one that hangs
    start_ranks(work, RANKS, str(folder), *(store.port for store in stores))
    return folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("one")
    launch(builder(), job(output, evaluate_every=6, batch=BATCH))
    return output


@pytest.mark.parametrize("name", ["ranks", "parts", "kept parts"])
def test_several_ranks_have_the_curve_of_one_also_with_gradient_accumulation(
    trained: Trained, one: Path, name: str
) -> None:
    np.testing.assert_allclose(curve(trained[0] / name), curve(one), rtol=2e-4)
    metrics = [[row["metrics"] for row in rows(output) if "metrics" in row] for output in (trained[0] / name, one)]
    assert len(metrics[0]) == 2
    for ours, theirs in zip(*metrics, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)


def test_ranks_that_share_batch_statistics_have_the_curve_and_the_statistics_of_one(
    trained: Trained, tmp_path: Path
) -> None:
    launch(builder(norm=True), job(tmp_path, batch=BATCH, steps=8))
    np.testing.assert_allclose(curve(trained[0] / "shared statistics 1"), curve(tmp_path), rtol=2e-4)
    one, shared = (
        load_file(output / "checkpoints/step-000000008.safetensors")
        for output in (tmp_path, trained[0] / "shared statistics 1")
    )
    assert shared.keys() == one.keys()
    for name in ("running_var", "num_batches_tracked"):  # Adam moves the mean, on which no loss depends, by rounding
        torch.testing.assert_close(shared[f"model/left.1.{name}"], one[f"model/left.1.{name}"], rtol=1e-3, atol=1e-4)
    parts, kept = (curve(trained[0] / f"shared statistics 4{name}") for name in ("", " kept"))
    assert len(parts) == 8
    np.testing.assert_allclose(kept, parts, rtol=1e-6)


def test_ranks_that_share_batch_statistics_wait_for_none_in_a_trial_that_is_out_of_memory(trained: Trained) -> None:
    of_ranks = [outcomes["divided"] for outcomes in trained[1]]
    assert [found["parts"] for found in of_ranks] == [2] * RANKS, "one part does not fit on rank 1"
    assert all(found["means"] == of_ranks[0]["means"] for found in of_ranks), "steps share them"


def test_a_model_is_compiled_on_all_ranks_or_on_none_which_wait_for_none_meanwhile(trained: Trained) -> None:
    of_ranks = [outcomes["compiled"] for outcomes in trained[1]]
    assert [found["compiled"] for found in of_ranks] == [[False, True]] * RANKS
    assert all(found["gradient"] == of_ranks[0]["gradient"] for found in of_ranks), "it is reduced"


def test_all_ranks_stop_after_the_same_step_when_one_gets_a_signal(trained: Trained) -> None:
    assert [outcomes["stopped"] for outcomes in trained[1]] == [f"Stopped: {int(signal.SIGTERM)}"] * RANKS
    assert [outcomes["resumed"] for outcomes in trained[1]] == [6] * RANKS
    stopped, whole = (
        load_file(trained[0] / f"{name}/checkpoints/step-000000006.safetensors") for name in ("stopped", "wide")
    )
    assert all(torch.equal(stopped[name], tensor) for name, tensor in whole.items()), "bit for bit"
    assert curve(trained[0] / "stopped") == curve(trained[0] / "wide")


def test_all_ranks_resume_from_the_checkpoint_before_one_that_a_rank_finds_damaged(trained: Trained) -> None:
    assert [outcomes["torn"] for outcomes in trained[1]] == [[8, 9, 10, 11]] * RANKS
    assert curve(trained[0] / "torn") == curve(trained[0] / "ranks")


def test_ranks_share_what_rank_0_finds_its_errors_the_output_and_which_steps_are_skipped(trained: Trained) -> None:
    """Only rank 0 gets data without a finite loss."""
    folder, of_ranks = trained
    others = ["rank 0 failed: see its message"] * (RANKS - 1)
    assert [outcomes["shared"] for outcomes in of_ranks] == ["of rank 0"] * RANKS
    assert [outcomes["gone"] for outcomes in of_ranks] == ["gone on rank 0", *others]
    assert [outcomes["failed"] for outcomes in of_ranks] == [
        f"UserError: {message}" for message in ["the set is gone", *others]
    ]
    for outcomes in of_ranks:
        assert "not every rank sees what another writes" in outcomes["apart"]
        assert "Set `output` to a folder that all nodes share" in outcomes["apart"]
    assert not (folder / "apart-0/log.jsonl").exists()
    assert [outcomes["poisoned"] for outcomes in of_ranks] == [12] * RANKS
    skipped = [row["skipped"] for row in rows(folder / "poisoned") if "loss" in row]
    assert skipped == [0, 0, 0, 0, 1, 2, 2, 2, 2, 2, 2, 2]


def test_ranks_that_share_out_an_evaluation_evaluate_the_state_of_rank_0_and_train_as_without_it(
    trained: Trained,
) -> None:
    """Each rank has batch statistics of its own, and only rank 0 has the average."""
    evaluated = [row["metrics"] for row in rows(trained[0] / "sharing") if "metrics" in row]
    assert [list(metrics) for metrics in evaluated] == [[f"rank {rank}" for rank in range(RANKS)]] * 2
    assert [len(set(metrics.values())) for metrics in evaluated] == [1, 1]
    last = "checkpoints/step-000000008.safetensors"
    alone, sharing = (load_file(trained[0] / name / last) for name in ("alone", "sharing"))
    assert all(torch.equal(alone[name], tensor) for name, tensor in sharing.items()), "bit for bit"
    average = sum(float(t.double().sum()) for name, t in sharing.items() if name.startswith("average/"))
    assert evaluated[1]["rank 2"] == pytest.approx(average)
    other = "rank 1 failed: see its message"
    assert [outcomes["failing share"] for outcomes in trained[1]] == [
        f"UserError: {message}" for message in (other, "the set of rank 1 is gone", other)
    ]


def test_a_rank_that_others_wait_for_in_vain_is_named_with_where_it_is(trained: Trained) -> None:
    for rank in (0, 2):
        error = trained[1][rank]["hanging"]
        assert error.startswith(f"AbsentRanks: rank {rank} waits at the update of step 2 for rank 1. Rank 1 (pid ")
        assert "has been at reading the batch of step 3 for " in error
        assert "tests/training/test_ranks.py" in error
        assert "in wait. Look at what it waits for there: `py-spy dump --pid" in error
        assert "Timed out waiting 3000ms" in error


class Wide(torch.nn.Module):
    """More parameters than the first two buckets of DistributedDataParallel hold."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(1500, 1500, bias=False) for _ in range(5))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            values = layer(values)
        return values


def test_a_compiled_model_is_split_into_graphs_where_gradients_are_reduced() -> None:
    """A model that is compiled before it is wrapped: torch splits what it compiles inside of the wrapper. So gradients
    are reduced during the backward pass, and the pass without gradients of `accumulate` is one whole graph."""
    graphs = CompileCounter()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model, values = Wide(), torch.ones(2, 1500)
        model.compile(backend=graphs)
        wrapped = wrap_ddp(model, Ranks(0, 2, Accelerator("cpu")))
        with torch.no_grad():
            model(values)
        assert graphs.frame_count == 1
        wrapped(values).sum().backward()
    finally:
        del wrapped  # the last owner of a process group joins its thread, here with the interpreter's lock
        dist.destroy_process_group()
    assert graphs.frame_count > 2
    assert all(layer.weight.grad is not None for layer in model.layers)
