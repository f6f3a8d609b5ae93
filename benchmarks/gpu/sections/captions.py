"""The captioner of the recipe: captions a second of natural lengths, and what the host asks of the device a word."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from benchmarks.gpu import recipe
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.sections.right import EXACT, RUNS, captioners, pixels_of
from benchmarks.pipeline.figures import Figure, Rule
from teachers.spec import CaptionerSpec

SECTION, SWITCHES, SWEEP = "captions", "captions, switches", "captions, batches"
PER_SECOND = 4000
WAITS_A_WORD = 1
ENCODING = "encoding for captions"
_DRAWS = 4  # sets of random numbers, which a run draws while others use the accelerator


def measure_captions(bench: Bench) -> list[Figure]:
    """Captions of a run, the encoding of their images alone, and kernels, launches and waits a word."""
    name, spec = recipe.captioner(bench)
    return _measure(bench, SECTION, name, spec, details=True)


def measure_switches(bench: Bench) -> list[Figure]:
    """Captions with compiled steps, which take minutes to compile, with graphs, and with neither."""
    name, spec = recipe.captioner(bench)
    figures: list[Figure] = []
    for switch, variant in captioners(bench, spec):
        if switch not in (RUNS, EXACT):
            what = f"{name}, {switch}"
            figures += bench.attempt(f"{SWITCHES}: {what}", partial(_measure, bench, SWITCHES, what, variant))
    return figures


def measure_batches(bench: Bench) -> list[Figure]:
    """Captions a second by the number of images that are captioned at once."""
    name, spec = recipe.captioner(bench)
    captioner: Any = bench.load(name, spec)
    figures = []
    for images in bench.size.captioned:
        what, work = f"{name}, {images} images at once", _work(bench, captioner, images)
        items = images * spec.captions
        figures.append(bench.figure(SWEEP, what, work, items, "captions/s", seconds=bench.size.point))
    return figures


def _work(bench: Bench, captioner: Any, images: int, batches: int = 1) -> Callable[[], list[int]]:
    """The captions of a row group, with seeds that differ between calls, so that lengths do -> their tokens."""
    pixels = pixels_of(captioner.image, images).to(bench.device)
    random = np.random.default_rng(0)
    shape = (images * batches, captioner.captions)
    drawn = itertools.cycle(
        [captioner.draw(random.integers(2**63, size=shape, dtype=np.uint64)) for _ in range(_DRAWS)]
    )

    def work() -> list[int]:
        numbers = next(drawn)
        if captioner.by_group:  # as a run does
            encoded = [image for _ in range(batches) for image in captioner.encode(pixels.clone()).unbind()]
            texts = captioner.decode(encoded, numbers)
        else:
            texts = [text for part in np.split(numbers, batches) for text in captioner.generate(pixels.clone(), part)]
        return [len(tokens) for captions in texts for tokens in captions or []]

    return work


def _measure(bench: Bench, section: str, name: str, spec: CaptionerSpec, details: bool = False) -> list[Figure]:
    captioner: Any = bench.load(name, spec)
    images, batches = bench.size.batch // 2, bench.size.group  # of a run with two augmentations
    work, count = _work(bench, captioner, images, batches), images * batches * captioner.captions
    goal: tuple[float | None, Rule] = (PER_SECOND, "at least") if bench.on_cuda and details else (None, "")
    what = f"{name}, {batches} batches of {images} images with {captioner.captions} captions"
    figures = [bench.figure(section, what, work, count, "captions/s", *goal)]
    if not details:
        return figures
    encode = partial(captioner.encode, pixels_of(captioner.image, images).to(bench.device))
    figures.append(bench.figure(section, ENCODING, encode, images, "images/s"))
    figures.append(Figure(section, "tokens of a caption", float(np.mean(work())), ""))
    one = _work(bench, captioner, images)
    one()
    with bench.tracing(f"{name}, one batch") as trace:
        longest = max(one())
    counts = {"kernels": len(trace.kernels), "launches of kernels and graphs": trace.launches}
    figures += [Figure(section, f"{what} a word of a batch", n / (longest + 1), "") for what, n in counts.items()]
    waits = trace.waits / (longest + 1)
    figures.append(Figure(section, "waits of the host a word of a batch", waits, "", WAITS_A_WORD, "at most"))
    return [*figures, Figure(section, "tokens of the longest caption of a batch", longest, "")]
