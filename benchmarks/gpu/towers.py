"""Teachers: images and texts per second, and their share of the card's operations (MFU)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.models import RandomTeacher, build, vocabulary_size
from benchmarks.pipeline.figures import Figure, Rule, alternate, medians

TEACHERS = "teachers"
MFU = 0.45
_LENGTHS = (16, 77)
_AS_IN_RUNS = "as in runs"
_MINUTES = 4.0  # that the sections after this one take


def measure_towers(bench: Bench) -> list[Figure]:
    """Images per second of each teacher as open_clip has it, compiled, with bf16 weights, and as runs use it."""
    figures: list[Figure] = []
    for name in bench.size.teachers:
        figures += bench.attempt(f"teachers: {name}", partial(_measure, bench, name))
    return figures


def _measure(bench: Bench, name: str) -> list[Figure]:
    size, accelerator = bench.size, bench.accelerator()
    teacher = RandomTeacher(accelerator.device, name)
    assert teacher.image is not None
    pixels = accelerator.layout(
        torch.randn(size.images, 3, teacher.image.height, teacher.image.width, device=accelerator.device)
    )
    works: dict[str, Callable[[], object]] = {
        **_variants(bench, name, pixels),
        _AS_IN_RUNS: lambda: teacher.encode_images(pixels),
    }
    with FlopCounterMode(display=False) as counter:
        works["open_clip, eager"]()
    flops = counter.get_total_flops() / size.images
    rates, values = _rates(bench, works, size.images)
    figures = []
    for variant, rate in rates.items():
        rounds = values[f"{variant} rate"]
        figures.append(
            Figure(TEACHERS, f"{name}, images, {variant}", rate, "images/s", bench.peak() / flops, "limit", rounds)
        )
        target: tuple[float, Rule] = (MFU, "at least") if variant == _AS_IN_RUNS and bench.on_cuda else (1.0, "limit")
        figures.append(Figure(TEACHERS, f"{name}, MFU, {variant}", rate * flops / bench.peak(), "", *target))
    return figures + _measure_texts(bench, name, teacher)


def _variants(bench: Bench, name: str, pixels: torch.Tensor) -> dict[str, Callable[[], object]]:
    """open_clip's own image tower under autocast, compiled, and in bf16."""
    accelerator = bench.accelerator()
    tower: Any = accelerator.prepare(build(name)).visual
    cast = copy.deepcopy(tower).to(torch.bfloat16)
    low = pixels.to(torch.bfloat16)

    def forward(model: Any) -> Callable[[], object]:
        def work() -> object:
            with accelerator.forward():
                return model(pixels)

        return work

    def in_bf16() -> object:
        with torch.inference_mode():
            return cast(low)

    variants = {"open_clip, eager": forward(tower), "bf16 weights": in_bf16}
    if bench.is_late(_MINUTES):
        bench.log(f"{name}, compiled: left out")
    else:
        variants["compiled"] = forward(torch.compile(tower, backend=bench.compiler, dynamic=False))
    return variants


def _measure_texts(bench: Bench, name: str, teacher: RandomTeacher) -> list[Figure]:
    """Texts per second by their length in tokens; only those that are cut to their longest text differ."""
    full, end = teacher.tokenize([""]).shape[1], vocabulary_size(name) - 1
    works: dict[str, Callable[[], object]] = {}
    for length in _LENGTHS:
        tokens = torch.randint(1, 1000, (bench.size.texts, full))
        tokens[:, min(length, full) - 1] = end  # of CLIP, which pools there
        tokens[:, min(length, full) :] = 0
        works[f"texts of {min(length, full)} tokens"] = partial(teacher.encode_tokens, tokens)
    rates, values = _rates(bench, works, bench.size.texts)
    return [
        Figure(TEACHERS, f"{name}, {what}", rate, "texts/s", rounds=values[f"{what} rate"])
        for what, rate in rates.items()
    ]


def _rates(
    bench: Bench, works: Mapping[str, Callable[[], object]], items: int
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Medians and all values of each work's items per second."""
    for work in works.values():
        work()  # compiles, and allocates
    variants = {name: lambda work=work: {"rate": bench.rate(work, items)} for name, work in works.items()}
    values = alternate(variants, bench.size.rounds)
    return {name.removesuffix(" rate"): rate for name, rate in medians(values).items()}, values
