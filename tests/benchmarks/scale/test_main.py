"""The benchmark of the control plane, small, and the driver on a simulated cluster."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import s3fs

from benchmarks.pipeline.page import PAGE
from benchmarks.scale import child, page
from benchmarks.scale.__main__ import QUICK, main, measure_resume, measure_start, measure_status
from benchmarks.scale.cluster import Cluster, SimulatedRay, config_of, simulated
from reinforce.config import parse_config
from reinforce.dataset.store import Store
from reinforce.engine.driver import driver
from reinforce.engine.driver.worker_pool import ShardQueue, Slot
from reinforce.engine.plan.plan import make_plan
from reinforce.engine.record import ProgressScreen, RunSummary


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures in this process: the imports of another take a second or two."""

    def run_child(arguments: Sequence[str], variables: Mapping[str, str]) -> Any:
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
            for name, value in variables.items():
                patch.setenv(name, value)
            s3fs.S3FileSystem.clear_instance_cache()  # of the store before
            child.main(*arguments)
        return json.loads(printed.getvalue())

    monkeypatch.setattr("benchmarks.scale.__main__.run_child", run_child)


@pytest.mark.usefixtures("here")
def test_a_resumed_run_and_a_training_need_few_requests_for_each_shard() -> None:
    resumed = {figure.name: figure.value for figure in measure_resume(QUICK)}
    assert resumed["listing requests"] == 8 * 3 + 8, "a thousand shards of a layer each, and the quarantine"
    # An index and a file of a layer, and dataset.json.
    assert resumed["reading requests, 15 of them for quarantined shards"] <= 15 + 2 * 8 + 2
    started = {figure.name: figure.value for figure in measure_start(QUICK)}
    assert started["listing requests"] == 8 * 3
    assert started["reading requests"] <= 16 * 8 * 3 + 2 * 8 + 2, "16 shards are opened in each layer"


@pytest.mark.usefixtures("here")
def test_the_status_of_a_running_job_takes_three_requests_and_that_of_a_dataset_one_for_a_thousand_files() -> None:
    found = {figure.name: figure.value for figure in measure_status(QUICK)}
    assert found["requests, of a running job"] == 3
    assert found["listing requests"] <= 8 * 3 + 8 + 1 + 2, "two for the views"
    assert found["reading requests"] <= 2 * 8 + 2


@pytest.mark.parametrize("part", [pytest.param("local", marks=pytest.mark.slow), "driver", "secrets"])
def test_every_part_is_measured(part: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--quick", "--only", part])
    assert "CPU" in capsys.readouterr().out or part == "local"


def test_the_table_of_the_page_is_the_one_that_was_measured() -> None:
    results = json.loads(page.RESULTS.read_text(encoding="utf-8"))
    text = PAGE.read_text(encoding="utf-8")
    assert page.render_page(text, results) == text


def run(folder: Path, shards: int, cluster: Cluster) -> tuple[RunSummary, SimulatedRay]:
    config = parse_config(config_of(str(folder), shards, cluster.nodes * cluster.workers_per_node))
    plan = make_plan(config)
    with simulated(cluster, list(plan.layers)) as ray:
        return driver.Driver(plan, Store(config.output), ProgressScreen()).run(), ray


def test_a_run_survives_lost_nodes_and_deaths_of_workers(tmp_path: Path) -> None:
    losses, deaths = [(0.1, 0), (0.2, 3)], [0.05, 0.15, 0.3]
    cluster = Cluster(6, 8, lambda draw: draw.uniform(0.01, 0.05), losses=losses, deaths=deaths)
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
    run(tmp_path, 500, Cluster(10, 8, lambda draw: draw.uniform(0.05, 0.5)))
    assert sum(looked_at[: len(looked_at) // 2]) < 3 * 500


def test_ray_is_asked_less_often_the_more_leases_there_are(tmp_path: Path) -> None:
    _, ray = run(tmp_path, 1000, Cluster(25, 8, lambda draw: draw.uniform(0.1, 0.3)))
    assert ray.calls["waited refs"] / ray.calls["lease"] < 20
