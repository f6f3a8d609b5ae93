"""``reinforce export coreml``: its packages, and the interpreter that executes them where there is no Core ML."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import open_clip
import pytest
import torch

from reinforce.cli import main
from reinforce.processes.imports import installed
from reinforce.shipping.checks import compare
from reinforce.shipping.targets import coreml, mil
from reinforce.shipping.targets.base import Tower, reparameterize, split_towers
from reinforce.shipping.tokens import PROBES
from teachers.open_clip.teacher import image_spec, load_model
from teachers.pixels import to_pixels
from teachers.spec import ModelSpec
from tests.helpers import shipping as models
from tests.helpers.commands import Printed
from tests.helpers.models.tiny_models import open_clip_model

pytestmark = pytest.mark.skipif(not installed("coremltools"), reason="needs the extra coreml")
FLOAT32, INT32 = 65568, 131104  # ArrayFeatureType


class Exported(NamedTuple):
    model: str
    folder: Path
    converted: dict[str, Callable[..., Any]]  # what torch and coremltools do, once for each tower: it takes seconds


def kept(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which returns what it has returned for the same tower."""
    known: dict[str, Any] = {}

    @wraps(function)
    def once(tower: Tower, *rest: Any) -> Any:
        if tower.name not in known:
            known[tower.name] = function(tower, *rest)
        return known[tower.name]

    return once


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A FastViT of portrait pictures, and its packages in fp16."""
    root: Path = tmp_path_factory.mktemp("coreml")
    name = models.fastvit(root / "my-student")
    converted = {function: kept(getattr(coreml, function)) for function in ("_export", "_convert")}
    with pytest.MonkeyPatch.context() as patch:
        for function, of in converted.items():
            patch.setattr(coreml, function, of)
        with pytest.raises(SystemExit) as ended:
            main(["export", "coreml", name, f"{root}/out"])
    assert not ended.value.code
    return Exported(name, root / "out", converted)


@pytest.fixture
def again(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> Exported:
    """An export of this model converts nothing again."""
    for function, of in exported.converted.items():
        monkeypatch.setattr(coreml, function, of)
    return exported


def spec_of(path: Path) -> Any:
    import coremltools as ct

    return ct.utils.load_spec(str(path))


def operations(path: Path) -> list[Any]:
    (function,) = spec_of(path).mlProgram.functions.values()
    return list(function.block_specializations[function.opset].operations)


def check_interface(specs: dict[str, Any], width: int, height: int, context: int) -> None:
    """Assert the inputs and outputs of the authors' app."""
    image, text = (spec.description for spec in specs.values())
    picture, tokens = image.input[0].type.imageType, text.input[0].type.multiArrayType
    assert (image.input[0].name, picture.width, picture.height, picture.colorSpace) == (
        "image", width, height, picture.RGB,
    )  # fmt: skip
    assert (text.input[0].name, list(tokens.shape), tokens.dataType) == ("text", [1, context], INT32)
    for description in (image, text):
        (output,) = description.output
        values = output.type.multiArrayType
        assert (output.name, list(values.shape), values.dataType) == ("final_emb_1", [1, 16], FLOAT32)


def test_packages_have_the_interface_of_the_authors_app(exported: Exported, printed: Printed) -> None:
    files = {"export.json", "golden.json", "preprocess.json", "README.md", "tokenizer.json"}
    packages = {"my_student_image.mlpackage", "my_student_text.mlpackage"}
    assert {path.name for path in exported.folder.iterdir()} == files | packages
    specs = {side: spec_of(exported.folder / f"my_student_{side}.mlpackage") for side in ("image", "text")}
    assert {spec.specificationVersion for spec in specs.values()} == {8}, "iOS 17"
    check_interface(specs, 64, 96, models.CONTEXT)
    readme = (exported.folder / "README.md").read_text()
    assert "my_student_image(configuration:" in readme
    assert "resized (bilinear) to 64 x 96, whatever its proportions" in readme
    checked = printed("export", "coreml", str(exported.folder), "--check")
    assert "image: cosine at least 1.00000 to 3 embeddings of golden.json, in an interpreter" in checked


