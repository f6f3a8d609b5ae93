"""``reinforce export onnx``, the exported folder in use, and its parts: towers, graphs and README."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import numpy as np
import onnx
import onnxruntime
import open_clip
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from reinforce import terminal
from reinforce.errors import UserError
from reinforce.images.policy import decode
from reinforce.shipping import packages
from reinforce.shipping.checks import compare, compare_on_sets
from reinforce.shipping.targets import base as steps
from reinforce.shipping.targets import onnx as graph
from reinforce.shipping.targets.base import ExportOptions, Tower, count_parameters, reparameterize
from reinforce.source.config import Limits
from teachers.open_clip.teacher import load_model
from teachers.protocols import ImageSpec
from teachers.spec import ModelSpec
from tests.helpers import shipping as models
from tests.helpers.commands import Printed, exit_status
from tests.helpers.data import picture
from tests.helpers.evaluation import COLOURS, ColourOracle, make_evaluator, write_colour_folder, write_colour_shard
from tests.helpers.images import encode
from tests.helpers.models.tiny_coca import coca_model
from tests.helpers.students import built

ONNX = ("export", "onnx")
FILES = {"README.md", "export.json", "golden.json", "image.onnx", "preprocess.json", "text.onnx", "tokenizer.json"}
CLASSES = ["a cat", "a dog"]  # of the README
HALF = ((0.5,) * 3,) * 2  # mean and deviation


class Exported(NamedTuple):
    model: str
    folder: Path
    sets: list[str]
    printed: str


@pytest.fixture(scope="module", params=["vit", pytest.param("fastvit", marks=pytest.mark.slow)])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A model, its exported folder, and what it was tested on; one is exported to disk, the other to an object store
    and copied back."""
    root: Path = tmp_path_factory.mktemp(request.param)
    name = getattr(models, request.param)(root / "model")
    output = f"{root}/onnx" if request.param == "vit" else f"memory://{root}/onnx"
    sets = evaluation_sets(root)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert exit_status(*ONNX, name, "--output", output, *sets) == 0
    if request.param == "fastvit":
        fsspec.filesystem("memory").get(output, f"{root}/onnx", recursive=True)
    return Exported(name, root / "onnx", sets, printed.getvalue())


def evaluation_sets(root: Path) -> list[str]:
    """Options that name 10 of 12 pictures of six classes, and 10 with captions."""
    colours, pairs = write_colour_folder(root / "colours"), write_colour_shard(root / "pairs.tar")
    section = {"zero_shot": {"colours": {"images": colours, "templates": "none"}}}
    config = root / "student.yaml"
    config.write_text(yaml.safe_dump({"output": "x", "student": {"model": "y"}, "evaluate": section}))
    return ["--config", str(config), "--retrieval", f"pairs={pairs}", "--limit", "10"]


