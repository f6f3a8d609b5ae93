"""A minimal task and feed: two small towers that learn to match random pairs."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable, Container, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from reinforce.processes.signals import Stopped, StopSignal
from reinforce.training.config import MUTABLE_KEYS, Job, Training, fixed_config
from reinforce.training.gather import gather
from reinforce.training.loop import run_rank
from reinforce.training.ranks import Ranks
from reinforce.training.results import Results
from reinforce.training.task import Batch, Build, Encoded, Feed, Reading, Task
from teachers.runtime.accelerator import Accelerator

F = TypeVar("F", bound=Feed)
WIDTH = 6


class Towers(torch.nn.Module):
    """Features of both sides, a loss of the model's own, and a parameter without a gradient."""

    def __init__(self, dropout: float = 0.0, norm: bool = False, scale: float = 10.0, width: int = 16) -> None:
        super().__init__()
        middle = torch.nn.BatchNorm1d(width) if norm else torch.nn.GELU()
        self.left = torch.nn.Sequential(
            torch.nn.Linear(WIDTH, width), middle, torch.nn.Dropout(dropout), torch.nn.Linear(width, 8)
        )
        self.right = torch.nn.Linear(WIDTH, 8)
        self.logit_scale = torch.nn.Parameter(torch.tensor(math.log(scale)))
        self.unused = torch.nn.Parameter(torch.ones(3))

    def forward(self, batch: Batch) -> Encoded:
        left = normalize(self.left(batch["left"]), dim=-1)
        right = normalize(self.right(batch["deep"]["right"]), dim=-1)
        local = {"closeness": 0.1 * (1 - (left * right).sum(-1)).mean()}
        return Encoded({"left": left, "right": right}, local, {"logit_scale": self.logit_scale.exp()})


class TowersTask(Task):
    model: Any
    notes = ("two towers",)

    def __init__(self, **options: Any) -> None:
        self.model = Towers(**options)
        self.evaluated: list[int] = []

    def losses(self, encoded: Encoded, batch: Batch) -> dict[str, torch.Tensor]:
        assert len(batch["key"]) == len(encoded.features["left"])
        left, right = encoded.features["left"].float(), encoded.features["right"].float()
        others, first = gather({"right": right})["right"], 0
        if len(others) > len(right):
            first = torch.distributed.get_rank() * len(right)
        logits = encoded.scalars["logit_scale"] * left @ others.T
        return {"contrast": cross_entropy(logits, torch.arange(first, first + len(left), device=left.device))}

    def evaluate(self, model: torch.nn.Module) -> dict[str, float]:
        assert not model.training
        torch.rand(3)  # random draws in an evaluation must not change the training
        return {"sharpness": model.logit_scale.item(), "weight": model.right.weight.sum().item()}

    def export(self, model: torch.nn.Module, folder: str) -> None:
        Path(folder, "weights").mkdir()
        Path(folder, "weights", "right.json").write_text(json.dumps(model.right.weight.tolist()))


class StaticTask(TowersTask):
    """Its batches have tensors alone."""

    compiles_once = True

    def prepare(self, batch: Batch) -> Batch:
        return {**batch, "key": torch.zeros(len(batch["key"]))}


class PairFeed:
    """Pairs seeded by the step: a global batch is the same on any number of ranks.

    Batches of the steps in ``poisoned`` contain a NaN. ``seen`` are the steps that were yielded.
    """

    samples = 64
    files = "as first"

    def __init__(self, poisoned: Container[int] = range(0), data: Mapping[str, Any] | None = None) -> None:
        self.poisoned, self.data = poisoned, data or {}
        self.seen: list[int] = []

    def set_up(self, *_: Any, **__: Any) -> Reading:
        return Reading(0, "pairs as needed", files=self.files)

    def batches(self, rank: int, ranks: int, batch: int, start: int) -> Iterator[Batch]:
        step = start
        while True:
            rng = np.random.default_rng(step)
            left = rng.standard_normal((batch * ranks, WIDTH), dtype=np.float32)
            right = (left + 0.3 * rng.standard_normal(left.shape, dtype=np.float32)).astype(np.float32)
            if step in self.poisoned:
                left[0] = np.nan
            own = slice(rank * batch, (rank + 1) * batch)
            self.seen.append(step)
            yield {
                "key": [f"{step}-{i}" for i in range(batch)],
                "left": torch.from_numpy(left[own]),
                "deep": {"right": torch.from_numpy(right[own])},
            }
            step += 1


