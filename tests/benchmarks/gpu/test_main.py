"""The benchmark of a GPU, on a CPU with tiny models."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.gpu import models, page
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.bench import Bench, Size
from benchmarks.gpu.probe import ABSENT, probing
from benchmarks.gpu.process import Entry, Section, measure
from benchmarks.gpu.results import Results
from benchmarks.gpu.sections import SECTIONS
from benchmarks.gpu.sections import shards as gpu_shards
from benchmarks.gpu.trace import Trace, limit_of
from benchmarks.pipeline.figures import Figure
from benchmarks.pipeline.page import read_figures
from tests.helpers.worker_in_process import worker_in_process

DEVICE = "benchmarks.gpu.probe._card_id"


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Measures in this process, with the decode processes of the other tests."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("reinforce.training.log.draw_curves", lambda *_: None)  # a second each
    monkeypatch.setattr("teachers.runtime.determinism.set_flags", lambda *_, **__: None)  # flags of the other tests
    monkeypatch.setattr(gpu_shards.Shards, "__exit__", lambda *_: None)  # closes the pool
    monkeypatch.setattr("benchmarks.gpu.__main__.run_section", measure_here)
    with worker_in_process():
        yield


def measure_here(bench: Bench, name: str, section: Section) -> Entry:
    fresh = replace(bench, failures={}, traces={}, usage={}, figures=[])
    return {**measure(fresh, name, section), "seconds": 0.0, "card": ABSENT}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and shards of all tests."""
    return tmp_path_factory.mktemp("folder")


def run(tmp_path: Path, folder: Path, *words: str) -> Results:
    """The stored results of a tiny run."""
    results = tmp_path / "gpu.jsonl"
    main(["--tiny", "--cores", "1", "--folder", str(folder), "--results", str(results), *words])
    return Results.read(results)


