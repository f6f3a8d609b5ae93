"""Trainings of students on the dataset of ``shards.py``: speed with the loader, exact resuming, and several ranks."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.gpu import recipe
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.sections.shards import dataset
from benchmarks.pipeline.figures import Figure
from benchmarks.processes import children
from reinforce.processes.signals import Stopped, StopSignal
from reinforce.student.config import StudentConfig
from reinforce.student.train import build, student_job
from reinforce.terminal import Screen
from reinforce.training.loop import run_rank
from reinforce.training.ranks import join_ranks
from teachers.fast_paths import usage

SECTION, RESUMED, RANKS = "students", "resumed training", "ranks"
WAITING = 0.02
#: Keys of ``train.compute`` that are compared. On a CPU nothing is compiled, which takes a minute.
SWITCHES: dict[str, dict[str, Any]] = {"eager": {"compile": False}, "compiled": {"compile": True}}
_FOREVER = 1_000_000  # steps
_COUNTED = 2  # rows of the log, after which they count
#: Until all ranks have ended when one was killed: torchrun kills those that SIGTERM does not end after 30 s.
_END_SECONDS = 60.0


class _Watch(Screen):
    """Asks a training to stop at the first row of its log, or ``seconds`` after the second one.

    With ``tracing``, the steps between the first two are traced; those before have what is compiled and allocated.
    """

    def __init__(self, stop: StopSignal, seconds: float, tracing: AbstractContextManager[object] | None) -> None:
        super().__init__()
        self._stop, self._seconds, self._tracing = stop, seconds, tracing
        self._rows, self._counted = 0, time.monotonic()

    def draw(self, line: str, done: float, total: float) -> None:
        self._rows += 1
        if self._tracing is not None and self._rows == 1:
            self._tracing.__enter__()
        if self._tracing is not None and self._rows == _COUNTED:
            self._tracing.__exit__(None, None, None)
            self._counted = time.monotonic()
        counts = self._tracing is None or self._rows > _COUNTED
        if counts and time.monotonic() - self._counted >= self._seconds:
            self._stop.request(signal.SIGTERM)
        super().draw(line, done, total)


def measure_students(bench: Bench) -> list[Figure]:
    """Samples a second of a training with its loader, which follow the first steps."""
    figures: list[Figure] = []
    for name in bench.size.students:
        for switch, compute in SWITCHES.items():
            if not (compute["compile"] and bench.size.tiny):
                what = f"{name}, {switch}"
                figures += bench.attempt(f"{SECTION}: {what}", partial(_measure, bench, name, what, compute))
    return figures


def _measure(bench: Bench, name: str, what: str, compute: dict[str, Any]) -> list[Figure]:
    output = bench.folder / "training"
    shutil.rmtree(output, ignore_errors=True)
    config = _config(bench, name, output, steps=_FOREVER, compute=compute)
    name = f"{what}, with its loader"
    _run(config, bench.size.seconds, bench.tracing(name))
    bench.keep_usage(name, usage.snapshot())  # counts begin anew with each training
    rows = _rows(output)[_COUNTED:]
    rate = len(rows) / sum(1 / row["samples_per_second"] for row in rows)
    waiting = sum(row["waiting"] for row in rows) / len(rows)
    figures = [
        Figure(SECTION, name, rate, "samples/s", rate / max(1e-9, 1 - waiting), "limit"),
        Figure(SECTION, f"{what}, share of the time waiting for data", waiting, "", WAITING, "at most"),
        Figure(SECTION, f"{what}, peak of memory", max(row["memory"] for row in rows) / 1e9, "GB"),
    ]
    if all("mfu" in row for row in rows):
        figures.append(Figure(SECTION, f"{what}, MFU", sum(row["mfu"] for row in rows) / len(rows), ""))
    return figures


def compare_resumed(bench: Bench) -> list[Figure]:
    """Tensors of the last checkpoint that differ from those of a training that was not interrupted."""
    name = next(iter(bench.size.students))
    outputs = [bench.folder / which for which in ("whole", "resumed")]
    for output in outputs:
        shutil.rmtree(output, ignore_errors=True)
    whole, resumed = (_config(bench, name, output, log_every=1) for output in outputs)
    _run(whole)
    if not _run(resumed, 0.0):  # at the first step
        raise RuntimeError("the training ended before it was stopped")
    _run(resumed)
    name = "tensors that differ after a training that resumes"
    return [Figure(RESUMED, name, _differing(*outputs), "", 0.0, "at most")]


def measure_ranks(bench: Bench) -> list[Figure]:
    """A training on several cards: its speed, the end of all ranks when one is killed, and equal tensors afterwards."""
    name = next(iter(bench.size.students))
    outputs = {which: bench.folder / f"ranks-{which}" for which in ("whole", "killed")}
    for output in outputs.values():
        shutil.rmtree(output, ignore_errors=True)
    checkpoints = {"every": bench.size.rank_steps // 4, "keep": 9}
    steps = {"all_ranks": True, "steps": bench.size.rank_steps, "checkpoints": checkpoints}
    traced = {"whole": {}, "killed": {"profile": 2}}  # the first one is timed
    configs = {which: _config(bench, name, output, **steps, **traced[which]) for which, output in outputs.items()}
    if _start(bench, configs["whole"]).wait():
        raise RuntimeError("a rank failed: see its message")
    running = _start(bench, configs["killed"])
    while not [*(outputs["killed"] / "checkpoints").glob("*.safetensors")]:
        if running.poll() is not None:
            raise RuntimeError("a rank ended before the first checkpoint: see its message")
        time.sleep(0.05)
    os.kill(max(children(running.pid)), signal.SIGKILL)
    killed = time.monotonic()
    running.wait()
    ended = time.monotonic() - killed
    _start(bench, configs["killed"]).wait()
    rows = _rows(outputs["whole"])[1:]
    rate = len(rows) / sum(1 / row["samples_per_second"] for row in rows)
    different = _differing(*outputs.values())
    return [
        Figure(RANKS, f"{name}, {bench.ranks} ranks", rate, "samples/s"),
        Figure(RANKS, "seconds until the others have ended when one was killed", ended, "s", _END_SECONDS, "at most"),
        Figure(RANKS, "tensors that differ after that training resumes", different, "", 0.0, "at most"),
    ]


def _start(bench: Bench, config: StudentConfig) -> subprocess.Popen[bytes]:
    """Train with torchrun, as on one machine."""
    path = Path(f"{config.output}.json")
    path.write_text(config.model_dump_json(exclude_unset=True, by_alias=True), encoding="utf-8")
    ranks = ["--standalone", "--nproc-per-node", f"{bench.ranks}", "--monitor-interval", "0.1"]
    words = [*ranks, "-m", "reinforce", "train", str(path)]
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *words])  # noqa: S603


def _config(bench: Bench, model: str, output: Path, **train: Any) -> StudentConfig:
    keys = {"steps": bench.size.steps, "checkpoints": {"every": _FOREVER}, **train}
    return recipe.training_config(bench, model, dataset(bench), output, **keys)


def _run(
    config: StudentConfig, seconds: float = math.inf, tracing: AbstractContextManager[object] | None = None
) -> bool:
    """Train in this process -> whether ``_Watch`` has stopped it."""
    stop = StopSignal()
    with join_ranks(config.train.compute) as ranks:
        try:
            run_rank(partial(build, config), student_job(config), ranks, stop, _Watch(stop, seconds, tracing))
        except Stopped:
            return True
    return False


def _rows(output: Path) -> list[dict[str, Any]]:
    rows = map(json.loads, (output / "log.jsonl").read_text(encoding="utf-8").splitlines())
    return [row for row in rows if "loss" in row]


def _differing(*outputs: Path) -> int:
    """Tensors of the last checkpoints that are not equal."""
    one, other = (load_file(sorted((path / "checkpoints").glob("*.safetensors"))[-1]) for path in outputs)
    return sum(not torch.equal(other[key], tensor) for key, tensor in one.items())