def test_packages_in_fp16_compute_what_the_student_does(exported: Exported) -> None:
    report = json.loads((exported.folder / "export.json").read_text())
    assert report["executed_by"] == "an interpreter of the package's operations (Core ML needs macOS)"
    assert min(report["towers"][side]["cosine"]["min"] for side in ("image", "text")) >= 0.9999
    assert {tower["cosine"]["inputs"] for tower in report["towers"].values()} == {64}, "without an evaluation"
    clip = load_model(ModelSpec(model=exported.model)).eval()
    coarse = np.random.default_rng(5).integers(0, 256, (4, 6, 4, 3), np.uint8)
    pixels = torch.from_numpy(coarse.repeat(16, 1).repeat(16, 2))
    about = json.loads((exported.folder / "preprocess.json").read_text())
    mean, std = (torch.tensor(about[key]).view(3, 1, 1) for key in ("mean", "std"))
    run = coreml.TARGET.load(exported.folder / "my_student_image.mlpackage")
    with torch.inference_mode():
        expected = clip.encode_image((pixels.permute(0, 3, 1, 2) / 255 - mean) / std, normalize=True)
        found = run(pixels)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4), rtol=0, atol=1e-5)  # divided in float32
    assert (expected - expected.mean(0)).abs().max() > 0.01, "a constant would agree too"


def test_end_of_text_is_found_on_integers(exported: Exported) -> None:
    assert torch.tensor([49406, 49407]).half().unique().numel() == 1
    package = exported.folder / "my_student_text.mlpackage"
    (argmax,) = [one for one in operations(package) if one.type == "reduce_argmax"]
    (given,) = argmax.inputs["x"].arguments
    assert given.name == "text", "the int32 input itself"
    texts = torch.tensor([[49406, 320, 1125, 49407] + [0] * 12, [49406, 49407] + [0] * 14, [49406, *[320] * 14, 49407]])
    clip = load_model(ModelSpec(model=exported.model)).eval()
    found = compare(coreml.TARGET.load(package), lambda rows: clip.encode_text(rows, normalize=True), texts)
    assert found.minimum > 0.9999


def test_smaller_weights_are_published_if_they_are_close_enough(
    again: Exported, tmp_path: Path, printed: Printed, refused: Printed
) -> None:
    words = ("export", "coreml", again.model, str(tmp_path / "small"), "--weights")
    err = refused(*words, "palettised")
    assert "its text tower with palettised weights has a cosine of 0.98" in err
    assert "to the trained one, less than --min-cosine 0.99: use other --weights, or allow less" in err
    assert list(tmp_path.iterdir()) == []
    printed(*words, "int8")
    report, large = (json.loads((one / "export.json").read_text()) for one in (tmp_path / "small", again.folder))
    assert report["towers"]["text"]["bytes"] < 0.6 * large["towers"]["text"]["bytes"]
    assert 0.995 <= report["towers"]["text"]["cosine"]["min"] < large["towers"]["text"]["cosine"]["min"]


def test_what_the_app_cannot_run_is_refused(tmp_path: Path, refused: Printed) -> None:
    def towers(side: int, context: int, first: int = 49406) -> list[Tower]:
        tokens = torch.tensor([[first, 320, 1125, 539, 320, 2368, 49407] + [0] * (context - 7)])
        pixels = torch.zeros(1, side, side, 3, dtype=torch.uint8)
        nothing = torch.nn.Identity()
        return [Tower("image", "", nothing, lambda _: pixels), Tower("text", "", nothing, lambda _: tokens)]

    assert (coreml._app_model(towers(256, 77)), coreml._app_model(towers(224, 77))) == ("s0", "blt")
    for case, reason in (
        (towers(256, 40), "has texts of 77 tokens, not 40"),
        (towers(256, 77, first=1), "has CLIP's tokenizer"),
    ):
        with pytest.raises(ValueError, match=reason):
            coreml._app_model(case)
    err = refused("export", "coreml", open_clip_model(tmp_path / "model"), str(tmp_path / "out"), "--names", "app")
    assert "the authors' app has pictures of 256 x 256 or 224 x 224, not 32 x 32" in err
    assert not (tmp_path / "out").exists()


