"""Progress lines of a run, and the speed of its models."""

from __future__ import annotations

import re
import time
from collections import Counter
from dataclasses import replace

import pytest

from reinforce.dataset.manifest.schema import check_run
from reinforce.engine.record.progress import Progress, Snapshot
from reinforce.engine.record.rates import Stages, add_stages, fuller, rate_lines, with_rates

START = Snapshot(
    shards_done=0, shards=100, samples=0, samples_done=0, busy=0.0, alive=0.0, workers=2,
    quarantined_shards=0, refused_rows=0,
)  # fmt: skip
IMAGES = {"inputs": 100, "seconds": 2.0, "flops": 3e12, "peak_flops": 6e12}
CARD = {"name": "NVIDIA H100 80GB HBM3", "memory_peak": 2**30, "memory_total": 80 * 2**30}


def test_the_line_shows_speed_busy_share_and_remaining_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = Progress()
    assert "ETA" not in progress.line(replace(START, samples=10))
    assert "ETA" not in progress.line(replace(START, samples=10, samples_done=10)), "of a shard to be continued"
    now[0] = 190.0
    progress.show(START)
    now[0] = 200.0
    line = progress.line(
        replace(START, shards_done=10, samples=1_500, samples_done=1_000, busy=16.0, alive=20.0, refused_rows=3)
    )
    assert "10 of 100 shards" in line
    assert "1,500 samples" in line
    assert "150 samples/s" in line
    assert "accelerator busy 80%" in line
    assert "quarantine: 0 shards, 3 rows" in line
    [eta] = re.findall(r"ETA (\S+)", line)
    assert eta == "0:09:27", "10,000 samples are expected, and 1,500 took 100 s: 8,500 take 567 s"


def test_rates_are_those_of_the_sums_also_over_summaries() -> None:
    sums: Stages = {}
    for stages in ({"embeddings/t/images": IMAGES}, {"captions/c": {"inputs": 30, "seconds": 3.0}}):
        add_stages(sums, stages)
    add_stages(sums, with_rates({"embeddings/t/images": Counter(IMAGES)}))
    assert with_rates(sums) == {
        "embeddings/t/images": {**{key: 2 * value for key, value in IMAGES.items()}, "per_second": 50.0, "mfu": 0.5},
        "captions/c": {"inputs": 30, "seconds": 3.0, "per_second": 10.0},
    }
    tokens = with_rates({"captions/c": Counter(inputs=30, seconds=3.0, tokens=240)})
    assert rate_lines({"stages": tokens})[1] == "  captions/c: 30 captions, 10 captions/s, 80 tokens/s"
    assert with_rates({"captions/c": Counter(inputs=0, seconds=0.0)})["captions/c"]["inputs"] == 0


def test_lines_name_units_rates_and_memory_and_there_are_none_of_a_version_without_rates() -> None:
    stages = with_rates({"embeddings/t/images": Counter(IMAGES), "captions/c": Counter(inputs=30, seconds=3.0)})
    summary = {"busy_share": 0.634, "stages": stages, "device": CARD}
    check_run(summary, "summary.json")
    assert rate_lines(summary) == [
        "accelerator busy 63%, NVIDIA H100 80GB HBM3: tensors took at most 1.0 GiB of 80.0 GiB",
        "  embeddings/t/images: 100 images, 50 images/s, MFU 50%",
        "  captions/c: 30 captions, 10 captions/s",
    ]
    assert rate_lines({**summary, "device": {}})[0] == "accelerator busy 63%"
    earlier = {"run": "a", "shards": 3, "busy_share": 0.5}
    check_run(earlier, "summary.json")
    assert rate_lines(earlier) == []


def test_the_fuller_device_is_the_one_with_the_least_free_share() -> None:
    other = {**CARD, "memory_peak": 2**20}
    assert fuller(CARD, other) == fuller(other, CARD) == CARD
    assert fuller({}, other) == other
    assert fuller({}, {}) == {}
