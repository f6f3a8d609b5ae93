"""``reinforce latency``: size of models, and the time that one image and one text take.

Architectures are measured, with random weights and reparameterized as for export. Measurements of all models are
interleaved, so that other load on the machine affects them equally.
"""

from __future__ import annotations

import datetime
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from reinforce.model_names import model_errors
from reinforce.processes.cores import available_cores, describe_share
from reinforce.shipping.machine import describe_machine
from reinforce.shipping.report import LatencyReport
from reinforce.shipping.targets import onnx as graph
from reinforce.shipping.towers import count_parameters, reparameterize, split_towers
from reinforce.terminal import Screen
from teachers.open_clip.teacher import image_spec, model_name, random_model
from teachers.open_clip.tokenizer import Tokenizer
from teachers.preprocessing.pixels import to_pixels
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
    onnx: bool = False,
    clock: Clock = "wall",
) -> LatencyReport:
    """Measure models, by the name that the user gave. Raises UserError.

    A round runs every tower twice and times the second run, with one image or one text of the tokenizer's full length;
    rounds alternate between forward and backward order. Torch takes normalized float32 pixels, onnxruntime bytes, as
    the exported graphs do. The clock ``process`` counts CPU seconds of this process on all threads, which depend less
    on other load.
    """
    now = _CLOCKS[clock]
    threads = threads or min(torch.get_num_threads(), available_cores())  # torch ignores quotas of containers
    torch.set_num_threads(threads)
    Screen().log(f"{rounds} rounds on {describe_share(threads, 0)}, device cpu")
    about = describe_machine((*_PACKAGES, "onnxruntime") if onnx else _PACKAGES)
    models: dict[str, dict[str, Any]] = {}
    towers: list[TimedTower] = []
    for name, spec in specs.items():
        with model_errors(name), tempfile.TemporaryDirectory(prefix="reinforce-latency-") as folder:
            models[name], of_model = _prepare(name, spec, threads, Path(folder) if onnx else None)
        towers += of_model
    for number in range(rounds):
        for tower in towers if number % 2 == 0 else reversed(towers):
            tower.run()
            start = now()
            tower.run()
            tower.seconds.append(now() - start)
    for tower in towers:
        models[tower.model]["milliseconds"].setdefault(tower.runtime, {})[tower.side] = _summarise(tower.seconds)
    about |= {"threads": threads, "clock": f"{clock} clock", "rounds": rounds, "batch": 1}
    return LatencyReport({"date": datetime.date.today().isoformat(), **about}, models)


def _prepare(name: str, spec: ModelSpec, threads: int, folder: Path | None) -> tuple[dict[str, Any], list[TimedTower]]:
    """Return the sizes of a model and its towers in torch, and with ``folder`` also in onnxruntime."""
    architecture = model_name(spec)
    clip = reparameterize(random_model(architecture))
    image = image_spec(open_clip.get_model_preprocess_cfg(clip))
    exported = split_towers(clip, image, Tokenizer(architecture)([_TEXT]))
    pixels, texts = (tower.example(1) for tower in exported)
    pixels = to_pixels(pixels, image)
    encoders = {"image": lambda: clip.encode_image(pixels), "text": lambda: clip.encode_text(texts)}
    counts = count_parameters(clip)
    about: dict[str, Any] = {
        "image size": [image.height, image.width],
        "context length": texts.shape[1],
        "parameters": {**counts, "total": sum(counts.values())},
        "gflop": {side: _count_operations(run) / 1e9 for side, run in encoders.items()},
        "milliseconds": {},
    }
    timed = [TimedTower(name, "torch", side, _in_inference_mode(run)) for side, run in encoders.items()]
    if folder is not None:
        for tower in exported:
            path = folder / f"{tower.name}.onnx"
            graph.write_onnx(tower, path, {})
            run = partial(graph.load_session(path, threads), tower.example(1))
            timed.append(TimedTower(name, "onnxruntime", tower.name, run))
    return about, timed


def _in_inference_mode(run: Callable[[], object]) -> Callable[[], object]:
    def wrapped() -> object:
        with torch.inference_mode():
            return run()

    return wrapped


def _count_operations(run: Callable[[], object]) -> int:
    """Count floating point operations in matrix products and convolutions; a multiply-add counts as two."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the counter does not support fused attention
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            run()
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return int(counter.get_total_flops())


def _summarise(seconds: list[float]) -> dict[str, float]:
    """Return median, quartiles and minimum in milliseconds."""
    low, middle, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    return {
        "median": round(1e3 * middle, 3),
        "lower quartile": round(1e3 * low, 3),
        "upper quartile": round(1e3 * high, 3),
        "fastest": round(1e3 * min(seconds), 3),
    }
