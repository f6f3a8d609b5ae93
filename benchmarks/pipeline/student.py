"""The student's data loader beside bare decoding and webdataset, for every augmentation backend.

``make bench-loader`` measures the default backend longer.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path

from benchmarks import loader
from benchmarks.pipeline.figures import Bench, Figure
from reinforce.images.backends import BACKENDS

STUDENT = "the student's data loader"
_DISTINCT = 64  # photographs


def measure_loader(bench: Bench) -> list[Figure]:
    """Images per second of the loader over those of bare decoding and of webdataset, by backend."""
    scale, processes = bench.scale, bench.cores
    with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
        source, _ = loader.write_source(Path(folder), scale.loader_images, processes, _DISTINCT)
        datasets = {f" {backend}": f"{folder}/{backend}" for backend in BACKENDS}
        for backend in BACKENDS:
            loader.reinforce(source, f"{folder}/{backend}", backend, processes)
        variants = loader.make_variants(source, datasets, processes, scale.loader_batch)
        images = scale.loader_batches * scale.loader_batch
        warmup = (2 + loader.PREFETCH * processes) * scale.loader_batch
        values = loader.compare(variants, scale.rounds, images, warmup)
    return [figure for backend in BACKENDS for figure in loader_figures(backend, values)]


def loader_figures(backend: str, values: Mapping[str, Mapping[str, list[float]]]) -> list[Figure]:
    """The figures of a backend, from the values of all rounds."""
    own = values[f"loader {backend}"]
    figures = [
        Figure(
            STUDENT,
            f"images/s, {backend}",
            statistics.median(own["images/s"]),
            "images/s",
            statistics.median(values[f"bare {backend}"]["images/s"]),
            "limit",
            own["images/s"],
        )
    ]
    for other, bound in (("bare", "loader / bare"), ("webdataset", "loader / webdataset")):
        them = values[other if other == "webdataset" else f"{other} {backend}"]["cpu ms"]
        name = {"bare": "CPU of decoding alone / of the loader", "webdataset": "CPU of webdataset / of the loader"}
        figures.append(
            Figure(
                STUDENT,
                f"{name[other]}, {backend}",
                statistics.median(them) / statistics.median(own["cpu ms"]),
                "",
                loader.BOUNDS[bound],
                "at least",
                [a / b for a, b in zip(them, own["cpu ms"], strict=True)],
            )
        )
    return figures
