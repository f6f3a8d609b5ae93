"""Teachers: images and texts a second, and their share of the card's operations (MFU)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.gpu import recipe
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.sections.right import TEACHERS, pixels_of
from benchmarks.pipeline.figures import Figure
from teachers.runtime.flops import count_flops
from teachers.spec import TeacherSpec

SECTION, SWITCHES, SWEEP = "teachers", "teachers, switches", "teachers, batches"
MFU = 0.45
_WORDS = (14, 75)
_FP8 = (8, 9)  # compute capability of cards with such products


def measure_teachers(bench: Bench) -> list[Figure]:
    """Each teacher of the recipe as runs use it, with texts of captions and of full length."""
    figures: list[Figure] = []
    for name, spec in recipe.teachers(bench).items():
        figures += bench.attempt(f"{SECTION}: {name}", partial(_measure, bench, SECTION, name, spec, texts=_WORDS))
    return figures


def measure_switches(bench: Bench) -> list[Figure]:
    """A teacher with each switch, and a larger one."""
    name, spec = next(iter(recipe.teachers(bench).items()))
    figures: list[Figure] = []
    switches = {name: keys for name, keys in TEACHERS.items() if "compile" in keys and not bench.size.tiny}
    if bench.on_cuda and torch.cuda.get_device_capability(bench.device) >= _FP8:
        switches["fp8"] = {"precision": "fp8"}
    for switch, variant in recipe.available(spec, switches):
        what = f"{name}, {switch}"
        figures += bench.attempt(f"{SWITCHES}: {what}", partial(_measure, bench, SWITCHES, what, variant))
    further = recipe.changed(spec, model=bench.model(recipe.FURTHER))
    return figures + bench.attempt(SWITCHES, partial(_measure, bench, SWITCHES, recipe.FURTHER, further))


def measure_batches(bench: Bench) -> list[Figure]:
    """Images a second of a teacher by the size of its batch, also of sizes that are padded."""
    name, spec = next(iter(recipe.teachers(bench).items()))
    teacher = bench.load(name, spec)
    figures = []
    for rows in bench.size.rows:
        pixels = pixels_of(teacher.image, rows).to(bench.device)
        work = partial(teacher.encode_images, pixels)
        what = f"{name}, batches of {rows}"
        figures.append(bench.figure(SWEEP, what, work, rows, "images/s", seconds=bench.size.point))
    return figures


def _measure(bench: Bench, section: str, name: str, spec: TeacherSpec, texts: Sequence[int] = ()) -> list[Figure]:
    peak = bench.peak()
    flops = _flops_of_image(bench, spec) if peak else 0
    teacher = bench.load(name, spec)
    pixels = pixels_of(teacher.image, bench.size.batch).to(bench.device)
    work = partial(teacher.encode_images, pixels)
    limit: Mapping[str, Any] = {"limit": peak / flops, "rule": "limit"} if peak and flops else {}
    figures = [bench.figure(section, f"{name}, images", work, len(pixels), "images/s", **limit)]
    if limit:
        figures.append(Figure(section, f"{name}, MFU", figures[0].value / limit["limit"], "", MFU, "at least"))
    for words in texts:
        tokens = teacher.tokenize([" ".join(["dog"] * words)] * bench.size.texts)
        what, work = f"{name}, texts of {words + 2} tokens", partial(teacher.encode_tokens, tokens)
        figures.append(bench.figure(section, what, work, bench.size.texts, "texts/s"))
    return figures


def _flops_of_image(bench: Bench, spec: TeacherSpec) -> int:
    """Operations of one image, without those that compare fast paths when a model is loaded."""
    teacher = bench.load("counted", recipe.changed(spec, compile=False))
    return count_flops(partial(teacher.encode_images, pixels_of(teacher.image, 1).to(bench.device)))
