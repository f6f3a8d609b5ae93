"""The captioner of the recipe: captions a second of natural lengths, and what the host asks of the device a word."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from benchmarks.gpu import recipe
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.right import CAPTIONERS, pixels_of
from benchmarks.pipeline.figures import Figure, Rule
from teachers.registry import load_captioner
from teachers.spec import CaptionerSpec

SECTION, SWITCHES, SWEEP = "captions", "captions, switches", "captions, batches"
PER_SECOND = 4000
WAITS_A_WORD = 1
ENCODING = "encoding for captions"


def measure_captions(bench: Bench) -> list[Figure]:
    """Captions of a run, the encoding of their images alone, and kernels, launches and waits a word."""
    name, spec = recipe.captioner(bench)
    figures = bench.attempt(SECTION, partial(_measure, bench, SECTION, name, spec, details=True))
    return figures + bench.attempt(f"{SECTION}: {ENCODING}", partial(_measure_encoding, bench, spec))


def measure_switches(bench: Bench) -> list[Figure]:
    """Captions without graphs and with compiled steps, which take a minute a shape to compile."""
    name, spec = recipe.captioner(bench)
    figures: list[Figure] = []
    compiled = {} if bench.size.tiny else {"compiled": {"compile": True}}
    for switch, variant in recipe.available(spec, {**CAPTIONERS, **compiled}):
        if variant != spec:
            work = partial(_measure, bench, SWITCHES, f"{name}, {switch}", variant)
            figures += bench.attempt(f"{SWITCHES}: {switch}", work)
    return figures


def measure_batches(bench: Bench) -> list[Figure]:
    """Captions a second by the number of images of a batch."""
    name, spec = recipe.captioner(bench)
    captioner: Any = load_captioner(name, spec, bench.device)
    figures = []
    for images in bench.size.captioned:
        what, work = f"{name}, batches of {images} images", _work(bench, captioner, images)
        items = images * spec.captions
        figures.append(bench.figure(SWEEP, what, work, items, "captions/s", seconds=bench.size.point))
    return figures


def _work(bench: Bench, captioner: Any, images: int) -> Callable[[], list[int]]:
    """A batch with seeds that differ between calls, so that lengths do -> the tokens of each caption."""
    pixels = pixels_of(captioner.image, images).to(bench.device)
    random = np.random.default_rng(0)

    def work() -> list[int]:
        seeds = random.integers(2**63, size=(images, captioner.captions), dtype=np.uint64)
        return [len(text) for texts in captioner.generate(pixels.clone(), seeds) for text in texts or []]

    return work


def _measure(bench: Bench, section: str, name: str, spec: CaptionerSpec, details: bool = False) -> list[Figure]:
    captioner: Any = load_captioner(name, spec, bench.device)
    images = bench.size.batch // 2  # of the batch of a run with two augmentations
    work, lengths = _work(bench, captioner, images), list[int]()

    def kept() -> None:
        lengths[:] = work()

    goal: tuple[float | None, Rule] = (PER_SECOND, "at least") if bench.on_cuda and details else (None, "")
    what = f"{name}, batches of {images} images with {spec.captions} captions"
    figures = [bench.figure(section, what, kept, images * spec.captions, "captions/s", *goal)]
    if not details:
        return figures
    traced, steps = bench.traces[what], max(lengths) + 1  # of the last batch
    return [
        *figures,
        Figure(section, "tokens of a caption", float(np.mean(lengths)), ""),
        Figure(section, "tokens of the longest caption of a batch", max(lengths), ""),
        Figure(section, "kernels a word of a batch", traced["kernels"] / steps, ""),
        Figure(section, "launches of kernels and graphs a word of a batch", traced["launches"] / steps, ""),
        Figure(section, "waits of the host a word of a batch", traced["waits"] / steps, "", WAITS_A_WORD, "at most"),
    ]


def _measure_encoding(bench: Bench, spec: CaptionerSpec) -> list[Figure]:
    """Images with one caption of one word: hardly more than their encoding, however captions are decoded."""
    short = recipe.changed(spec, captions=1, strategy="greedy", top_p=None, min_length=0, max_length=3)
    captioner: Any = load_captioner("encoder", short, bench.device)
    images = bench.size.batch // 2
    return [bench.figure(SECTION, ENCODING, _work(bench, captioner, images), images, "images/s")]
