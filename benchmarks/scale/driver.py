"""CPU time of the driver for each shard, with many workers."""

from __future__ import annotations

import contextlib
import tempfile
import time
from dataclasses import dataclass

from benchmarks.pipeline.figures import Figure
from benchmarks.scale.cluster import Cluster, SimulatedRay, config_of, simulated
from reinforce.config import parse_config
from reinforce.dataset.store import Store
from reinforce.engine.driver.driver import Driver
from reinforce.engine.plan.plan import make_plan
from reinforce.engine.record import ProgressScreen

#: CPU seconds of Ray 2.60 in the driver, measured on the machine of the table: to call a method, to get a result that
#: is there, and for each reference that ``ray.wait`` looks at.
CALL, GET, WAIT = 260e-6, 41e-6, 0.6e-6
SHARDS_PER_SECOND = 100


@dataclass(frozen=True)
class _Mark:
    """The counts at one moment."""

    at: float
    cpu: float  # of the driver's thread, without the simulation
    shards: int
    calls: int
    gets: int
    waits: int


def driver_figures(workers: int, seconds: float) -> list[Figure]:
    """Run the driver for some seconds with workers that finish 100 shards a second; the first third is left out.

    Where the machine is so busy that no shard finishes after it, the driver runs until one does.
    """
    marks: list[_Mark] = []

    def look(ray: SimulatedRay) -> None:
        now = time.monotonic() - ray.started
        finished = not marks or ray.delivered > marks[0].shards
        if now > (seconds / 3, seconds, float("inf"))[len(marks)] and finished:
            calls, pulses = ray.calls, ray.calls["get"] - ray.delivered
            marks.append(
                _Mark(
                    now,
                    time.thread_time() - ray.own_seconds,
                    ray.delivered,
                    calls["lease"] + pulses,
                    calls["get"],
                    calls["waited refs"],
                )
            )
            if len(marks) == 2:
                raise KeyboardInterrupt

    lease = 2 * workers / SHARDS_PER_SECOND  # seconds; in the beginning, leases end at an even rate
    cluster = Cluster(-(-workers // 8), 8, lambda draw: draw.uniform(0.0, lease))
    with tempfile.TemporaryDirectory() as folder:
        config = parse_config(config_of(folder, 100 * int(seconds + 10) + 3 * workers, workers))
        plan = make_plan(config)
        with simulated(cluster, list(plan.layers)) as ray, contextlib.suppress(KeyboardInterrupt):
            ray.on_wait = look
            Driver(plan, Store(config.output), ProgressScreen()).run()
    first, last = marks
    shards = last.shards - first.shards
    own = (last.cpu - first.cpu) / shards * 1000
    of_ray = (last.calls - first.calls) * CALL + (last.gets - first.gets) * GET + (last.waits - first.waits) * WAIT
    section = f"the driver, {workers:,} workers"
    return [
        Figure(section, "shards finished per second", shards / (last.at - first.at), ""),
        Figure(section, "CPU per shard of its own code", own, "ms"),
        Figure(section, "CPU per shard with that of Ray's calls", own + of_ray / shards * 1000, "ms", 1.0, "at most"),
    ]
