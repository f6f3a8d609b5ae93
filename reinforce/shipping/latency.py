"""``reinforce latency``: how large models are and how long one image and one text take, side by side.

The weights are random: an architecture is what is measured. Everything is measured as it is shipped, with its
branches made one, and in turns, so that whatever else the machine does meets all models alike.
"""

from __future__ import annotations

import datetime
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from reinforce.model_names import model_errors
from reinforce.shipping import graph
from reinforce.shipping.machine import machine
from reinforce.shipping.report import Latencies
from reinforce.shipping.towers import parameters, reparameterised, sides
from teachers.open_clip import image_spec, model_name, random_model
from teachers.open_clip_tokens import Tokenizer
from teachers.pixels import to_pixels
from teachers.spec import ModelSpec

_TEXT = "a photo of a small brown dog that runs over wet grass"
Clock = Literal["wall", "process"]
_CLOCKS: dict[Clock, Callable[[], float]] = {"wall": time.perf_counter, "process": time.process_time}
_PACKAGES = ("torch", "open_clip_torch", "timm")


@dataclass
class Timed:
    """One tower of a model in one runtime, and the seconds that it took."""

    model: str
    runtime: str
    side: str
    run: Callable[[], object]
    seconds: list[float] = field(default_factory=list)


def measure(
    specs: Mapping[str, ModelSpec],
    *,
    rounds: int,
    threads: int | None = None,
    onnx: bool = False,
    clock: Clock = "wall",
) -> Latencies:
    """Measure models by what the user calls them. Raises UserError.

    A round runs every tower twice and times the second time, with one image or one text of the tokenizer's full
    length; rounds go forwards and backwards in turns. Torch starts from normalised float32 pixels, onnxruntime from
    bytes, as its graphs do. ``process`` takes the process's own seconds on all its threads, to which what else the
    machine does adds little.
    """
    now = _CLOCKS[clock]
    if threads is not None:
        torch.set_num_threads(threads)
    threads = torch.get_num_threads()
    about = machine((*_PACKAGES, "onnxruntime") if onnx else _PACKAGES)
    models: dict[str, dict[str, Any]] = {}
    timed: list[Timed] = []
    for name, spec in specs.items():
        with model_errors(name), tempfile.TemporaryDirectory(prefix="reinforce-latency-") as folder:
            models[name], towers = _prepared(name, spec, threads, Path(folder) if onnx else None)
        timed += towers
    for turn in range(rounds):
        for one in timed if turn % 2 == 0 else reversed(timed):
            one.run()
            start = now()
            one.run()
            one.seconds.append(now() - start)
    for one in timed:
        models[one.model]["milliseconds"].setdefault(one.runtime, {})[one.side] = _summary(one.seconds)
    about |= {"threads": threads, "clock": f"{clock} clock", "rounds": rounds, "batch": 1}
    return Latencies({"date": datetime.date.today().isoformat(), **about}, models)


def _prepared(name: str, spec: ModelSpec, threads: int, folder: Path | None) -> tuple[dict[str, Any], list[Timed]]:
    """What is known of a model before it runs, and its towers; those in ONNX are made in ``folder``."""
    known = model_name(spec)
    clip = reparameterised(random_model(known))
    image = image_spec(open_clip.get_model_preprocess_cfg(clip))
    both = sides(clip, image, Tokenizer(known)([_TEXT]))
    pixels, texts = (side.rows(1) for side in both)
    pixels = to_pixels(pixels, image)
    towers = {"image": lambda: clip.encode_image(pixels), "text": lambda: clip.encode_text(texts)}
    counts = parameters(clip)
    found: dict[str, Any] = {
        "image size": [image.height, image.width],
        "context length": texts.shape[1],
        "parameters": {**counts, "total": sum(counts.values())},
        "gflop": {side: _operations(run) / 1e9 for side, run in towers.items()},
        "milliseconds": {},
    }
    timed = [Timed(name, "torch", side, _inference(run)) for side, run in towers.items()]
    if folder is not None:
        for side in both:
            path = folder / f"{side.name}.onnx"
            graph.write_onnx(side, path, {})
            run, inputs = graph.session(path, threads), side.rows(1)
            timed.append(Timed(name, "onnxruntime", side.name, lambda run=run, inputs=inputs: run(inputs)))  # type: ignore[misc]
    return found, timed


def _inference(run: Callable[[], object]) -> Callable[[], object]:
    def inside() -> object:
        with torch.inference_mode():
            return run()

    return inside


def _operations(run: Callable[[], object]) -> int:
    """Floating point operations in matrix products and convolutions; a multiplication and an addition are two."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the counter cannot see into fused attention
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            run()
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return int(counter.get_total_flops())


def _summary(seconds: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    return {
        "median": round(1e3 * middle, 3),
        "lower quartile": round(1e3 * low, 3),
        "upper quartile": round(1e3 * high, 3),
        "fastest": round(1e3 * min(seconds), 3),
    }
