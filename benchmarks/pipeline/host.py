"""CPU per sample of a worker beside that of decoding and augmenting alone, and how it grows with the shards.

All processes of a variant work at the same time, so that they share caches and memory as in a run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping

from benchmarks.pipeline.alone import serve_decoding
from benchmarks.pipeline.figures import Bench, Figure, alternate, medians
from benchmarks.pipeline.inputs import write_shards
from benchmarks.pipeline.workers import Job, Measured, WorkerSetup, start_workers
from benchmarks.processes import Children

ALONE = "decoding and augmenting alone"
WORKER = "a worker, whole shards"
GROWTH = "growth"
#: Targets: milliseconds of CPU of the worker's own process by augmentations, and all CPU over that of decoding alone.
OWN_MS = {2: 0.6, 10: 1.2}
OVERHEAD = 1.08
TIMES, TOLERANCE = 10, 0.05


def measure_cpu(bench: Bench) -> list[Figure]:
    """CPU per sample alone and of a worker, and the samples per second that follow."""
    variants: dict[str, Callable[[], Mapping[str, float]]] = {}
    with contextlib.ExitStack() as stack:
        for count, images in bench.scale.host.items():
            alone = stack.enter_context(Children(serve_decoding, [(count, bench.photos)] * bench.cores))
            worker = stack.enter_context(start_workers(WorkerSetup(count, bench.cores, bench.device)))
            source = write_shards(bench.folder / f"host-{count}", 2, images, bench.photos)
            warm = write_shards(bench.folder / f"warm-{count}", 2, min(16, images), bench.photos)
            run_job(bench, worker, warm)
            variants[f"alone {count}"] = lambda alone=alone, images=images: {  # type: ignore[misc]
                "ms": 1000 * sum(alone.run([2 * images // bench.cores] * bench.cores)) / (2 * images)
            }
            variants[f"worker {count}"] = lambda worker=worker, source=source: in_milliseconds(  # type: ignore[misc]
                run_job(bench, worker, source)
            )
        values = alternate(variants, bench.scale.host_rounds)
    figures = [figure for count in bench.scale.host for figure in cpu_figures(count, bench.cores, values)]
    return sorted(figures, key=lambda figure: (ALONE, WORKER).index(figure.section))


def cpu_figures(count: int, cores: int, values: Mapping[str, list[float]]) -> list[Figure]:
    """The figures with ``count`` augmentations, from the values of all rounds."""
    median = medians(values)
    alone, own, decode, rate, written = (
        f"alone {count} ms",
        *(f"worker {count} {key}" for key in ("own", "decode", "samples/s", "written")),
    )
    total = median[own] + median[decode]
    label, limit = f"{count} augmentations", median[alone]
    most_own = OWN_MS.get(count)
    return [
        Figure(ALONE, f"CPU per sample, {label}", limit, "ms", rounds=values[alone]),
        Figure(
            WORKER, f"CPU per sample of its own process, {label}", median[own], "ms", most_own, "at most", values[own]
        ),
        Figure(
            WORKER,
            f"CPU per sample of its decode processes, {label}",
            median[decode],
            "ms",
            limit,
            "limit",
            values[decode],
        ),
        Figure(
            WORKER,
            f"all CPU / that of decoding and augmenting alone, {label}",
            total / limit,
            "",
            OVERHEAD,
            "at most",
            [(a + b) / c for a, b, c in zip(values[own], values[decode], values[alone], strict=True)],
        ),
        Figure(
            WORKER,
            f"host ceiling: 1 / CPU of its own process, {label}",
            1000 / median[own],
            "samples/s",
            1000 / most_own if most_own else None,
            "at least",
        ),
        Figure(
            WORKER,
            f"speed on {cores} cores, models that take no time, {label}",
            median[rate],
            "samples/s",
            1000 * cores / limit,
            "limit",
            values[rate],
        ),
        Figure(WORKER, f"written per sample, {label}", median[written], "kB"),
    ]


def measure_growth(bench: Bench) -> list[Figure]:
    """Time of ten times as many shards over that of some: planning, reading, computing and writing."""
    scale = bench.scale
    few = write_shards(bench.folder / "few", scale.growth_shards, scale.growth_images, bench.photos)
    many = write_shards(bench.folder / "many", TIMES * scale.growth_shards, scale.growth_images, bench.photos)

    def times(source: str) -> dict[str, float]:
        measured = run_job(bench, worker, source)
        return {"CPU time": measured.own + measured.decode, "wall time": measured.seconds}

    with start_workers(WorkerSetup(2, bench.cores, bench.device)) as worker:
        run_job(bench, worker, few)
        values = alternate({"few": lambda: times(few), "many": lambda: times(many)}, scale.rounds)
    figures = []
    for clock in ("CPU time", "wall time"):
        ratios = [b / a for a, b in zip(values[f"few {clock}"], values[f"many {clock}"], strict=True)]
        value = medians(values)[f"many {clock}"] / medians(values)[f"few {clock}"]
        name = f"{clock} of {TIMES * scale.growth_shards} shards / of {scale.growth_shards}"
        figures.append(Figure(GROWTH, name, value, "", TIMES * (1 + TOLERANCE), "at most", ratios))
    return figures


def run_job(bench: Bench, worker: Children, source: str) -> Measured:
    """Have one worker process all shards of a source into a new dataset."""
    with bench.output() as output:
        [measured] = worker.run([Job(source, output)])
    assert isinstance(measured, Measured)
    return measured


def in_milliseconds(measured: Measured) -> dict[str, float]:
    """CPU per sample in milliseconds, samples per second, and kB written per sample."""
    samples = measured.samples
    return {
        "own": 1000 * measured.own / samples,
        "decode": 1000 * measured.decode / samples,
        "samples/s": samples / measured.seconds,
        "written": measured.written / samples / 1000,
    }
