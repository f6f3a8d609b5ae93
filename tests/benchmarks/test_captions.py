"""The caption benchmark's counters, and its stored results."""

from __future__ import annotations

import json

import torch

from benchmarks import captions


def test_operations_count_matrix_products() -> None:
    x, weight = torch.rand(3, 8), torch.rand(5, 8)
    assert captions.operations(lambda: x @ weight.T) == 2 * 3 * 8 * 5


def test_timer_adds_the_forward_passes_of_a_module() -> None:
    timer, module = captions.PartTimer(), torch.nn.Linear(4, 4)
    hooks = timer.watch(module, "linear")
    module(torch.rand(2, 4))
    once = timer.seconds["linear"]
    module(torch.rand(2, 4))
    assert timer.seconds["linear"] > once > 0
    for hook in hooks:
        hook.remove()
    twice = timer.seconds["linear"]
    module(torch.rand(2, 4))
    assert timer.seconds["linear"] == twice


def test_stored_results_are_reported_for_each_case() -> None:
    stored = json.loads(captions.RESULTS.read_text())
    for name, result in stored["models"].items():
        lines = captions.report(name, result).splitlines()
        assert [line.split()[:2] for line in lines[::2]] == [[name, case] for case in captions.TARGETS]
        for case, target in captions.TARGETS.items():
            assert result[f"speedup_{case}_length"] >= target