def test_towers_match_torch_for_any_batch_size(exported: Exported) -> None:
    assert {path.name for path in exported.folder.iterdir()} == FILES
    for path in exported.folder.iterdir():  # no paths of this machine
        for text in (str(Path(models.__file__).parents[2]), "site-packages", str(exported.folder.parent)):
            assert text.encode() not in path.read_bytes(), path.name
    model, _, _ = open_clip.create_model_and_transforms(exported.model)
    model.eval()
    about = json.loads((exported.folder / "preprocess.json").read_text())
    mean, std = (np.array(about[key], np.float32)[:, None, None] for key in ("mean", "std"))
    rng = np.random.default_rng(0)
    image, text = (onnxruntime.InferenceSession(str(exported.folder / f"{side}.onnx")) for side in ("image", "text"))
    for count in (1, 2, 7):
        coarse = rng.integers(0, 256, (count, 4, 4, 3), np.uint8)
        pixels = coarse.repeat(about["size"][0] // 4, 1).repeat(about["size"][1] // 4, 2)
        tokens = rng.integers(1, 49408, (count, about["context_length"]))
        normalised = (pixels.transpose(0, 3, 1, 2).astype(np.float32) / 255 - mean) / std
        with torch.no_grad():
            images = model.encode_image(torch.from_numpy(normalised), normalize=True).numpy()
            texts = model.encode_text(torch.from_numpy(tokens), normalize=True).numpy()
        np.testing.assert_allclose(image.run(None, {"images": pixels})[0], images, rtol=0, atol=1e-4)
        np.testing.assert_allclose(text.run(None, {"tokens": tokens})[0], texts, rtol=0, atol=1e-4)
        assert images.shape == (count, about["dim"])
    written = onnx.load(str(exported.folder / "image.onnx"))
    noted = {one.key: one.value for one in written.metadata_props}
    assert (written.producer_name, noted) == ("reinforce", {"model": about["model"]})
    if count > 1:
        assert np.abs(images - images.mean(0)).max() > 0.01, "a constant would agree too"
        assert np.abs(texts - texts.mean(0)).max() > 0.01


def pictures() -> dict[str, bytes]:
    """Encoded images of one scene: plain, with an orientation, with a transparent colour and half transparent."""
    plain = Image.open(io.BytesIO(picture(3, width=143, height=86)))
    exif = Image.Exif()
    exif[0x0112] = 6
    half = plain.convert("RGBA")
    half.putalpha(Image.linear_gradient("L").resize(plain.size))
    return {
        "plain.jpg": encode(plain, "JPEG"),
        "turned.jpg": encode(plain, "JPEG", exif=exif),
        "palette.png": encode(plain.quantize(8), "PNG", transparency=bytes([0] * 4 + [255] * 4)),
        "half.png": encode(half, "PNG"),
    }


def example(folder: Path) -> str:
    """The code of a README, to be run in another folder."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    assert 'folder = "."\n' in code
    return code.replace('folder = "."', f"folder = {str(folder)!r}")


def test_readme_example_runs_without_torch_and_open_clip(exported: Exported) -> None:
    code = example(exported.folder)
    lines = [line for line in code.splitlines() if line and not line.startswith(("import", "from"))]
    assert len(lines) <= 13
    hide = "import sys; sys.modules.update(dict.fromkeys(['torch', 'open_clip', 'transformers', 'reinforce']))\n"
    for name, data in pictures().items():
        (exported.folder.parent / name).write_bytes(data)
    each = f"for name in {[*pictures()]}: exec({code!r}.replace('cat.jpg', name))"
    program = [sys.executable, "-I", "-c", hide + each]
    elsewhere = exported.folder.parent
    out = subprocess.run(program, cwd=elsewhere, check=True, capture_output=True, text=True).stdout

    model, _, preprocess = open_clip.create_model_and_transforms(exported.model)
    model.eval()
    images = torch.stack([preprocess(decode(data, Limits())) for data in pictures().values()])
    with torch.no_grad():
        images, texts, scale = model(images, open_clip.get_tokenizer(exported.model)(CLASSES))
    expected = (scale * images @ texts.T).softmax(dim=-1).numpy()
    actual = [[float(number) for number in re.findall(r"[\d.]+(?:e-?\d+)?", line)] for line in out.splitlines()]
    np.testing.assert_allclose(actual, expected, rtol=1e-3)
    assert np.abs(expected[:, 0] - 0.5).min() > 1e-3, "as a tie would"
    assert np.diff(np.sort(expected[:, 0])).min() > 1e-3, "each picture differs from the others"


def test_report_and_golden_file_hold_what_the_trained_model_computes(
    exported: Exported, printed: Printed, refused: Printed
) -> None:
    report = json.loads((exported.folder / "export.json").read_text())
    for side, inputs in (("image", 10 + 10), ("text", 6 + 10)):
        tower = report["towers"][side]
        assert (exported.folder / tower["file"]).stat().st_size == tower["bytes"]
        assert (tower["cosine"]["inputs"], tower["cosine"]["min"]) == (inputs, pytest.approx(1, abs=1e-5))
    golden = json.loads((exported.folder / "golden.json").read_text())
    model, _, preprocess = open_clip.create_model_and_transforms(exported.model)
    pictures = [Image.open(io.BytesIO(base64.b64decode(case["png"]))) for case in golden["pictures"]]
    assert len({picture.size for picture in pictures}) == len(pictures) == 3
    with torch.no_grad():
        images = model.eval().encode_image(torch.stack([preprocess(picture) for picture in pictures]), normalize=True)
        tokens = torch.tensor([case["tokens"] for case in golden["texts"]])
        texts = model.encode_text(tokens, normalize=True)
    assert torch.equal(tokens, open_clip.get_tokenizer(exported.model)([case["text"] for case in golden["texts"]]))
    for cases, embeddings in ((golden["pictures"], images), (golden["texts"], texts)):
        expected = torch.tensor([case["embedding"] for case in cases])
        torch.testing.assert_close(embeddings, expected, rtol=0, atol=1e-5)

    assert printed(*ONNX, str(exported.folder), "--check") == (
        "image: cosine at least 1.00000 to 3 embeddings of golden.json, in ONNX\n"
        "text: cosine at least 1.00000 to 8 embeddings of golden.json, in ONNX\n"
    )
    swapped = {**golden, "texts": [{**case, "tokens": golden["texts"][0]["tokens"]} for case in golden["texts"]]}
    other = exported.folder.parent / "other"
    shutil.copytree(exported.folder, other)
    (other / "golden.json").write_text(json.dumps(swapped))
    assert "the text tower has a cosine of" in refused(*ONNX, str(other), "--check")
    err = refused(*ONNX, str(exported.folder.parent), "--check")
    assert "has no export.json of onnx: --check takes a local folder" in err


def test_accuracy_of_both_models_is_reported_and_an_existing_folder_is_not_overwritten(
    exported: Exported, tmp_path: Path, printed: Printed, refused: Printed
) -> None:
    printed("evaluate", exported.model, *exported.sets, "--json", str(tmp_path / "report.json"))
    (expected,) = json.loads((tmp_path / "report.json").read_text())["models"].values()
    report = json.loads((exported.folder / "export.json").read_text())
    assert report["metrics"]["trained"] == report["metrics"]["exported"] == expected["metrics"]
    assert {"zero_shot/colours/top1", "retrieval/pairs/text_to_image/r1"} <= expected["metrics"].keys()
    assert report["compared"] == "pictures and texts of the evaluation"
    top1 = f"{100 * expected['metrics']['zero_shot/colours/top1']:.2f} %"
    assert f"zero_shot/colours/top1: {top1}, trained model {top1}\n" in exported.printed
    before = {path: path.stat().st_mtime_ns for path in exported.folder.iterdir()}
    err = refused(*ONNX, exported.model, "--output", str(exported.folder))
    assert "already exists: remove it, or give another --output" in err
    assert {path: path.stat().st_mtime_ns for path in exported.folder.iterdir()} == before


def test_image_tower_alone_is_judged_with_the_text_tower_of_the_model(
    exported: Exported, tmp_path: Path, printed: Printed
) -> None:
    folder = tmp_path / "onnx"
    out = printed(*ONNX, exported.model, str(folder), "--tower", "image", *exported.sets)
    assert "tokenizer.json" not in out
    assert {path.name for path in folder.iterdir()} == FILES - {"text.onnx", "tokenizer.json"}
    report, both = (json.loads((one / "export.json").read_text()) for one in (folder, exported.folder))
    assert report["metrics"] == both["metrics"]
    (tower,) = report["towers"].values()
    assert (tower["file"], tower["cosine"]["inputs"]) == ("image.onnx", both["towers"]["image"]["cosine"]["inputs"])
    (tmp_path / "cat.jpg").write_bytes(picture(3))
    program = [sys.executable, "-I", "-c", example(folder)]
    done = subprocess.run(program, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert done.stdout == "(1, 16)\n"
    printed(*ONNX, str(folder), "--check")


def test_each_model_is_judged_by_its_own_embeddings(tmp_path: Path) -> None:
    def run_of(encoder: ColourOracle) -> dict[str, Any]:
        texts = lambda rows: encoder.encode_texts([[*COLOURS][int(row[0])] for row in rows])  # noqa: E731
        return {"image": lambda rows: encoder.encode_images(rows.permute(0, 3, 1, 2) / 255), "text": texts}

    evaluator = make_evaluator(zero_shot={"set": {"images": write_colour_folder(tmp_path)}})
    models = {"trained": run_of(ColourOracle()), "exported": run_of(Turned())}
    tokenize = lambda texts: torch.tensor([[next(n for n, c in enumerate(COLOURS) if c in text)] for text in texts])  # noqa: E731
    found, metrics = compare_on_sets(evaluator, models, ImageSpec(8, *HALF), tokenize)
    assert [metrics[name]["zero_shot/set/top1"] for name in models] == [1, 0]
    assert (found["image"].minimum, found["image"].count) == (0, 12)
    assert found["text"].minimum == pytest.approx(1)


class Turned(ColourOracle):
    """Takes each colour for the next one."""

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        return super().encode_images(pixels).roll(1, 1)


def test_tower_that_differs_from_torch_is_reported_and_nothing_is_written(
    exported: Exported, tmp_path: Path, refused: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = shutil.copytree(exported.folder.parent / "model", tmp_path / "model") / "open_clip_model.safetensors"
    state = load_file(weights)
    next(state[name] for name in state if re.match(r"visual\..*weight", name)).fill_(float("nan"))
    save_file(state, weights)
    of_other_weights = lambda _, tower, to, options: shutil.copy(exported.folder / f"{tower.name}.onnx", to)  # noqa: E731
    monkeypatch.setattr(graph.Onnx, "convert", of_other_weights)
    err = refused(*ONNX, f"local-dir:{tmp_path}/model", f"{tmp_path}/out/onnx")
    assert "its image tower in ONNX differs by inf from torch, more than the allowed 1e-04" in err
    assert list((tmp_path / "out").iterdir()) == []


def test_models_that_cannot_be_exported_are_reported(
    tmp_path: Path, refused: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "it is a captioner" in refused(*ONNX, coca_model(tmp_path / "coca"), f"{tmp_path}/onnx")
    assert "no weights without `pretrained`" in refused(*ONNX, "ViT-B-32", f"{tmp_path}/onnx")
    lacking = packages.TargetEntry("ONNX", "export", ("onnx", "onnx_that_is_not_there"))
    monkeypatch.setitem(packages.TARGETS, "onnx", lacking)
    assert "onnx_that_is_not_there: run pip install -e '.[export]'" in refused(*ONNX, "MobileCLIP2-S0")
    assert not (tmp_path / "onnx").exists()


def test_reparameterize_fuses_branches_and_the_fused_checkpoint_loads_as_a_teacher_and_not_as_a_student(
    tmp_path: Path,
) -> None:
    clip = load_model(ModelSpec(model=models.fastvit(tmp_path / "model"))).eval()
    images = torch.rand(2, 3, 96, 64)
    before, fused = clip.encode_image(images), reparameterize(clip)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in fused.visual.trunk.stem.modules())
    assert count_parameters(fused)["image"] < count_parameters(clip)["image"]
    assert count_parameters(fused)["text"] == count_parameters(clip)["text"]
    assert torch.equal(clip.encode_image(images), before), "the model is unchanged"
    torch.testing.assert_close(fused.encode_image(images), before, rtol=1e-3, atol=1e-4)
    assert fused.text is clip.text
    models.fastvit(tmp_path / "fused", weights=False)
    save_file(fused.state_dict(), tmp_path / "fused" / "open_clip_model.safetensors")
    name = f"local-dir:{tmp_path}/fused"
    assert torch.equal(load_model(ModelSpec(model=name)).eval().encode_image(images), fused.encode_image(images))
    with pytest.raises(UserError, match="are reparameterised for inference and lack the branches that are trained"):
        built(name)


def test_large_weights_are_stored_in_a_separate_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "EXTERNAL_DATA_BYTES", 1000)
    linear = torch.nn.Linear(40, 30)
    tower = Tower("image", "images", linear, lambda count: torch.rand(count, 40))
    graph.TARGET.convert(tower, tmp_path, ExportOptions("tiny", "fp32"))
    assert (tmp_path / "image.onnx.data").stat().st_size >= 40 * 30 * 4
    (tmp_path / "image.onnx").rename(tmp_path / "moved.onnx")  # the graph does not depend on its own name
    assert compare(graph.TARGET.load(tmp_path / "moved.onnx"), linear, torch.rand(3, 40)).difference < 1e-5


def test_largest_difference_is_infinite_where_a_number_is_not_finite() -> None:
    run, rows = (lambda x: 2 * x), torch.ones(20, 4)
    assert compare(run, lambda x: 2 * x + 0.5, rows).difference == pytest.approx(0.5)
    assert compare(run, lambda x: 2 * x / 0, rows).difference == float("inf")
    assert compare(run, lambda x: x[:, :3], rows).difference == float("inf")
    quarter = compare(run, lambda x: x * torch.where(x.cumsum(1) == 1, 1, -1), rows)  # (1, -1, -1, -1)
    assert (quarter.minimum, quarter.mean, quarter.count) == (pytest.approx(-0.5), pytest.approx(-0.5), 20)


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        (ImageSpec(64, *HALF, "bicubic", "crop"), "image.crop((left, top, left + size, top + size))"),
        (ImageSpec((96, 64), *HALF, "bicubic", "crop"), "image.crop((left, top, left + width, top + height))"),
        (ImageSpec(64, *HALF, "bilinear", "squash"), 'resize(config["size"][::-1], Image.Resampling.BILINEAR)'),
    ],
)
def test_example_resizes_as_the_model_expects(spec: ImageSpec, line: str) -> None:
    config = {"model": "tiny", "dim": 16, "context_length": 77, "normalised_by": "image.onnx"}
    text = graph.Onnx().readme(config, spec)
    assert line in text
    assert f"uint8 [N, {spec.height}, {spec.width}, 3]" in text
    assert "float32 [N, 16]" in text
    assert "int64 [N, 77]" in text


def test_seconds_of_a_step_are_printed_while_its_converter_is_silent(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "_LOG_SECONDS", 0.05)
    monkeypatch.setattr(steps, "_REDRAW_SECONDS", 0.01)
    with steps.step_screen() as screen:
        with steps.step(screen, "image tower: conversion"), steps.silenced():
            print("of the converter, in Python")
            os.write(1, b"of the converter, in C++")
            time.sleep(0.4)
        with pytest.raises(ValueError, match="no"), steps.step(screen, "text tower: conversion"):
            raise ValueError("no")
    out, err = capfd.readouterr()
    lines = [line for line in out.splitlines() if line != "text tower: conversion"]
    assert len(lines) > 2, "the last one when it ended, others before"
    assert (set(lines), err) == ({"image tower: conversion: 0:00:00"}, "")
