"""Speed of a text tower with texts trimmed to the longest of a batch, over its speed at full length."""

from __future__ import annotations

import statistics
import time

import open_clip

from benchmarks.pipeline.figures import Bench, Figure, alternate
from benchmarks.pipeline.stand_ins import STAND_IN
from teachers.open_clip.text import TextEncoder
from teachers.runtime.accelerator import Accelerator

TEXTS = "texts"
MODEL = "ViT-B-32"


def measure_texts(bench: Bench) -> list[Figure]:
    """How many times as many texts per second trimming gives; the limit is the ratio of the lengths in tokens."""
    accelerator = Accelerator("cpu" if bench.device == STAND_IN else bench.device)
    side = TextEncoder(accelerator.prepare(open_clip.create_model(MODEL)), open_clip.get_tokenizer(MODEL), accelerator)
    batch = [f"a photo of thing {i} on a wooden table" for i in range(bench.scale.texts)]
    tokens = side.tokenize(batch)

    def timed(trim: bool) -> dict[str, float]:
        side._trims = trim
        start = time.perf_counter()
        with accelerator.forward():
            side.encode(tokens)
        accelerator.synchronize()
        return {"s": time.perf_counter() - start}

    timed(True)
    values = alternate({"trimmed": lambda: timed(True), "full": lambda: timed(False)}, bench.scale.rounds)
    ratios = [full / trimmed for full, trimmed in zip(values["full s"], values["trimmed s"], strict=True)]
    limit = tokens.shape[1] / int((tokens != 0).sum(dim=1).max())
    name = f"{MODEL}: texts/s of short texts, trimmed / at full length"
    return [Figure(TEXTS, name, statistics.median(ratios), "", limit, "limit", ratios)]
