"""Inputs and measurements of the benchmark of sources."""

from __future__ import annotations

from pathlib import Path

from benchmarks import sources
from reinforce.config import Input
from reinforce.source.reading import read_samples
from reinforce.source.samples import RawSample


def test_every_format_has_the_same_samples(tmp_path: Path) -> None:
    samples = sources.make_samples(3, 60)
    for file, write in sources.WRITERS.values():
        write(tmp_path / file, samples)
        found = [*read_samples(sources._shard(tmp_path / file), Input())]
        spec = Input()
        assert [
            (item.key, item.image, item.caption(spec.captions, spec.limits)) if isinstance(item, RawSample) else item
            for item in found
        ] == samples


def test_medians_and_ratios_are_those_of_the_rounds() -> None:
    figures = {"tar": {"read": [1.0, 2.0, 9.0], "run": [4.0, 5.0, 5.0]}, "jsonl": {"read": [3.0], "run": [6.0]}}
    found = sources.summarize(figures)
    assert found["tar"] == {"read": 2.0, "run": 5.0, "run / tar": 1.0}
    assert found["jsonl"]["run / tar"] == 1.2
