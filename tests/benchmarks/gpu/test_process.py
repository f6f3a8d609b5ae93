"""Sections of the benchmark in processes of their own."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from benchmarks.gpu.__main__ import measure_missing
from benchmarks.gpu.bench import TINY, Bench, usage_text
from benchmarks.gpu.page import render_page
from benchmarks.gpu.process import Section
from benchmarks.gpu.results import Results
from benchmarks.pipeline.page import number
from teachers.fast_paths import usage
from tests.helpers import gpu_sections

PAGE = "<!-- gpu: -->\n<!-- end of gpu -->\n"


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path, "cpu", 1, TINY)


def measure(bench: Bench, monkeypatch: pytest.MonkeyPatch, sections: dict[str, Section]) -> Results:
    monkeypatch.setattr("benchmarks.gpu.__main__.SECTIONS", sections)
    results = Results(bench.folder / "gpu.jsonl")
    assert measure_missing(bench, [*sections], results, 60.0) == []
    return Results.read(results.path)


def names(results: Results, section: str) -> list[str]:
    return [figure["name"] for figure in results.sections[section]["figures"]]


def test_failures_are_results_and_other_sections_are_measured(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    ways = (gpu_sections.breaks_the_device, gpu_sections.crashes, gpu_sections.is_killed, gpu_sections.passes)
    sections = {way.__name__: Section(way, 5) for way in ways}
    results = measure(bench, monkeypatch, {"right": Section(gpu_sections.is_wrong, 5, checks=True), **sections})
    failures = {name: entry["failures"] for name, entry in results.sections.items()}
    assert failures["right"] == {"right: rows that differ": "2.000, not at most 0.000"}
    broken = "RuntimeError: CUDA error: device-side assert triggered"
    assert failures["breaks_the_device"] == {"first": broken, "second": f"{broken} (raised again)"}
    assert "signal SIGSEGV in File" in failures["crashes"]["crashes"]
    assert "ctypes" in failures["crashes"]["crashes"], "the innermost frame"
    assert names(results, "crashes") == ["before the crash"]
    assert "signal SIGKILL" in failures["is_killed"]["is_killed"]
    assert failures["passes"] == {}
    [figure] = results.sections["passes"]["figures"]
    assert figure["value"] != os.getpid()

    results.machine = dict.fromkeys(("date", "card", "cuda", "cpu", "cores", "decode processes"), "")
    results.machine |= {"versions": {"torch": ""}, "real weights": []}
    page = render_page(PAGE, results)
    assert page.splitlines()[2].startswith("**`right` FAILED in 1: "), "at the top"
    rate = number(figure["value"], figure["unit"])
    assert f"| id | {rate} (**`right` FAILED in 1**) |" in page, "beside each speed"
    results.sections["card"] = results.sections.pop("passes")
    assert f"| id | {rate} |" in render_page(PAGE, results), "a limit of the card"
    results.sections["shards"] = results.sections.pop("card")
    del results.sections["right"]
    assert f"| id | {rate} (**`right` was not measured**) |" in render_page(PAGE, results)


def test_a_section_that_hangs_is_killed_and_says_where_it_was(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    sections = {"hangs": Section(gpu_sections.hangs, 0.02), "passes": Section(gpu_sections.passes, 5)}
    start = time.monotonic()
    results = measure(bench, monkeypatch, sections)
    assert time.monotonic() - start < 300
    reason = results.sections["hangs"]["failures"]["hangs"]
    assert reason.startswith("no result after 0.04 minutes; killed in File ")
    assert reason.endswith("in hangs")
    assert names(results, "hangs") == ["before the hang"]
    assert not Path(f"/proc/{(bench.folder / 'child').read_text()}").exists()
    assert names(results, "passes") == ["id"]


def test_calls_of_fast_paths_are_kept_with_a_rate_and_plain_ones_of_a_path_that_is_asked_for_fail(bench: Bench) -> None:
    usage.set_enabled(True)
    with usage.loading("dfn2b"):
        asked, _ = usage.fast_path("compile", asked=True), usage.fast_path("held_weights")
        usage.fast_path("fused_attention").fall_back("outputs would change")
    for name, call in {"compiled": asked.used, "eager": asked.plain, "neither": list}.items():
        bench.figure("teachers", name, call, 1, "calls/s")  # and two more calls, which do not count
    loaded = "held_weights, fused_attention fell back"
    assert {name: usage_text(calls) for name, calls in bench.usage.items()} == {
        "compiled": f"{loaded}, compile 1 of 1",
        "eager": f"{loaded}, compile 0 of 1",
        "neither": loaded,
    }
    assert bench.failures == {"eager: compile": "dfn2b ran 1 calls without it"}
    calls = [*bench.usage["compiled"], {**bench.usage["compiled"][0], "model": "other"}]
    assert usage_text(calls) == f"dfn2b: {loaded}, compile 1 of 1; other: held_weights"
    assert usage_text([]) == "plain"
    usage.set_enabled(True)
