"""``reinforce export latency`` from the command line, its measurements and its table."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from reinforce import reports as plots
from reinforce.errors import UserError
from reinforce.evaluation.model_names import resolve_models
from reinforce.evaluation.suite import ResultFile
from reinforce.processes.cores import available_cores
from reinforce.shipping import latency as latencies
from reinforce.shipping.latency import LatencyReport, cpu_name, find_accuracies, machine_name, measure_latency
from reinforce.shipping.packages import Runtime
from reinforce.shipping.targets.base import ExportOptions, Tower, reparameterize
from reinforce.shipping.targets.onnx import Onnx
from tests.helpers import shipping as models
from tests.helpers.commands import Printed
from tests.helpers.evaluation import find_set
from tests.helpers.models.tiny_coca import coca_model
from tests.helpers.students import student_folder


@pytest.fixture
def threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_command_measures_several_models(printed: Printed, tmp_path: Path, threads: None) -> None:
    vit = student_folder(tmp_path / "runs" / "student")  # without weights, in the layout of a training's output
    fast = models.fastvit(tmp_path / "fast", weights=False)
    words = ["export", "latency", f"{tmp_path}/runs", fast, "--rounds", "5", "--threads", "1"]
    out = printed(*words, "--json", f"{tmp_path}/out/latency.json")
    assert out.startswith("5 rounds on 1 CPU, device cpu\n")
    for text in ("parameters, M", "GFLOP", "image, ms", "1.0x", "1 of ", "medians of 5 rounds by the wall clock"):
        assert text in out
    assert not re.search(r"\b0\.0 \+|\+ 0\.0\b", out), "a small model has digits, too"
    measured = json.loads((tmp_path / "out" / "latency.json").read_text())
    assert (measured["threads"], measured["rounds"], measured["batch"]) == (1, 5, 1)
    assert measured["cpu"] == cpu_name() != ""
    assert measured["cores"] >= 1
    assert machine_name().startswith(f"{cpu_name()}, ")
    assert measured["versions"]["torch"] == torch.__version__
    assert list(measured["models"]) == [f"{tmp_path}/runs", fast]
    for name, about in zip((vit, fast), measured["models"].values(), strict=True):
        clip = open_clip.create_model(name, load_weights=False)
        fused = sum(parameter.numel() for parameter in reparameterize(clip).visual.parameters())
        whole = sum(parameter.numel() for parameter in clip.parameters()) - 1  # the logit scale
        before = sum(parameter.numel() for parameter in clip.visual.parameters())
        assert about["parameters"] == {"image": fused, "text": whole - before, "total": fused + whole - before}
        for side in ("image", "text"):
            times = about["milliseconds"]["torch"][side]
            assert 0 < times["fastest"] <= times["lower quartile"] <= times["median"] <= times["upper quartile"]


def test_image_sizes_and_batches_are_measured_on_pinned_cores(printed: Printed, tmp_path: Path, threads: None) -> None:
    cores = os.sched_getaffinity(0)
    model, file, drawn = models.fastvit(tmp_path / "fast", weights=False), tmp_path / "l.json", tmp_path / "l.png"
    results = tmp_path / "results"
    kept = ResultFile(str(results), f"{model} at 64", f"{model} at 64@0")
    kept.add(find_set("imagenet1k"), {"metrics": {"main_metric": 0.5}})
    words = ["export", "latency", model, "--rounds", "2", "--threads", "1", "--batch", "2", "--image-size", "64"]
    words += ["--image-size", "96", "--json", str(file), "--picture", str(drawn), "--results", str(results)]
    assert "in batches of 2" in printed(*words)
    measured = json.loads(file.read_text())
    small, large = measured["models"].values()
    assert list(measured["models"]) == [f"{model} at 64", f"{model} at 96"]
    assert (measured["batch"], small["image size"], large["image size"]) == (2, [64, 64], [96, 96])
    assert small["parameters"] == large["parameters"]
    assert small["gflop"]["image"] < large["gflop"]["image"]  # of one image
    assert os.sched_getaffinity(0) == cores
    assert drawn.read_bytes().startswith(b"\x89PNG")


def test_a_picture_has_plain_numbers_of_milliseconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = LatencyReport(
        {"batch": 1, "threads": 1, "cpu": "C"}, {"a": figures(150.0, 30.0), "b": figures(400.0, 40.0)}
    )
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"/file/x\.png cannot be written: .*\. Name another file\.$"):
        report.draw({"a": 0.5}, f"{tmp_path}/file/x.png")
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "save", lambda figure, url: drawn.append(figure))
    report.draw({"a": 0.5, "b": 0.6}, "x.png")
    drawn[0].canvas.draw()
    labels = [label.get_text() for label in drawn[0].axes[0].xaxis.get_ticklabels(which="both")]
    assert {"200", "300", "400"} <= {*labels}
    assert not any("times" in label for label in labels)


def test_accuracies_are_published_or_of_a_suite(tmp_path: Path) -> None:
    ResultFile(str(tmp_path), "runs/s0", "runs/s0@0").add(find_set("imagenet1k"), {"metrics": {"main_metric": 0.25}})
    names = ["runs/s0", "MobileCLIP2-S0", "MobileCLIP2-L-14,dfndr2b", "ViT-L-14"]
    assert [*find_accuracies(names, str(tmp_path)).items()] == [*zip(names[:3], (0.25, 0.71534, 0.81904), strict=True)]
    with pytest.raises(UserError, match="nothing is published of ViT-L-14"):
        find_accuracies(["ViT-L-14"], None)


def test_more_threads_than_cores_are_refused() -> None:
    with pytest.raises(UserError, match=r"^threads: .* would wait for each other. Give at most \d+\.$"):
        measure_latency({}, rounds=1, threads=available_cores() + 1)


def test_operations_match_a_count_by_hand(tmp_path: Path) -> None:
    with resolve_models([student_folder(tmp_path)], weights=False) as specs:
        report = measure_latency(specs, rounds=1, clock="process")
    assert "process clock" in report.lines()[0]
    (about,) = report.models.values()
    width, layers, patches, length = 32, 2, 16, 16

    def blocks(tokens: int) -> int:
        products = tokens * width * (3 * width + width + 4 * width + 4 * width)  # queries to values, out, the MLP
        return layers * 2 * (products + 2 * tokens * tokens * width)

    patching, projecting = 2 * patches * width * 3 * 8 * 8, 2 * width * 16
    assert about["gflop"]["image"] * 1e9 == pytest.approx(blocks(patches + 1) + patching + projecting)
    assert about["gflop"]["text"] * 1e9 == pytest.approx(blocks(length) + projecting)


class Unconverted(Onnx):
    """A runtime that copies nothing but the name of each tower."""

    def convert(self, tower: Tower, folder: Path, options: ExportOptions) -> Path:
        (folder / tower.name).write_text(tower.name)
        return folder / tower.name

    def load(self, path: Path, threads: int | None = None) -> Any:
        return lambda inputs: inputs


def test_the_text_tower_is_converted_once_for_all_image_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(latencies, "load_target", lambda name: Unconverted())
    with resolve_models([student_folder(tmp_path)], weights=False) as specs:
        report = measure_latency(specs, rounds=1, runtimes={"mine": Runtime("onnx")}, image_sizes=[32, 64])
    out = capfd.readouterr().out
    assert [out.count(f"{side} tower: conversion for mine: ") for side in ("image", "text")] == [2, 1]
    assert [about["bytes"]["mine"] for about in report.models.values()] == [{"image": 5, "text": 4}] * 2
    assert [{*about["milliseconds"]["mine"]} for about in report.models.values()] == [{"image", "text"}] * 2


def test_models_that_cannot_be_measured_are_reported(refused: Printed, tmp_path: Path) -> None:
    assert "its architecture is not on this machine" in refused("export", "latency", "hf-hub:nobody/nothing")
    assert "did you mean MobileCLIP2-S" in refused("export", "latency", "MobileCLIP2-S5")
    assert "it is a captioner" in refused("export", "latency", coca_model(tmp_path / "coca"))


def test_documentation_shows_the_stored_measurements() -> None:
    root = Path(__file__).parents[2]
    stored = json.loads((root / "benchmarks" / "results" / "latency.json").read_text())
    rows = [line.strip("| ").split(" | ") for line in (root / "docs" / "shipping.md").read_text().splitlines()]
    table = {row[0]: row for row in rows if row[0] in stored["models"]}
    assert list(table) == list(stored["models"])
    slowest = stored["models"]["ViT-L-14"]["milliseconds"]["torch"]
    for model, about in stored["models"].items():
        times = about["milliseconds"]["torch"]
        image, text = (times[side]["median"] for side in ("image", "text"))
        assert [cell.split()[0] for cell in table[model][3:5]] == [f"{image:.1f}", f"{text:.1f}"]
        both = slowest["image"]["median"] + slowest["text"]["median"]
        assert table[model][5:] == [f"{slowest['image']['median'] / image:.1f}", f"{both / (image + text):.1f}"]


def figures(image: float, text: float) -> dict[str, Any]:
    """Measurements with these median milliseconds."""
    times = {"image": image, "text": text}
    ranges = {
        side: {"median": t, "lower quartile": t, "upper quartile": t + 1, "fastest": t} for side, t in times.items()
    }
    sizes = {"image": 2_000_000, "text": 1_000_000}
    return {"parameters": sizes, "gflop": {"image": 1.0, "text": 2.0}, "milliseconds": {"torch": ranges}}


def test_table_shows_the_speedup_over_the_slowest_line() -> None:
    table = LatencyReport({}, {"slow": figures(8.0, 2.0), "fast": figures(2.0, 2.0)}).table()
    columns = [list(column.cells) for column in table.columns]
    assert columns == [
        ["slow", "fast"],
        ["2.0 + 1.0"] * 2,
        ["1.0 + 2.0"] * 2,
        ["8.0 ±0.5", "2.0 ±0.5"],
        ["2.0 ±0.5"] * 2,
        ["1.0x", "2.5x"],
    ]
