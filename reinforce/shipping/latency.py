"""``reinforce latency``: size of models, and the time that one image and one text take.

Architectures are measured, with random weights and reparameterized as for export. Measurements of all models are
interleaved, so that other load on the machine affects them equally.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch

from reinforce.errors import UserError
from reinforce.model_names import model_errors
from reinforce.processes.cores import available_cores, describe_share
from reinforce.shipping.machine import describe_machine
from reinforce.shipping.packages import TARGETS, TORCH, Runtime, load_target
from reinforce.shipping.report import LatencyReport
from reinforce.shipping.steps import step, step_screen
from reinforce.shipping.targets.base import ExportOptions, size_of
from reinforce.shipping.towers import Tower, count_parameters, reparameterize, split_towers
from reinforce.terminal import Screen
from teachers.open_clip.teacher import image_spec, model_name, random_model
from teachers.open_clip.text import Tokenizer
from teachers.preprocessing.pixels import to_pixels
from teachers.runtime.flops import counted_flops
from teachers.spec import ModelSpec

_TEXT = "a photo of a small brown dog that runs over wet grass"
Clock = Literal["wall", "process"]
_CLOCKS: dict[Clock, Callable[[], float]] = {"wall": time.perf_counter, "process": time.process_time}
_PACKAGES = ("torch", "open_clip_torch", "timm")


@dataclass
class TimedTower:
    """One tower of a model in one runtime, with its measured ``seconds``."""

    model: str
    runtime: str
    side: str
    run: Callable[[], object]
    seconds: list[float] = field(default_factory=list)


def measure_latency(
    specs: Mapping[str, ModelSpec],
    *,
    rounds: int,
    threads: int | None = None,
    runtimes: Mapping[str, Runtime] | None = None,
    clock: Clock = "wall",
    image_sizes: Sequence[int] = (),
    batch: int = 1,
) -> LatencyReport:
    """Measure models, by the name that the user gave, in torch and other runtimes. Raises UserError.

    A round runs every tower twice and times the second run, with ``batch`` images or texts of the tokenizer's full
    length; rounds alternate between forward and backward order. Torch takes normalized float32 pixels, the other
    runtimes bytes, as the exported graphs do. LiteRT and ExecuTorch take a batch row by row. The clock ``process``
    counts CPU seconds of this process on all threads, which depend less on other load. With ``threads``, as many cores
    are used and no others. With ``image_sizes``, each model is measured at each, as ``NAME at SIZE``.
    """
    now, runtimes = _CLOCKS[clock], runtimes or {}
    packages = dict.fromkeys(name for runtime in runtimes.values() for name in TARGETS[runtime.target].packages)
    about = describe_machine((*_PACKAGES, *packages))
    cores = available_cores()
    if threads is not None and threads > cores:
        raise UserError(f"threads: {threads} threads on {cores} cores would wait for each other. Give at most {cores}.")
    pinned, threads = threads, threads or min(torch.get_num_threads(), cores)  # torch ignores quotas
    torch.set_num_threads(threads)
    models: dict[str, dict[str, Any]] = {}
    towers: list[TimedTower] = []
    converted: dict[tuple[str, str], dict[str, Path]] = {}
    with _pin_to_cores(pinned), tempfile.TemporaryDirectory(prefix="reinforce-latency-") as folder:
        with step_screen() as screen:  # and none during the measurement, which it would disturb
            screen.log(f"{rounds} rounds on {describe_share(threads, 0)}, device cpu")
            for number, (name, (given, size)) in enumerate(sized_names([*specs], image_sizes).items()):
                with model_errors(name):
                    models[name], exported, of_model = _prepare(name, specs[given], size, batch)
                    towers += of_model
                    for one in exported:
                        key = (given if one.name == "text" else name, one.name)  # one text tower for all sizes
                        if key not in converted:
                            to = Path(folder, f"{number}-{one.name}")
                            converted[key] = _convert(screen, name, one, runtimes, to)
                        inputs = one.example(batch)
                        for runtime, path in converted[key].items():
                            models[name].setdefault("bytes", {}).setdefault(runtime, {})[one.name] = size_of(path)
                            run = load_target(runtimes[runtime].target).load(path, threads)
                            towers.append(TimedTower(name, runtime, one.name, partial(run, inputs)))
        for number in range(rounds):
            for tower in towers if number % 2 == 0 else reversed(towers):
                tower.run()
                start = now()
                tower.run()
                tower.seconds.append(now() - start)
    for tower in towers:
        models[tower.model]["milliseconds"].setdefault(tower.runtime, {})[tower.side] = _summarise(tower.seconds)
    about |= {"threads": threads, "clock": f"{clock} clock", "rounds": rounds, "batch": batch}
    return LatencyReport({"date": datetime.date.today().isoformat(), **about}, models)


def sized_names(names: Sequence[str], image_sizes: Sequence[int]) -> dict[str, tuple[str, int | None]]:
    """Return the name in the report -> the given name of a model, and its image size if it is not the model's own."""
    if not image_sizes:
        return {name: (name, None) for name in names}
    return {f"{name} at {size}": (name, size) for name in names for size in image_sizes}


