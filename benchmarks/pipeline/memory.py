"""Peak memory of a worker with its decode processes, by the size of the shards.

A page that several processes share counts once (PSS). The models of a run come on top.
"""

from __future__ import annotations

import math
import shutil
import statistics

from benchmarks import processes
from benchmarks.pipeline.figures import Bench, Figure
from benchmarks.pipeline.inputs import SIZE, make_config, write_shards
from benchmarks.pipeline.workers import Job, WorkerSetup, start_workers
from reinforce.engine.worker.actor import SHARDS_IN_FLIGHT
from reinforce.engine.worker.inference import cells_per_shard

MEMORY = "memory"
GROWTH = 1.05


def measure_memory(bench: Bench) -> list[Figure]:
    """Peak memory with small and with large shards of equally many bytes in all.

    The more row groups a worker writes, the more likely its two shards have one in memory at the same moment.
    """
    small, large = bench.scale.memory_megabytes
    first = _peak(bench, small, SHARDS_IN_FLIGHT * max(1, round(large / small)))
    second = _peak(bench, large, SHARDS_IN_FLIGHT)
    name = "peak of a worker with {} decode processes, shards of {} MB"
    cells = pixel_cell_bytes(2, bench.cores) / 1e6
    return [
        Figure(MEMORY, name.format(bench.cores, small), first.total / 1e6, "MB"),
        Figure(
            MEMORY, name.format(bench.cores, large), second.total / 1e6, "MB", GROWTH * first.total / 1e6, "at most"
        ),
        Figure(MEMORY, "of it its pixel cells", second.shared / 1e6, "MB", cells, "limit"),
        Figure(MEMORY, "of it its own process", second.parent / 1e6, "MB"),
        Figure(MEMORY, "of it each decode process", second.child / 1e6, "MB"),
    ]


def _peak(bench: Bench, megabytes: int, shards: int) -> processes.Peak:
    """Peak memory while a new worker processes shards of a size."""
    images = math.ceil(megabytes * 1e6 / statistics.fmean(map(len, bench.photos)))
    folder = bench.folder / f"memory-{megabytes}"
    source = write_shards(folder, shards, images, bench.photos)
    with (
        bench.output() as output,
        start_workers(WorkerSetup(2, bench.cores, bench.device)) as workers,
        processes.watch_memory(workers.all[0].pid) as peak,
    ):
        workers.run([Job(source, output)])
    shutil.rmtree(folder)
    return peak


def pixel_cell_bytes(augmentations: int, cores: int) -> int:
    """Bytes of the pixel cells of a worker with one size of crops and the default batch."""
    config = make_config("none.tar", "none", augmentations, cores)
    return SHARDS_IN_FLIGHT * cells_per_shard(config) * augmentations * SIZE * SIZE * 3
