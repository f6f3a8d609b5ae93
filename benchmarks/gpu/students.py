"""Trainings of students on the dataset that ``shards.py`` has made: speed, waiting for data, and exact resuming."""

from __future__ import annotations

import contextlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.models import model_name
from benchmarks.pipeline.figures import Figure
from reinforce import settings
from reinforce.student.config import StudentConfig
from reinforce.student.train import build, make_job
from reinforce.training.distributed.ranks import Ranks
from reinforce.training.loop import run_rank
from reinforce.training.stop import StopSignal
from teachers.device.accelerator import Precision

STUDENTS = "students"
WAITING = 0.02


class _Enough(Exception):
    """Ends a training at an evaluation, from where another one resumes."""


def measure_students(bench: Bench) -> list[Figure]:
    """Samples per second with and without ``compile``, and how many tensors a resumed training has otherwise."""
    figures: list[Figure] = []
    for name in bench.size.students:
        for compiled in (False, True):
            if compiled and (bench.is_late() or not bench.size.compiles_students):
                bench.log(f"{name}, compiled: left out")
                continue
            what = f"students: {name}{', compiled' * compiled}"
            figures += bench.attempt(what, partial(_measure, bench, name, compiled))
    return figures + bench.attempt("students: resuming", lambda: [_compare_resumed(bench)])


def _measure(bench: Bench, name: str, compiled: bool) -> list[Figure]:
    output = _output(bench, name, compiled)
    _train(bench, name, output, compiled=compiled)
    rows = [row for row in map(json.loads, (output / "log.jsonl").read_text().splitlines()) if "loss" in row]
    last = rows[-1]  # of the second half of the steps
    what = f"{name}, {'compiled' if compiled else 'eager'}, batches of {bench.size.students[name]}"
    limit = last["samples_per_second"] / max(1e-9, 1 - last["waiting"])
    return [
        Figure(STUDENTS, f"{what}, training", last["samples_per_second"], "samples/s", limit, "limit"),
        Figure(STUDENTS, f"{what}, share of the time waiting for data", last["waiting"], "", WAITING, "at most"),
    ]


def _compare_resumed(bench: Bench) -> Figure:
    """Tensors of the last checkpoint that differ between the first training and one that was interrupted."""
    name = next(iter(bench.size.students))
    resumed = bench.folder / "resumed"
    with contextlib.suppress(_Enough):
        _train(bench, name, resumed, stop=True)
    _train(bench, name, resumed)
    whole, parts = (
        load_file(sorted((output / "checkpoints").glob("*.safetensors"))[-1])
        for output in (_output(bench, name), resumed)
    )
    different = sum(not torch.equal(parts[key], tensor) for key, tensor in whole.items())
    return Figure(STUDENTS, "tensors that differ after a training that resumes", different, "", 0.0, "at most")


def _output(bench: Bench, name: str, compiled: bool = False) -> Path:
    return bench.folder / f"student-{name}-{'compiled' if compiled else 'eager'}"


def _train(bench: Bench, name: str, output: Path, compiled: bool = False, stop: bool = False) -> None:
    size = bench.size
    half = size.steps // 2
    precision: Precision = "bf16" if bench.on_cuda else "fp32"
    compute: dict[str, Any] = {"precision": precision, "compile": compiled}
    config = settings.parse(
        StudentConfig,
        {
            "output": str(output),
            "student": {"model": model_name(name)},
            "data": {"datasets": str(bench.folder / "run-2"), "workers": bench.cores if bench.on_cuda else 0},
            "loss": {"lambda": 0.7},
            "evaluate": {"every": half},
            "train": {
                "steps": size.steps,
                "batch": size.students[name],
                "log_every": half,
                "optimizer": {"warmup": 1},
                "checkpoints": {"every": half},
                "compute": compute,
            },
        },
    )

    def evaluated(step: int, _: Any) -> None:
        if stop and step < size.steps:
            raise _Enough

    ranks = Ranks(0, 1, bench.accelerator(precision), cpus=bench.cores)
    run_rank(partial(build, config), make_job(config), ranks, StopSignal(), on_evaluation=evaluated)