def test_packages_replace_those_of_the_app(
    again: Exported, tmp_path: Path, printed: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of small ones, as if their pictures were square: large pictures take seconds."""
    app_model, square = coreml._app_model, torch.zeros(1, 256, 256, 3)
    image = Tower("image", "", torch.nn.Identity(), lambda _: square)
    monkeypatch.setattr(coreml, "_app_model", lambda towers: app_model([image, *towers[1:]]))
    monkeypatch.setattr(coreml, "_APP_CONTEXT", models.CONTEXT)
    out = tmp_path / "out"
    printed("export", "coreml", again.model, str(out), "--names", "app")
    sides = {side: out / f"mobileclip_s0_{side}.mlpackage" for side in ("image", "text")}
    assert {*out.glob("*.mlpackage")} == {*sides.values()}
    check_interface({side: spec_of(path) for side, path in sides.items()}, 64, 96, models.CONTEXT)
    report = json.loads((out / "export.json").read_text())
    assert [tower["file"] for tower in report["towers"].values()] == [path.name for path in sides.values()]
    assert "mobileclip_s0_image(configuration:" in (out / "README.md").read_text()


@pytest.fixture
def with_class_token(tmp_path: Path) -> str:
    """A model whose text tower coremltools cannot convert."""
    return open_clip_model(tmp_path / "model", custom_text=True, embed_cls=True, layers=1)


def test_unknown_operations_are_named(
    again: Exported, with_class_token: str, tmp_path: Path, refused: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = again.converted["_export"]
    with monkeypatch.context() as patch:
        patch.setattr(coreml, "_export", lambda one: kept(one) if one.name == "image" else kept.__wrapped__(one))
        err = refused("export", "coreml", with_class_token, str(tmp_path / "out"))
    assert "its text tower has operations that coremltools lacks: aten.new_ones.default" in err
    assert "--tower image exports the image tower alone" in err
    monkeypatch.delitem(mil._OPERATIONS, "gelu")
    with pytest.raises(ValueError, match="an operation that cannot be checked here: gelu"):
        coreml.TARGET.load(again.folder / "my_student_text.mlpackage")
    assert "cannot be checked here: gelu" in refused("export", "coreml", again.model, str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]


def test_image_tower_is_exported_alone_where_the_text_tower_cannot_be(
    with_class_token: str, tmp_path: Path, printed: Printed, refused: Printed
) -> None:
    out = tmp_path / "out"
    words = ("export", "coreml", with_class_token, str(out), "--tower", "image")
    assert "the authors' app needs both towers" in refused(*words, "--names", "app")
    assert "tokenizer.json" not in printed(*words)
    files = {"export.json", "golden.json", "preprocess.json", "README.md", "model_image.mlpackage"}
    assert {path.name for path in out.iterdir()} == files
    assert "texts" not in (out / "README.md").read_text().partition("```swift")[2]
    assert printed("export", "coreml", str(out), "--check").count("cosine at least 1.0000") == 1


def test_palette_is_a_minimum_of_the_squared_error() -> None:
    weights = np.random.default_rng(0).standard_normal((40, 50)).astype(np.float32)
    palette, indices = coreml._palette(weights)
    assert (palette.shape, indices.shape) == ((64,), weights.shape)
    error = np.square(palette[indices] - weights).mean()
    uniform = np.linspace(weights.min(), weights.max(), 64)[:, None]
    assert error < 0.7 * np.square(np.abs(weights.ravel() - uniform).min(0)).mean()
    nearest = np.abs(weights[..., None] - palette).argmin(-1)
    assert (indices == nearest).all()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_packages_of_mobileclip2_s0_compute_what_it_does(tmp_path: Path) -> None:
    clip = models.mobileclip2_s0()
    image = image_spec(open_clip.get_model_preprocess_cfg(clip))
    texts = open_clip.get_tokenizer("MobileCLIP2-S0")(list(PROBES))
    references = {"image": lambda rows: clip.encode_image(to_pixels(rows, image), normalize=True)}
    references["text"] = lambda rows: clip.encode_text(rows, normalize=True)
    towers = split_towers(reparameterize(clip), image, texts)
    assert coreml._app_model(towers) == "s0"
    # Random layer scales near one multiply the rounding: students that were trained for minutes stay above 0.9999.
    for tower, most in zip(towers, ((24e6, 13e6), (130e6, 66e6)), strict=True):
        program = coreml._export(tower)
        assert coreml._unsupported(program) == []
        for weights, allowed, size in zip(("fp16", "int8"), (0.9998, 0.99), most, strict=True):
            path = tmp_path / f"{tower.name}-{weights}.mlpackage"
            coreml._compress(coreml._convert(tower, program), weights).save(str(path))
            assert sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) < size
            found = compare(coreml.TARGET.load(path), references[tower.name], tower.example(6))
            assert found.minimum >= allowed, (weights, tower.name, found)
