"""Share of the time in which an accelerator is busy, when its models are the slower part.

The models sleep for a fixed time per image, ``PACE`` times as long as this machine needs for everything else. Workers
share its cores, so with more of them each has slower models.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

from benchmarks.pipeline.figures import Bench, Figure, alternate, medians
from benchmarks.pipeline.inputs import write_shards
from benchmarks.pipeline.workers import Job, WorkerSetup, start_workers
from benchmarks.processes import Children

ACCELERATOR = "accelerator"
AUGMENTATIONS = 2
BATCH = 128  # images, so that a shard is two batches and every second batch is the last of its shard
PACE = 1.4
BUSY = 0.97


def measure_busy(bench: Bench, host_ms: float) -> list[Figure]:
    """Busy share by number of workers. ``host_ms`` is the CPU per sample of everything but the models."""
    scale = bench.scale
    source = write_shards(bench.folder / "busy", scale.busy_shards, scale.busy_images, bench.photos)
    warm = write_shards(bench.folder / "busy-warm", max(scale.busy_workers), scale.busy_images, bench.photos)
    per_core = PACE * host_ms / 1000 / AUGMENTATIONS / bench.cores  # seconds per augmented image

    def share(workers: Children, source: str) -> float:
        """The mean of the workers' shares."""
        count = len(workers.all)
        with bench.output() as output:
            return statistics.fmean(
                measured.busy
                for measured in workers.run([Job(source, output, count * per_core, n, count) for n in range(count)])
            )

    def measure(count: int) -> Callable[[], Mapping[str, float]]:
        def started() -> dict[str, float]:  # idle processes of the other variants would take memory
            setup = WorkerSetup(AUGMENTATIONS, max(1, bench.cores // count), bench.device, BATCH)
            with start_workers(setup, count) as workers:
                share(workers, warm)  # the first images of a new process take longer
                return {"busy": share(workers, source)}

        return started

    values = alternate({f"{count}": measure(count) for count in scale.busy_workers}, scale.rounds)
    return [
        Figure(
            ACCELERATOR,
            f"busy share, {count} worker{'s' * (count > 1)}",
            value,
            "",
            BUSY,
            "at least",
            values[f"{count} busy"],
        )
        for count, value in zip(scale.busy_workers, medians(values).values(), strict=True)
    ]
