"""What the benchmark of a GPU checks: processes of sections, the machine, and results that differ by little."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import machine, recipe
from benchmarks.gpu.__main__ import measure_missing
from benchmarks.gpu.bench import TINY, Bench, usage_text
from benchmarks.gpu.machine import Check, check_machine
from benchmarks.gpu.page import render_page
from benchmarks.gpu.process import Section
from benchmarks.gpu.results import Results
from benchmarks.gpu.sections import right
from benchmarks.pipeline.figures import Figure
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

    def compiled() -> None:
        asked.used += 1

    def eager() -> None:
        asked.plain += 1

    for name, call in {"compiled": compiled, "eager": eager, "neither": list}.items():
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


NO_HEADERS = "cat >/dev/null; echo 'fatal error: Python.h: No such file' >&2; exit 1"
DEV = f"python3.{sys.version_info[1]}-dev"


def card(driver: str = "580.65.06", used: int = 4) -> dict[str, str]:
    return {"nvidia-smi": f"echo 'NVIDIA H100 80GB HBM3, {driver}, 81559, {used}'"}


def found(folder: Path, *parts: str) -> dict[str, Check]:
    return {check.name: check for check in check_machine(folder, parts)}


@pytest.mark.parametrize(
    ("programs", "cuda", "name", "what", "fix"),
    [
        ({}, "None", "card", "nvidia-smi shows none", "containers with --gpus all"),
        (card(), "'13.0'", "card", "NVIDIA H100 80GB HBM3, 81559 MiB", ""),
        (card(used=40000), "'13.0'", "memory of the card in use", "40000 MiB", "another process"),
        (card(), "None", "torch", "torch 2.13.0 has no CUDA", "pip install --force-reinstall torch"),
        (card("570.86.15"), "'13.0'", "driver", "for CUDA 13.0 of torch 2.13.0", "it needs driver 580 or newer"),
        (card("580.65.06"), "'13.0'", "driver", "for CUDA 13.0 of torch 2.13.0", ""),
        (card("535.183.01"), "'12.6'", "driver", "for CUDA 12.6 of torch 2.13.0", ""),
        (card("[N/A]"), "'12.6'", "driver", "for CUDA 12.6 of torch 2.13.0", "it needs driver 525 or newer"),
        ({}, "None", "C compiler", "none", "apt-get install -y gcc libc6-dev"),
        ({"gcc": NO_HEADERS}, "None", "Python headers", "Python.h: No such file", DEV),
    ],
)
def test_what_a_machine_lacks_is_named_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, programs: dict[str, str], cuda: str, name: str, what: str, fix: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    for program, script in programs.items():
        (tmp_path / program).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / program).chmod(0o755)
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").touch()
    version = f"__version__ = '2.13.0'\ndebug = False\ncuda: Optional[str] = {cuda}\n"
    (tmp_path / "torch/version.py").write_text(version)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    check = found(tmp_path, "card", "compiler")[name]
    assert what in check.found
    assert (fix in check.fix, bool(check.fix)) == (True, bool(fix))
    assert str(check).startswith("ok" if not fix else "MISSING" if check.needed else "little")


def test_little_disk_and_shared_memory_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "DISK", 1e9)
    monkeypatch.setattr(machine, "SHARED", 1e9)
    checks = found(tmp_path / "of" / "later", "disk", "memory")
    assert "1000000000 GB are needed" in checks[f"disk with {tmp_path}"].fix
    assert "--shm-size=8g" in checks["shared memory"].fix


def scale(block: torch.nn.Module) -> None:
    for parameter in block.parameters():
        parameter.data.mul_(1.01)


@pytest.fixture
def comparing(tmp_path: Path) -> Bench:
    return Bench(tmp_path, "cpu", 1, replace(TINY, compared=16))


def inject(monkeypatch: pytest.MonkeyPatch, path: str, fault: Callable[[Any], None]) -> None:
    """Change the models that the project loads; those of the reference stay."""
    load = right.load_model

    def load_with_fault(spec: Any) -> Any:
        model = load(spec)
        fault(model)
        return model

    monkeypatch.setattr(path, load_with_fault)


def unmet(figures: list[Figure]) -> list[str]:
    return [figure.name.partition(":")[0] for figure in figures if figure.met is False]


@pytest.mark.parametrize(
    ("side", "block"),
    [
        ("images", "visual.layer1.0"),
        ("images", "visual.layer4.0"),
        ("texts", "transformer.resblocks.0"),
        ("texts", "transformer.resblocks.1"),
    ],
)
def test_one_block_of_a_teacher_off_by_one_percent_fails_in_each_precision(
    comparing: Bench, monkeypatch: pytest.MonkeyPatch, side: str, block: str
) -> None:
    [(name, spec)] = recipe.demo().teachers.items()

    def embed() -> torch.Tensor:
        """What an earlier version compared, with a limit of 0.999: random images, and the same texts."""
        teacher = right.registry.load_model(name, spec, "cpu")
        if side == "texts":
            return teacher.encode_texts(right.texts_of(16))
        return teacher.encode_images(right.pixels_of(teacher.image, 16))

    expected = embed()
    assert unmet(right._compare_embeddings(comparing, name, spec)) == []
    inject(monkeypatch, "teachers.open_clip.teacher.load_model", lambda model: scale(model.get_submodule(block)))
    wrong = unmet(right._compare_embeddings(comparing, name, spec))
    assert wrong == [f"{name}, {switch}, {side}" for switch in (right.RUNS, "compiled", right.PLAIN, right.EXACT)]
    cosines = embed() @ expected.T
    assert cosines.diagonal().min() > 0.999
    assert torch.equal(cosines.argmax(1), torch.arange(16))


def test_two_rows_that_are_swapped_fail(comparing: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    [(name, spec)] = recipe.demo().teachers.items()
    encode = "teachers.open_clip.teacher.OpenClipEncoder.encode_texts"
    plain = right.registry.load_model(name, spec, "cpu").encode_texts
    monkeypatch.setattr(encode, lambda self, texts: plain([texts[1], texts[0], *texts[2:]]))
    assert f"{name}, {right.RUNS}, texts" in unmet(right._compare_embeddings(comparing, name, spec))


@pytest.mark.parametrize("block", ["visual.transformer.resblocks.0", "text_decoder.resblocks.0"])
def test_captioner_blocks_off_by_one_percent_fail(
    comparing: Bench, monkeypatch: pytest.MonkeyPatch, block: str
) -> None:
    [(name, spec)] = recipe.demo().captioners.items()
    assert unmet(right._compare_logits(comparing, name, spec)) == []
    inject(monkeypatch, "teachers.coca.captioner.load_model", lambda model: scale(model.get_submodule(block)))
    wrong = [f"{name}, {switch}, logits" for switch in (right.RUNS, right.PLAIN, right.EXACT)]
    assert unmet(right._compare_logits(comparing, name, spec)) == wrong
