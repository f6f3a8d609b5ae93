"""The benchmarks of steps and captions on tiny models, and stored results and their pages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import captions, step, transfer, view_students


def test_stored_targets_add_operations_to_a_plain_step(tmp_path: Path) -> None:
    result = step.Bench(tmp_path, "cpu").measure(step.Case("tiny", batch=4, rounds=1, online=0))
    assert set(result["ratio"]) == {"plain", "stored"}
    assert result["ratio"]["plain"] == result["limit"]["plain"] == 1
    assert result["operations"]["stored"] > result["operations"]["plain"]
    assert result[f"limit of stored at {step.LARGE}"] > result["limit"]["stored"] > 1


def test_forward_passes_of_a_module_are_added_and_operations_counted() -> None:
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
    x, weight = torch.rand(3, 8), torch.rand(5, 8)
    assert captions.operations(lambda: x @ weight.T) == 2 * 3 * 8 * 5


def test_stored_results_of_steps_and_captions_are_shown() -> None:
    stored = json.loads(step.RESULTS.read_text())
    lines = step.table(stored["students"]).splitlines()
    assert lines[0].split() == ["student", "batch", "step", "seconds", "x", "plain", "limit"]
    assert len(lines) == 1 + sum(len(result["ratio"]) + 1 for result in stored["students"].values())
    assert max(result["ratio"]["stored"] for result in stored["students"].values()) <= stored["bound"]
    for name, result in json.loads(captions.RESULTS.read_text())["models"].items():
        lines = captions.report(name, result).splitlines()
        assert [line.split()[:2] for line in lines[::2]] == [[name, case] for case in captions.TARGETS]
        assert all(result[f"speedup_{case}_length"] >= target for case, target in captions.TARGETS.items())


def test_the_page_of_transfer_has_the_stored_numbers_and_the_mean_range_and_seeds_of_others() -> None:
    names = (*transfer.MEASURES, transfer.SECONDS)
    rows = {"plain": [dict.fromkeys(names, 0.25), dict.fromkeys(names, 0.75)]}
    measure = transfer.summarise(rows)["plain"]["own_style"]
    assert measure == {"mean": pytest.approx(0.5), "min": 0.25, "max": 0.75, "seeds": [0.25, 0.75]}
    assert transfer.PAGE.read_text() == transfer.render_page(json.loads(transfer.RESULTS.read_text()))


def test_the_page_has_the_stored_results_of_students_on_views() -> None:
    stored = json.loads(view_students.RESULTS.read_text())
    page = view_students.PAGE.read_text(encoding="utf-8")
    assert view_students.render_page(page, stored) == page, "run `python -m benchmarks.view_students`"
    whole, right = ({"mean": mean, "min": mean, "max": mean} for mean in (0.1, 0.3))
    students = {"whole": {"a": whole}, "view": {"a": {"mean": 0.25}}, "right": {"a": right}}
    assert view_students.recovered(students, "a") == "75%"
    students["right"]["a"]["min"] = 0.1
    assert view_students.recovered(students, "a") == "-", "no loss in each seed"