@contextlib.contextmanager
def _pin_to_cores(count: int | None) -> Iterator[None]:
    """Keep this thread, and those that it starts, on the last ``count`` of the cores that it may use; None: on all."""
    if count is None or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[-count:])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _prepare(
    name: str, spec: ModelSpec, size: int | None, batch: int
) -> tuple[dict[str, Any], list[Tower], list[TimedTower]]:
    """Return the sizes of a model, its towers to export, and its towers in torch."""
    architecture = model_name(spec)
    clip = reparameterize(random_model(architecture, image_size=size))
    image = image_spec(open_clip.get_model_preprocess_cfg(clip))
    exported = split_towers(clip, image, Tokenizer(architecture)([_TEXT]))
    tokens = exported[1].example(1)

    def encoders(count: int) -> dict[str, Callable[[], object]]:
        pixels, texts = to_pixels(exported[0].example(count), image), exported[1].example(count)
        return {"image": lambda: clip.encode_image(pixels), "text": lambda: clip.encode_text(texts)}

    counts = count_parameters(clip)
    about: dict[str, Any] = {
        "image size": [image.height, image.width],
        "context length": tokens.shape[1],
        "parameters": {**counts, "total": sum(counts.values())},
        "gflop": {side: counted_flops(run) / 1e9 for side, run in encoders(1).items()},
        "milliseconds": {},
    }
    return (
        about,
        exported,
        [TimedTower(name, TORCH, side, torch.inference_mode()(run)) for side, run in encoders(batch).items()],
    )


def _convert(screen: Screen, name: str, tower: Tower, runtimes: Mapping[str, Runtime], folder: Path) -> dict[str, Path]:
    """Convert a tower for each runtime. Runtimes of the same files share them."""
    paths: dict[str, Path] = {}
    converted: dict[tuple[Any, str], Path] = {}  # by the method that converts, and the weights
    for runtime, of in runtimes.items():
        target = load_target(of.target)
        method = type(target).convert
        if (method, of.weights) not in converted:
            (folder / runtime).mkdir(parents=True)
            options = ExportOptions(name, of.weights, whole=converted.get((method, "fp32")))
            with step(screen, f"{name}: {tower.name} tower: conversion for {runtime}"):
                converted[method, of.weights] = target.convert(tower, folder / runtime, options)
        paths[runtime] = converted[method, of.weights]
    return paths


def _summarise(seconds: list[float]) -> dict[str, float]:
    """Return median, quartiles and minimum in milliseconds."""
    low, middle, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    return {
        "median": round(1e3 * middle, 3),
        "lower quartile": round(1e3 * low, 3),
        "upper quartile": round(1e3 * high, 3),
        "fastest": round(1e3 * min(seconds), 3),
    }
