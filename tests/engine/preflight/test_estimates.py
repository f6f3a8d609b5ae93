"""Estimates of a plan: hours, workers and costs by measured rates, and sizes of what it will write."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from reinforce.config import parse_config
from reinforce.engine.plan.plan import Plan, make_plan
from reinforce.engine.preflight.check_machines import Machine, config_uses, heic_note, machine_warnings
from reinforce.engine.preflight.estimate import (
    DECODE_MS,
    OWN_MS,
    Assumed,
    Effort,
    Rate,
    SourceStatistics,
    bytes_by_codec,
    estimate_effort,
    expected_bytes,
    expected_samples,
    make_report,
    measured_rate,
    plan_table,
)
from reinforce.processes.imports import reads_heic
from tests.helpers.data import config_of, members_of, write_tar
from tests.helpers.pages import measured
from tests.helpers.reinforced import reinforce_here

STATISTICS = SourceStatistics(10_000, 80_000, 100)


@pytest.fixture
def plan(shards: Callable[..., str], tmp_path: Path) -> Plan:
    return make_plan(parse_config(config_of(shards(3, 3), tmp_path / "out")))


def effort(plan: Plan, rate: float | None = 400.0, gpus: float = 1.0, cpus: int = 12, **assumed: Any) -> Effort:
    given = None if rate is None else Rate(rate, "a test")
    return estimate_effort(plan, STATISTICS, 5 * 10**9, given, 8, (gpus, cpus), Assumed(price=2.0, **assumed))


def test_hours_and_cost_follow_from_rate_workers_and_price_and_are_unknown_without_a_rate(plan: Plan) -> None:
    found = effort(plan, hours=0.005)
    assert (found.samples, found.read_bytes) == (20_000, 1_600_000_000)
    assert found.worker_hours == pytest.approx(20_000 / 400 / 3600)
    assert found.hours == pytest.approx(found.worker_hours / 8)
    assert found.cost == pytest.approx(2 * found.worker_hours)
    assert found.wanted_workers == 3
    assert found.storage_cost is None
    text = "\n".join(found.lines(0.005))
    for part in ("20,000 images at 400 a second a worker", "8 workers with 1 GPU and 12 cores each", "0.0 GPU hours",
                 "in 0.005 hours: 3 such workers", "0.03 USD",
                 "400 images a second for the models of a worker (a test)",
                 "ms of CPU an image with 2 augmentations"):  # fmt: skip
        assert part in text, text
    monthly = effort(plan, storage_price=0.02, currency="EUR")
    assert monthly.storage_cost == pytest.approx(0.02 * 5)
    assert "  0.10 EUR a month for what is written" in monthly.lines()
    found = effort(plan, rate=None)
    assert (found.hours, found.cost, found.cores) == (None, None, None)
    assert "hours are not known: give --rate" in found.lines()[0]
    json.dumps(asdict(found))


def test_too_few_cores_for_a_gpu_are_warned_of_and_limit_the_rate(plan: Plan) -> None:
    assert not effort(plan).warnings
    found = effort(plan, cpus=2)
    assert found.cores == pytest.approx(400 * (DECODE_MS[2] + OWN_MS[2]) / 1000)
    assert found.limited == pytest.approx(2000 / (DECODE_MS[2] + OWN_MS[2]))
    [warning] = found.warnings
    assert "takes 2.5 cores a GPU, and a worker has 2: the GPU would wait, at 326 images a second" in warning
    assert not effort(plan, gpus=0.0, cpus=1).warnings, "models on CPUs were measured with their cores"


def test_the_rate_is_that_of_an_earlier_run_of_the_same_layers(plan: Plan) -> None:
    models = [name for name, layer in plan.layers.items() if layer.model is not None]
    stages = {name: {"inputs": 300, "seconds": 2.0, "per_second": 150.0} for name in models}
    summary = {"run": "r1", "samples": 100, "stages": stages, "device": {"name": "H100"}}
    found = measured_rate(plan, summary)
    assert found.value == pytest.approx(100 / (2.0 * len(models)))
    assert found.origin == "as run r1 measured on H100"
    assert measured_rate(plan, {**summary, "stages": {**stages, models[0]: {}}}) is None, "one layer was not measured"
    assert measured_rate(plan, None) is None


def test_a_plan_of_decoding_alone_has_the_rate_of_the_cores(shards: Callable[..., str], tmp_path: Path) -> None:
    config = config_of(shards(3), tmp_path / "out", teachers={}, captioners={})
    plan = make_plan(parse_config(config))
    report = make_report(plan, config_uses(plan.config), STATISTICS, [Machine("m", {"CPU": 4.0}, 2**31, 0.5)])
    assert report.effort.rate is not None
    assert report.effort.workers == 1, "workers.max of the config"
    assert not report.effort.warnings
    reinforce_here(config)
    done = make_plan(parse_config(config))
    assert make_report(done, config_uses(done.config), None, []).effort is None, "nothing is missing"


def test_the_milliseconds_are_those_of_the_performance_page() -> None:
    values = {figure["name"]: figure["value"] for figure in measured("pipeline")["figures"]}
    for table, what in ((DECODE_MS, "its decode processes"), (OWN_MS, "its own process")):
        for count, value in table.items():
            assert value == pytest.approx(values[f"CPU per sample of {what}, {count} augmentations"], rel=0.1)


def test_machines_that_lack_something_are_warned_of(tmp_path: Path) -> None:
    workers = parse_config({"source": "x.tar", "output": "o", "workers": {"min": 4, "gpus": 1, "cpus": 8}}).workers
    good = Machine("node a", {"CPU": 32.0, "GPU": 4.0}, 2**33, 0.5)
    assert machine_warnings([good], workers, str(tmp_path / "out"), 1000) == []
    small = Machine("node b", {"CPU": 4.0, "GPU": 1.0}, 64 * 2**20, 0.97)
    silent = Machine("node c", {"CPU": 32.0, "GPU": 1.0})
    found = machine_warnings([small, silent], workers, str(tmp_path / "out"), 10**18)
    assert len(found) == 5
    for part, text in zip(
        ("node b: /dev/shm has 64.0 MiB", "node b: the disk of Ray's temporary folder is 97% full",
         "node c did not answer",
         "room for 1 worker of 8 CPUs and 1 GPU at a time, and workers.min is 4", "free, and"),
        found, strict=True,
    ):  # fmt: skip
        assert part in text
    others = [replace(good, reads_heic=reads) for reads in (reads_heic(), not reads_heic())]
    assert machine_warnings(others, workers, "memory://out", 0) == [heic_note("node a")]
    assert machine_warnings([good], workers, "memory://out", 10**18) == [], "of an object store nothing is known"


def test_published_layers_need_no_gpu(plan: Plan) -> None:
    published = {name: replace(layer, published=layer.model is not None) for name, layer in plan.layers.items()}
    machines = [Machine("m", {"CPU": 8.0, "GPU": 1.0}, 2**31, 0.5)]
    report = make_report(replace(plan, layers=published), config_uses(plan.config), STATISTICS, machines)
    assert (report.effort.gpus, report.effort.rate is not None) == (0.0, True)


def test_expected_bytes_are_close_to_what_is_written(shards: Callable[..., str], tmp_path: Path) -> None:
    config = config_of(shards(200), tmp_path / "out")
    config["teachers"]["eye"] = {"class": "tests.helpers.models:ImageOnly"}
    expected = expected_bytes(make_plan(parse_config(config)))
    assert expected["embeddings/eye/images"] == pytest.approx(200 * 2 * 5 * 2, rel=0.05)
    assert expected["embeddings/red/images"] is None, "its dimension is known once it is loaded"
    images = sum(len(data) for name, data in members_of(0, 200) if name.endswith(".png"))
    samples = expected["samples"]
    assert images < samples < 1.3 * images


def test_the_samples_of_a_run_are_expected_before_it_without_reading_the_source_whole(
    shards: Callable[..., str], tmp_path: Path
) -> None:
    assert expected_samples(make_plan(parse_config(config_of(shards(200), tmp_path / "out")))) == 200
    for number in range(12):
        (tmp_path / "photos").mkdir(exist_ok=True)
        (tmp_path / "photos" / f"{number}.png").write_bytes(members_of(0, 1)[0][1])
    photos = config_of(f"{tmp_path}/photos", tmp_path / "out", input={"captions": []})
    assert expected_samples(make_plan(parse_config(photos))) == 12
    (tmp_path / "list.csv").write_text("file_name,text\n" + "photos/1.png,a text\n" * 5)
    table = config_of(f"{tmp_path}/list.csv", tmp_path / "out")
    assert expected_samples(make_plan(parse_config(table))) is None, "counting its rows would read it whole"
    assert expected_samples(make_plan(parse_config({**table, "input": {"rows_per_shard": 2}}))) == 5
    assert expected_samples(make_plan(parse_config(config_of(f"{tmp_path}/{{0..3}}.tar", tmp_path / "out")))) is None


def test_a_layer_with_committed_files_is_extrapolated_from_them_and_recorded_dimensions_are_used(
    shards: Callable[..., str], tmp_path: Path
) -> None:
    config = config_of(shards(200), tmp_path / "out", captioners={})
    reinforce_here(config)
    namer = {"namer": {"class": "tests.helpers.models:SeedCaptioner", "captions": 2}}
    later = expected_bytes(make_plan(parse_config({**config, "captioners": namer})))
    assert later["embeddings/red/namer"] == pytest.approx(200 * 2 * 8 * 2, rel=0.05)
    assert later["embeddings/blue/namer"] == pytest.approx(200 * 2 * 12 * 2, rel=0.05)
    sizes = bytes_by_codec(make_plan(parse_config({**config, "captioners": namer})), STATISTICS)["red"]
    rows = STATISTICS.rows * 2
    assert sizes == {
        "float16": rows * 16, "float32": rows * 32, "int8": rows * 12, "first4": rows * 8, "pca2": rows * 2,
        "pq1": rows, "rq1": rows,
    }  # fmt: skip
    committed = sum(path.stat().st_size for path in (tmp_path / "out" / "embeddings/red/images").glob("*.parquet"))
    for shard in (1, 2, 3):
        write_tar(tmp_path / "source" / f"{shard:05d}.tar", members_of(shard, 200))
    plan = make_plan(parse_config(config))
    assert expected_bytes(plan)["embeddings/red/images"] == 3 * committed
    assert plan.states["embeddings/red/images"].done == 1


def test_sizes_are_unknown_where_the_source_cannot_be_read(tmp_path: Path) -> None:
    config = config_of(f"{tmp_path}/source/{{0..3}}.tar", tmp_path / "out")
    plan = make_plan(parse_config(config))
    expected = expected_bytes(plan)
    assert set(expected.values()) == {None}
    out = io.StringIO()
    Console(file=out, width=100).print(plan_table(plan, expected))
    rows = [line.split() for line in out.getvalue().splitlines()]
    assert rows[0] == ["layer", "done", "missing", "quarantined", "expected"]
    assert rows[1] == ["samples", "0", "4", "0", "?"]
