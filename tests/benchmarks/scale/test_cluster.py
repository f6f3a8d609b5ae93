"""The driver on a simulated cluster: every shard is finished, and nothing looks at all workers for each shard."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.scale.cluster import Cluster, SimulatedRay, config_of, simulated
from reinforce.config import parse_config
from reinforce.dataset.files.store import Store
from reinforce.engine.driver import driver
from reinforce.engine.driver.pool import Slot
from reinforce.engine.driver.shard_queue import ShardQueue
from reinforce.engine.plan.plan import make_plan
from reinforce.engine.record.progress import Progress
from reinforce.engine.record.summary import RunSummary


def run(folder: Path, shards: int, cluster: Cluster) -> tuple[RunSummary, SimulatedRay]:
    config = parse_config(config_of(str(folder), shards, cluster.nodes * cluster.workers_per_node))
    plan = make_plan(config)
    with simulated(cluster, list(plan.layers)) as ray:
        return driver.Driver(plan, Store(config.output), Progress()).run(), ray


def test_a_run_survives_lost_nodes_and_deaths_of_workers(tmp_path: Path) -> None:
    cluster = Cluster(
        6, 8, lambda draw: draw.uniform(0.01, 0.05), losses=[(0.1, 0), (0.2, 3)], deaths=[0.05, 0.15, 0.3]
    )
    summary, _ = run(tmp_path, 600, cluster)
    assert (summary.status, summary.message, summary.quarantined_shards) == (0, "done", 0)
    assert (summary.shards, summary.samples) == (600, 600 * 10_000)


def test_only_workers_that_can_take_a_lease_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at = []
    hand_out = ShardQueue.hand_out

    def counting(self: ShardQueue, slots: Sequence[Slot], *rest: Any) -> None:
        looked_at.append(len(slots))
        hand_out(self, slots, *rest)

    monkeypatch.setattr(ShardQueue, "hand_out", counting)
    monkeypatch.setattr(driver, "_PAUSE_SECONDS_PER_REF", 0.0)
    run(tmp_path, 500, Cluster(10, 8, lambda draw: draw.uniform(0.01, 0.1)))
    assert sum(looked_at[: len(looked_at) // 2]) < 3 * 500


def test_ray_is_asked_less_often_the_more_leases_there_are(tmp_path: Path) -> None:
    _, ray = run(tmp_path, 1000, Cluster(25, 8, lambda draw: draw.uniform(0.1, 0.3)))
    assert ray.calls["waited refs"] / ray.calls["lease"] < 20
