"""LiteRT and ExecuTorch: exported towers in their real runtimes, next to others in ``reinforce export latency``."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest

from reinforce.errors import UserError
from reinforce.shipping.checks import compare
from reinforce.shipping.packages import RUNTIMES, TARGETS, choose_runtimes, load_target, require_packages
from reinforce.shipping.targets.base import ExportOptions, reparameterize, split_towers
from reinforce.shipping.tokens import PROBES
from teachers.open_clip.teacher import image_spec
from tests.helpers import shipping as models
from tests.helpers.commands import Command, Printed
from tests.helpers.data import picture

ENDINGS = {"litert": "tflite", "executorch": "pte"}


def need(target: str) -> None:
    try:
        require_packages(target)
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.parametrize("target", ENDINGS)
def test_exported_towers_agree_with_torch_and_the_readme_runs(target: str, command: Command, tmp_path: Path) -> None:
    need(target)
    folder, end = tmp_path / "out", ENDINGS[target]
    status, out, err = command("export", target, models.fastvit(tmp_path / "model"), str(folder))
    assert (status, "[START]" in out + err) == (0, False), err  # of the converter
    towers = json.loads((folder / "export.json").read_text())["towers"]
    for side, tower in towers.items():
        assert tower["largest_difference"] <= 1e-4, side
        assert tower["cosine"]["min"] > 0.99999, side
        assert tower["bytes"] == (folder / f"{side}.{end}").stat().st_size
    if target == "executorch":
        assert all(0.4 < tower["delegate"]["share"] < 1 for tower in towers.values())
        assert f"image.pte: XNNPACK computes {towers['image']['delegate']['operations']} of " in out
    (tmp_path / "cat.jpg").write_bytes(picture(0))
    (example,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    elsewhere = example.replace('folder = "."', f"folder = {str(folder)!r}")
    shown = subprocess.run([sys.executable, "-c", elsewhere], cwd=tmp_path, capture_output=True, text=True, check=True)
    numbers = re.findall(r"[0-9.e-]+", shown.stdout.strip().splitlines()[-1])
    assert sum(map(float, numbers)) == pytest.approx(1, abs=1e-4)
    assert command("export", target, str(folder), "--check")[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize(("target", "weights"), [("litert", "int8"), ("executorch", "dynamic-int8")])
def test_int8_is_refused_below_the_least_cosine(
    target: str, weights: str, printed: Printed, refused: Printed, tmp_path: Path
) -> None:
    need(target)
    words = ["export", target, models.fastvit(tmp_path / "model"), str(tmp_path / "int8"), "--weights", weights]
    assert "less than --min-cosine 1" in refused(*words, "--min-cosine", "1")
    assert not (tmp_path / "int8").exists()
    printed(*words, "--min-cosine", "0.95")  # random weights, whose rounding depends on the processor
    towers = json.loads((tmp_path / "int8" / "export.json").read_text())["towers"]
    assert all(0.95 <= tower["cosine"]["min"] < 1 for tower in towers.values())
    if target == "litert":  # XNNPACK's quantizer leaves the embedding of tokens, most of this text tower, in fp32
        assert towers["text"]["bytes"] < 49408 * 32 * 4 / 2


@pytest.mark.slow
def test_int8_of_a_resnet_runs_although_biases_of_its_pooling_are_computed(printed: Printed, tmp_path: Path) -> None:
    need("executorch")
    model, folder = models.resnet(tmp_path / "model"), tmp_path / "int8"
    printed("export", "executorch", model, str(folder), "--weights", "dynamic-int8")
    assert json.loads((folder / "export.json").read_text())["towers"]["image"]["cosine"]["min"] >= 0.99


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("target", ENDINGS)
def test_towers_of_mobileclip2_s0_agree_with_torch(target: str, tmp_path: Path) -> None:
    need(target)
    clip = models.mobileclip2_s0()
    image = image_spec(open_clip.get_model_preprocess_cfg(clip))
    runtime, tokens = load_target(target), open_clip.get_tokenizer("MobileCLIP2-S0")(list(PROBES))
    for tower in split_towers(reparameterize(clip), image, tokens):
        path = runtime.convert(tower, tmp_path, ExportOptions("s0", "fp32"))
        found = compare(runtime.load(path, threads=1), tower.module, tower.example(4))
        assert found.difference <= 1e-4, (tower.name, found)


@pytest.mark.slow
def test_all_installed_runtimes_are_measured_side_by_side(command: Command, tmp_path: Path) -> None:
    runtimes, missing = choose_runtimes(["all"])
    if not runtimes:
        pytest.skip("; ".join(missing))
    model, file = models.vit(tmp_path / "model"), tmp_path / "latency.json"
    words = ["export", "latency", model, "--threads", "1", "--rounds", "2", "--json", str(file), "--runtime", "all"]
    status, out, err = command(*words)
    assert (status, err.count("left out: ")) == (0, len(missing))
    measured = json.loads(file.read_text())
    (about,) = measured["models"].values()
    packages = {name for runtime in runtimes.values() for name in TARGETS[runtime.target].packages}
    assert packages <= measured["versions"].keys()
    if {"onnxruntime", "openvino"} <= runtimes.keys():
        assert about["bytes"]["openvino"] == about["bytes"]["onnxruntime"]
        assert "conversion for openvino" not in out, "it runs the files of ONNX"
    assert f"{model}: text tower: conversion for {[*runtimes][-1]}: 0:" in out
    assert list(about["milliseconds"]) == ["torch", *runtimes]
    assert list(about["bytes"]) == list(runtimes)
    assert all(times[side]["median"] > 0 for times in about["milliseconds"].values() for side in times)


def test_missing_and_unknown_runtimes_are_one_line_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reinforce.processes.imports.installed", lambda name: "litert" not in name)
    chosen, missing = choose_runtimes(["all"])
    assert set(chosen) == {name for name in RUNTIMES if not name.startswith("litert")}
    (line,) = missing
    assert line.startswith("left out: LiteRT needs litert_torch, ai_edge_litert: run pip install -e '.[litert]'")
    with pytest.raises(UserError, match=r"LiteRT needs .*\.\[litert\]"):
        choose_runtimes(["litert-int8"])
    with pytest.raises(UserError, match="'tflite' is unknown; choose of torch, onnxruntime, "):
        choose_runtimes(["tflite"])