@pytest.mark.usefixtures("here")
def test_a_tiny_run_measures_every_section(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = run(tmp_path, folder)
    output = capsys.readouterr().out
    assert results.sections.keys() == SECTIONS.keys() - {"ranks"}
    figures = {figure.name: figure for entry in results.sections.values() for figure in read_figures(entry)}
    for name in (
        "products of bf16 matrices of 64 x 64",
        "dfn2b, as in runs, images: error, as a share of the spread",
        "decoding to Parquet, 2 augmentations, 1 decode processes",
        "a source image: teachers",
        "coca-coco, 2 batches of 4 images with 2 captions",
        "kernels a word of a batch",
        "images/s of `reinforce run`, after its first shards",
        "tiny, eager, with its loader",
        "dfn2b-s39b, texts of 77 tokens",
        "device-1, 0 loader processes",
        "64 pairs, a rank of 8, lambda 1.0, TF32",
    ):
        assert figures[name].value > 0, name
        assert name in output
    differing = [name for name in figures if " differ " in name]
    assert len(differing) == 11
    assert [name for name in differing if figures[name].value] == []
    errors = [figure for name, figure in figures.items() if "error, as a share" in name]
    assert len(errors) == 30
    assert all(figure.met for figure in errors)
    assert figures["shards that finish in halved batches when memory is short"].met
    products = 2 * (64 // 8) * 64 * 4 * (2 * 768 + (1 + 2 * 2) * 512)  # of two sides and two kinds of text
    assert figures["64 pairs, a rank of 8, lambda 0.7, TF32: products"].value == pytest.approx(products / 1e12)
    assert figures["gradients of features in TF32, from those in fp32"].value == 0, "a CPU has no TF32"
    traced = {name for entry in results.sections.values() for name in entry["traces"]}
    of_run = {name for name, figure in figures.items() if figure.section == gpu_shards.RUN}
    assert {name for name, figure in figures.items() if figure.unit.endswith("/s")} <= traced | of_run
    assert results.sections["card"]["card"] == ABSENT
    assert results.sections["teachers"]["traces"]["dfn2b, images"]["kernels"] > 10
    assert (folder / "traces" / "dfn2b, images.json.gz").exists()
    text = page.render_page(page.PAGE.read_text(encoding="utf-8"), results)
    assert "| milliseconds of a source image | measured | estimated for an H100 |" in text
    assert "| teachers | " in text
    assert "there is no nvidia-smi" in text


@pytest.mark.usefixtures("here")
def test_sections_are_stored_when_they_end_and_a_second_call_continues(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def captions(bench: Bench) -> list[Figure]:
        calls.append("captions")
        first = Figure("captions", "first", 2.0, "captions/s")
        return [first, *bench.attempt("captions: second", lambda: [Figure("captions", "second", 1 / 0, "")])]

    def shards(_: Bench) -> list[Figure]:
        calls.append("shards")
        assert "first" in (tmp_path / "gpu.jsonl").read_text()
        return [Figure("shards", "third", 3.0, "images/s", 4.0, "at least")]  # a target of speed, which is no check

    sections = {"captions": Section(captions, 1), "shards": Section(shards, 1)}
    monkeypatch.setattr("benchmarks.gpu.__main__.SECTIONS", sections)
    for expected in (["captions", "shards"], ["captions"]):
        calls.clear()
        with pytest.raises(SystemExit) as ended:
            run(tmp_path, folder)
        assert calls == expected, "what has failed is measured again"
        assert ended.value.code == 1
    output = capsys.readouterr().out
    assert "captions: second FAILED: ZeroDivisionError: division by zero" in output
    assert "1 FAILED: captions: second" in output
    with (tmp_path / "gpu.jsonl").open("a") as file:
        file.write('{"section": "shards", "fig')  # of a call that was killed
    sections["captions"] = Section(lambda _: [Figure("captions", "first", 2.0, "captions/s")], 1)
    assert read_figures(run(tmp_path, folder).sections["captions"])[0].name == "first"
    first, *_ = (tmp_path / "gpu.jsonl").read_text().splitlines()
    (tmp_path / "gpu.jsonl").write_text(json.dumps({**json.loads(first), "card": "another"}) + "\n")
    with pytest.raises(SystemExit):
        run(tmp_path, folder)
    assert "was measured with another card" in capsys.readouterr().err


def test_what_this_machine_cannot_measure_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    for words, advice in (
        ("", "no CUDA device"),
        ("--device cpu", "add --tiny"),
        ("--tiny --weights nowhere", "nowhere is not a folder"),
        ("--tiny --weights tests", "tests has no folder of a model that is measured: ViT-L-14-quickgelu, "),
    ):
        with pytest.raises(SystemExit) as ended:
            main(words.split())
        (line,) = capsys.readouterr().err.splitlines()
        assert advice in line
        assert ended.value.code == 2


def test_readings_of_the_card_are_those_of_the_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    lines = "1980, 2619, 650.5, 700, 60, 9000, 99\\n1200, 2619, 690.0, 700, 70, 9100, [N/A]\\n"
    program.write_text(f"#!/bin/sh\nprintf '{lines}'\ntouch {tmp_path}/printed\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(DEVICE, lambda _: "GPU-1")
    with probing("cuda") as readings:
        while not (tmp_path / "printed").exists():
            pass
    assert readings["clock MHz"] == [1590, 1200, 1980]
    assert readings["utilization %"] == [99, 99, 99]
    assert readings["at power limit"] == 0.5


@pytest.mark.parametrize(
    ("kernels", "limit"),
    [
        ([("sm90_gemm", 0, 10), ("gelu", 90, 100)], "host: the device computed 20% of the time (0 waits)"),
        ([("sm90_gemm", 0, 90), ("flash_fwd", 50, 100)], "products and attention, 100% of the time"),
        ([("gelu", 0, 90), ("sm90_gemm", 90, 100)], "memory traffic: products are 10% of the time; most is gelu"),
    ],
)
def test_a_trace_tells_what_limits_a_figure(kernels: list[tuple[str, float, float]], limit: str) -> None:
    assert limit_of(Trace(kernels).summary()) == limit
    assert limit_of(Trace(kernels).summary(), at_power_limit=0.9) == f"{limit}; power limit reached"


def test_real_weights_are_used_where_a_folder_has_them(tmp_path: Path) -> None:
    (tmp_path / "weights" / "ViT-L-14").mkdir(parents=True)
    bench = Bench(tmp_path, "cpu", 1, Size(tiny=True), weights=tmp_path / "weights")
    assert bench.model("ViT-L-14") == f"local-dir:{tmp_path}/weights/ViT-L-14"
    assert bench.model("ViT-L-14-quickgelu") == f"local-dir:{tmp_path}/models/tiny-ViT-L-14-quickgelu"
    assert "hf_tokenizer_name" not in models._config("ViT-SO400M-14-SigLIP", tiny=False)["text_cfg"]


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_ranks_end_when_one_is_killed_and_their_training_resumes(tmp_path: Path, folder: Path) -> None:
    found = read_figures(run(tmp_path, folder, "--ranks", "2", "--only", "ranks").sections["ranks"])
    figures = {figure.name: figure for figure in found}
    assert figures["tiny, 2 ranks"].value > 0
    assert figures["seconds until the others have ended when one was killed"].value < 30
    assert figures["tensors that differ after that training resumes"].met


def test_the_first_hour_leaves_a_page_and_one_archive_also_when_a_section_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: Bench) -> list[Figure]:
        raise RuntimeError("no room")

    def write(bench: Bench) -> list[Figure]:
        with bench.tracing("rate"):
            pass
        return [Figure("card", "rate", 2.0, "GB/s")]

    monkeypatch.setattr("benchmarks.gpu.__main__.SECTIONS", {"card": Section(write, 1), "right": Section(fail, 1)})
    monkeypatch.setattr("benchmarks.gpu.__main__.run_section", measure_here)
    monkeypatch.setattr("teachers.runtime.determinism.set_flags", lambda *_, **__: None)
    words = ["--first-hour", "--tiny", "--folder", str(tmp_path)]
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 1
    output = capsys.readouterr().out
    assert "Python headers" in output
    assert "card 1 (1), right 1 (2)" in output
    with tarfile.open(tmp_path / "first-hour.tar.gz") as archive:
        names = set(archive.getnames())
        text = archive.extractfile("first-hour/performance.md").read().decode()  # type: ignore[union-attr]
    assert {f"first-hour/{name}" for name in ("gpu.jsonl", "machine.txt", "traces/rate.json.gz")} <= names
    assert "| rate | 2.000 GB/s |" in text
    assert "**`right` FAILED in 1" in text
    assert text.startswith(page.PAGE.read_text(encoding="utf-8")[:100])
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert "lacks what is needed: C compiler" in capsys.readouterr().err
