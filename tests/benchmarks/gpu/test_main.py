"""The benchmark of a GPU, on a CPU with tiny models."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import page
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.bench import Bench, Size
from benchmarks.gpu.models import load_tokenizer, vocabulary_size
from benchmarks.pipeline.figures import Figure
from benchmarks.pipeline.page import read_figures
from tests.helpers.decoding import decode_pool


def test_a_tiny_run_on_a_cpu_measures_every_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("benchmarks.gpu.shards.DecodePool", lambda _: contextlib.nullcontext(decode_pool()))
    monkeypatch.setattr("reinforce.training.record.log.draw_curves", lambda *_: None)  # a second each
    monkeypatch.setattr("teachers.device.determinism.set_flags", lambda *_, **__: None)  # flags of the other tests
    main(["--device", "cpu", "--tiny", "--cores", "1", "--results", f"{tmp_path}/gpu.json"])
    output = capsys.readouterr().out
    results = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    figures = {figure.name: figure for figure in read_figures(results)}
    for name in (
        "products of bf16 matrices of 64 x 64",
        "copies from pinned memory to the device",
        "tiny, images, compiled",
        "tiny, images, bf16 weights",
        "tiny, MFU, as in runs",
        "tiny, texts of 16 tokens",
        "tiny, texts of 77 tokens",
        "tiny-coca, batches of 2 images with 2 captions of 3 words",
        "kernels a word of a batch",
        "waits of the host a word of a batch",
        "decoding to Parquet, 2 augmentations, 1 decode processes",
        "busy share of the device, 10 augmentations, 1 decode processes",
        "tiny, eager, batches of 4, training",
    ):
        assert figures[name].value > 0, name
        assert name in output
    same = [figure for name, figure in figures.items() if "differ" in name]
    assert [figure.value for figure in same] == [0, 0, 0]
    assert figures["shards that finish in halved batches when memory is short"].met
    assert "Measured on" in page.render_page(page.PAGE.read_text(encoding="utf-8"), results)


def test_a_part_that_fails_is_reported_and_the_others_are_stored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def captions(bench: Bench) -> list[Figure]:
        first = Figure("captions", "first", 2.0, "captions/s")
        return [first, *bench.attempt("captions: second", lambda: [Figure("captions", "second", 1 / 0, "")])]

    def shards(bench: Bench) -> list[Figure]:
        assert "first" in (tmp_path / "gpu.json").read_text(), "each section is stored when it ends"
        raise torch.OutOfMemoryError("CUDA out of memory.")

    sections = {"captions": captions, "shards": shards, "students": lambda _: [Figure("students", "third", 3.0, "")]}
    monkeypatch.setattr("benchmarks.gpu.__main__.SECTIONS", sections)
    monkeypatch.setattr("teachers.device.determinism.set_flags", lambda *_, **__: None)
    with pytest.raises(SystemExit) as ended:
        main(["--device", "cpu", "--tiny", "--cores", "1", "--results", f"{tmp_path}/gpu.json"])
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert [figure.value for figure in read_figures(results)] == [2, 3]
    assert results["failures"] == {
        "captions: second": "ZeroDivisionError: division by zero",
        "shards": "OutOfMemoryError: CUDA out of memory.",
    }
    assert ended.value.code == 1
    assert "2 parts failed: captions: second, shards" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "advice"), [([], "no CUDA device"), (["--device", "cpu"], "add --tiny")])
def test_what_this_machine_cannot_measure_is_one_message(
    words: list[str], advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(words)
    assert advice in capsys.readouterr().err


@pytest.mark.parametrize("name", Size().teachers)
def test_tokenizers_are_not_downloaded_and_their_tokens_are_in_the_vocabulary(name: str) -> None:
    tokens = load_tokenizer(name)(["a photo of a dog", ""])
    assert tokens.shape[0] == 2
    assert tokens.min() >= 0
    assert tokens.max() < vocabulary_size(name)
