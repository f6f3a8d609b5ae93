"""Speed of the models of a run."""

from __future__ import annotations

from collections import Counter

from reinforce.dataset.manifest.schema import check_run
from reinforce.engine.record.rates import Stages, add_stages, fuller, rate_lines, with_rates

IMAGES = {"inputs": 100, "seconds": 2.0, "flops": 3e12, "peak_flops": 6e12}
CARD = {"name": "NVIDIA H100 80GB HBM3", "memory_peak": 2**30, "memory_total": 80 * 2**30}


def test_rates_are_those_of_the_sums_also_over_summaries() -> None:
    sums: Stages = {}
    for stages in ({"embeddings/t/images": IMAGES}, {"captions/c": {"inputs": 30, "seconds": 3.0}}):
        add_stages(sums, stages)
    add_stages(sums, with_rates({"embeddings/t/images": Counter(IMAGES)}))
    rates = with_rates(sums)
    assert rates["embeddings/t/images"] == {
        **{key: 2 * value for key, value in IMAGES.items()},
        "per_second": 50.0,
        "mfu": 0.5,
    }
    tokens = with_rates({"captions/c": Counter(inputs=30, seconds=3.0, tokens=240)})
    assert tokens["captions/c"]["tokens_per_second"] == 80.0
    assert rate_lines({"stages": tokens})[1] == "  captions/c: 30 captions, 10 captions/s, 80 tokens/s"
    assert rates["captions/c"] == {"inputs": 30, "seconds": 3.0, "per_second": 10.0}
    assert with_rates({"captions/c": Counter(inputs=0, seconds=0.0)})["captions/c"]["inputs"] == 0


def test_lines_name_units_rates_and_memory() -> None:
    stages = with_rates({"embeddings/t/images": Counter(IMAGES), "captions/c": Counter(inputs=30, seconds=3.0)})
    summary = {"busy_share": 0.634, "stages": stages, "device": CARD}
    check_run(summary, "summary.json")
    assert rate_lines(summary) == [
        "accelerator busy 63%, NVIDIA H100 80GB HBM3: tensors took at most 1.0 GiB of 80.0 GiB",
        "  embeddings/t/images: 100 images, 50 images/s, MFU 50%",
        "  captions/c: 30 captions, 10 captions/s",
    ]
    assert rate_lines({**summary, "device": {}})[0] == "accelerator busy 63%"


def test_a_summary_of_a_version_without_rates_has_no_lines() -> None:
    summary = {"run": "a", "shards": 3, "busy_share": 0.5}
    check_run(summary, "summary.json")
    assert rate_lines(summary) == []


def test_the_fuller_device_is_the_one_with_the_least_free_share() -> None:
    other = {**CARD, "memory_peak": 2**20}
    assert fuller(CARD, other) == fuller(other, CARD) == CARD
    assert fuller({}, other) == other
    assert fuller({}, {}) == {}
