"""A captioner: captions per second, and what the host asks of the device for each word."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.models import RandomCaptioner
from benchmarks.pipeline.figures import Figure, Rule, alternate

CAPTIONS = "captions"
PER_SECOND = 4000
WAITS_A_WORD = 1
_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


def measure_captions(bench: Bench) -> list[Figure]:
    """Speed of a batch, and kernels, launches and waits a word."""
    size, accelerator = bench.size, bench.accelerator()
    captioner = RandomCaptioner(accelerator.device, size.captioner, size.captions, size.words)
    side = captioner.image.height
    pixels = torch.randn(size.captioned, 3, side, side, device=accelerator.device)
    seeds = np.arange(size.captioned * size.captions, dtype=np.uint64).reshape(size.captioned, size.captions)
    words = max(len(text) for texts in captioner.generate(pixels, seeds) for text in texts or []) + 1

    def work() -> object:
        return captioner.generate(pixels, seeds)

    count = size.captioned * size.captions
    values = alternate({"captions": lambda: {"rate": bench.rate(work, count)}}, size.rounds)
    what = f"{size.captioner}, batches of {size.captioned} images with {size.captions} captions of {size.words} words"
    target: tuple[float | None, Rule] = (PER_SECOND, "at least") if bench.on_cuda else (None, "")
    rates = values["captions rate"]
    rate = Figure(CAPTIONS, what, statistics.median(rates), "captions/s", *target, rates)
    return [rate, *bench.attempt("captions: calls of a word", lambda: _count_calls(bench, work, words))]


def _count_calls(bench: Bench, work: Callable[[], object], words: int) -> list[Figure]:
    """What the profiler sees, for each word of a batch. On a CPU, ATen's operations stand for kernels."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.on_cuda else [])]
    with profile(activities=activities) as profiled:
        bench.seconds(work)
    names = [(str(event.name), str(event.device_type)) for event in profiled.events() or []]
    if bench.on_cuda:
        kernels = sum("CUDA" in device and not name.startswith(("Memcpy", "Memset")) for name, device in names)
        launches = sum(name.startswith(_LAUNCHES) for name, _ in names)
        waits = sum(name in _WAITS for name, _ in names)
    else:
        kernels = launches = sum(name.startswith("aten::") for name, _ in names)
        waits = sum(name == "aten::_local_scalar_dense" for name, _ in names)
    return [
        Figure(CAPTIONS, "kernels a word of a batch", kernels / words, ""),
        Figure(CAPTIONS, "launches of kernels and graphs a word of a batch", launches / words, ""),
        Figure(CAPTIONS, "waits of the host a word of a batch", waits / words, "", WAITS_A_WORD, "at most"),
    ]
