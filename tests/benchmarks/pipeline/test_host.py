"""Figures of the host, from values of rounds."""

from __future__ import annotations

import pytest

from benchmarks.pipeline.host import cpu_figures

VALUES = {
    "alone 2 ms": [6.0, 6.0, 7.0],
    "worker 2 own": [0.5, 0.4, 0.5],
    "worker 2 decode": [6.1, 6.1, 6.0],
    "worker 2 samples/s": [300.0] * 3,
    "worker 2 written": [85.0] * 3,
}


def test_figures_of_the_host_follow_from_medians() -> None:
    figures = {figure.name: figure for figure in cpu_figures(2, 4, VALUES)}
    overhead = figures["all CPU / that of decoding and augmenting alone, 2 augmentations"]
    assert (overhead.value, overhead.limit, overhead.met) == (pytest.approx(1.1), 1.08, False)
    ceiling = figures["host ceiling: 1 / CPU of its own process, 2 augmentations"]
    assert (ceiling.value, ceiling.limit, ceiling.met) == (2000, pytest.approx(1 / 0.0006), True)
    speed = figures["speed on 4 cores, models that take no time, 2 augmentations"]
    assert speed.limit == pytest.approx(4000 / 6)
    assert figures["CPU per sample of its decode processes, 2 augmentations"].limit == 6.0


def test_numbers_of_augmentations_without_a_target_are_measured_without_one() -> None:
    values = {name.replace("2", "3"): each for name, each in VALUES.items()}
    assert {figure.met for figure in cpu_figures(3, 4, values) if "own process" in figure.name} == {None}