def before_batches(feed: F, act: Callable[[int, int, Batch], object]) -> F:
    """The feed, which calls ``act`` with the rank, the step and the batch before it yields each batch."""
    batches = feed.batches

    def acting(rank: int, ranks: int, batch: int, start: int) -> Iterator[Batch]:
        for step, made in enumerate(batches(rank, ranks, batch, start), start=start):
            act(rank, step, made)
            yield made

    feed.batches = acting  # type: ignore[method-assign]
    return feed


def stopping(feed: F, stop: StopSignal, at: int, ends: bool = False) -> F:
    """The feed, which requests the training to stop after step ``at``, while the step is computed, and may end."""

    def act(rank: int, step: int, batch: Batch) -> None:
        if step == at:
            stop.request(signal.SIGTERM)
            if ends:
                raise RuntimeError("Ctrl-C also ended the loader processes")

    return before_batches(feed, act)


def slow(accelerator: Accelerator, seconds: float) -> tuple[TowersTask, PairFeed]:
    """Reads each batch for some seconds."""
    return TowersTask(), before_batches(PairFeed(), lambda rank, step, batch: time.sleep(seconds))


def fatal(accelerator: Accelerator, folder: str) -> tuple[TowersTask, PairFeed]:
    """Kills rank 1 at a step, once: a file marks that it has happened."""
    marker = Path(folder, "killed")

    def kill(rank: int, step: int, batch: Batch) -> None:
        if (rank, step) == (1, 8) and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    return TowersTask(), before_batches(PairFeed(), kill)


def training(**changes: Any) -> Training:
    defaults: dict[str, Any] = {"steps": 12, "batch": 16, "log_every": 1, "optimizer": {"lr": 0.02, "warmup": 2}}
    return Training.model_validate({**defaults, **changes})


def job(output: Path | str, evaluate_every: int | None = None, best: str | None = None, **changes: Any) -> Job:
    config = training(**changes)
    return Job(config, str(output), 0, fixed_config(config, MUTABLE_KEYS), evaluate_every=evaluate_every, best=best)


def run(
    job: Job,
    feed: PairFeed | None = None,
    stop: StopSignal | None = None,
    task: TowersTask | None = None,
    accelerator: Accelerator | None = None,
    **options: Any,
) -> tuple[Results, TowersTask]:
    """Train in this process; returns the results and the task, by default one with weights of the job's seed."""
    torch.manual_seed(job.seed)
    task = task or TowersTask(**options)
    ranks = Ranks(0, 1, accelerator or Accelerator("cpu", job.training.compute.precision))
    return run_rank(lambda _: (task, feed or PairFeed()), job, ranks, stop or StopSignal()), task


def stopped_after(step: int, job: Job, ends: bool = False, **options: Any) -> None:
    """Train until a signal after a step stops it."""
    stop = StopSignal()
    with pytest.raises(Stopped) as raised:
        run(job, stopping(PairFeed(), stop, step, ends), stop, **options)
    assert raised.value.status == 128 + signal.SIGTERM


def build(accelerator: Accelerator, options: dict[str, Any], feed: dict[str, Any]) -> tuple[TowersTask, PairFeed]:
    return TowersTask(**options), PairFeed(**feed)


def builder(feed: dict[str, Any] | None = None, **options: Any) -> Build:
    return partial(build, options=options, feed=feed or {})


def rows(output: Path) -> list[dict[str, Any]]:
    """The rows of a training's log."""
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def gradients_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def curve(output: Path) -> list[float]:
    """The losses in a training's log."""
    return [row["loss"] for row in rows(output) if "loss" in row]
