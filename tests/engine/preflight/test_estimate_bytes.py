"""Estimated sizes of what a plan will write."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from reinforce.config import parse_config
from reinforce.engine.plan.plan import make_plan
from reinforce.engine.preflight.estimate_bytes import expected_bytes, plan_table
from tests.helpers.data import config_of, members_of, write_tar
from tests.helpers.reinforced import reinforce_here


def test_expected_bytes_are_close_to_what_is_written(shards: Callable[..., str], tmp_path: Path) -> None:
    config = config_of(shards(200), tmp_path / "out")
    config["teachers"]["eye"] = {"class": "tests.helpers.models:ImageOnly"}
    expected = expected_bytes(make_plan(parse_config(config)))
    assert expected["embeddings/eye/images"] == pytest.approx(200 * 2 * 5 * 2, rel=0.05)
    assert expected["embeddings/red/images"] is None, "its dimension is known once it is loaded"
    images = sum(len(data) for name, data in members_of(0, 200) if name.endswith(".png"))
    samples = expected["samples"]
    assert samples is not None
    assert images < samples < 1.3 * images


def test_a_layer_with_committed_files_is_extrapolated_from_them(shards: Callable[..., str], tmp_path: Path) -> None:
    config = config_of(shards(20), tmp_path / "out", captioners={})
    reinforce_here(config)
    committed = sum(path.stat().st_size for path in (tmp_path / "out" / "embeddings/red/images").glob("*.parquet"))
    for shard in (1, 2, 3):
        write_tar(tmp_path / "source" / f"{shard:05d}.tar", members_of(shard, 20))
    plan = make_plan(parse_config(config))
    assert expected_bytes(plan)["embeddings/red/images"] == 3 * committed
    assert plan.states["embeddings/red/images"].done == 1


def test_dimensions_that_an_earlier_run_recorded_are_used(shards: Callable[..., str], tmp_path: Path) -> None:
    config = config_of(shards(200), tmp_path / "out", captioners={})
    reinforce_here(config)
    config["captioners"] = {"namer": {"class": "tests.helpers.models:SeedCaptioner", "captions": 2}}
    expected = expected_bytes(make_plan(parse_config(config)))
    assert expected["embeddings/red/namer"] == pytest.approx(200 * 2 * 8 * 2, rel=0.05)
    assert expected["embeddings/blue/namer"] == pytest.approx(200 * 2 * 12 * 2, rel=0.05)


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
