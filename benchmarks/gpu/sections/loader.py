"""Batches of a training without its model: samples a second, CPU of the host and time of the device, by backend."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import torch

from benchmarks.gpu import recipe
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.sections.shards import dataset
from benchmarks.pipeline.figures import Figure
from benchmarks.processes import cpu_of_all
from reinforce.images.backends import BACKENDS
from reinforce.images.device import augment
from reinforce.images.device_records import DEVICE_BACKEND
from reinforce.student.teachers import IMAGE
from reinforce.student.train import build
from reinforce.training.step import Prefetcher

SECTION = "loader"
APART = 0.001  # share of the values, which resizing may round in another way


def measure_loader(bench: Bench) -> list[Figure]:
    """Each backend of ``data.backend`` with the loader processes of a training."""
    figures: list[Figure] = []
    for backend in (*BACKENDS, DEVICE_BACKEND):
        figures += bench.attempt(f"{SECTION}: {backend}", partial(_measure, bench, backend))
    return figures


def _measure(bench: Bench, backend: str) -> list[Figure]:
    size, accelerator = bench.size, bench.accelerator()
    model, output = next(iter(size.students)), bench.folder / "loader"
    config = recipe.training_config(bench, model, dataset(bench), output, {"backend": backend})
    task, feed = build(config, accelerator)
    loaders = feed.set_up(1, size.samples, bench.cores).loaders
    taken = 0
    with contextlib.closing(feed.batches(0, 1, size.samples, 0)) as batches:
        prefetcher = Prefetcher(batches, accelerator)

        def step() -> object:
            nonlocal taken
            taken += size.samples
            prefetcher.fetch()
            return task.prepare(prefetcher.take())

        step()  # starts the processes
        taken, before = 0, cpu_of_all()
        what = f"{backend}, {loaders} loader processes"
        figures = [bench.figure(SECTION, what, step, size.samples, "samples/s", seconds=size.point)]
        cpu = (cpu_of_all() - before) / taken
        prefetcher.fetch()
        batch = prefetcher.take()
    figures.append(Figure(SECTION, f"{backend}, CPU of the host a sample", 1000 * cpu, "ms"))
    name, scale = f"{backend}, time of the device a sample", 1000 / size.samples
    figures.append(bench.duration(SECTION, name, partial(task.prepare, batch), scale, "ms"))
    if "records" in batch:
        figures.append(_compare(batch[IMAGE][: size.compared], batch["records"], task.model.image.height))
    return figures


def _compare(cells: torch.Tensor, records: Any, size: int) -> Figure:
    here, there = (augment(some, records[: len(cells)], size).cpu() for some in (cells.cpu(), cells))
    apart = float((here != there).double().mean())
    name = f"{DEVICE_BACKEND}, share of the values that differ from those of a CPU"
    return Figure(SECTION, name, apart, "", APART, "at most")
