"""The benchmark of the control plane, with small numbers."""

from __future__ import annotations

import json

import pytest

from benchmarks.scale import page
from benchmarks.scale.__main__ import QUICK, main, measure_resume, measure_start, measure_status


def test_a_resumed_run_and_a_training_need_few_requests_for_each_shard() -> None:
    resumed = {figure.name: figure.value for figure in measure_resume(QUICK)}
    assert resumed["listing requests"] == 8 * 3 + 8, "a thousand shards of a layer each, and the quarantine"
    assert resumed["reading requests, 15 of them for quarantined shards"] <= 15 + 2 * 8 + 2, (
        "an index and a file of a layer"
    )
    started = {figure.name: figure.value for figure in measure_start(QUICK)}
    assert started["listing requests"] == 8 * 3
    assert started["reading requests"] <= 16 * 8 * 3 + 2 * 8 + 2, "16 shards are opened in each layer"


def test_the_status_of_a_running_job_takes_three_requests_and_that_of_a_dataset_one_for_a_thousand_files() -> None:
    found = {figure.name: figure.value for figure in measure_status(QUICK)}
    assert found["requests, of a running job"] == 3
    assert found["listing requests"] <= 8 * 3 + 8 + 1
    assert found["reading requests"] <= 2 * 8 + 2


@pytest.mark.parametrize("part", ["local", "driver", "secrets"])
def test_every_part_is_measured(part: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--quick", "--only", part])
    assert "CPU" in capsys.readouterr().out or part == "local"


def test_the_table_of_the_page_is_the_one_that_was_measured() -> None:
    results = json.loads(page.RESULTS.read_text(encoding="utf-8"))
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.render_page(text, results) == text
