"""Exports of networks of images alone: no text tower, no tokenizer, no logit scale."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import transformers
import yaml
from safetensors.torch import load_file

from reinforce.student.config import Student as StudentSpec
from reinforce.student.model import build_student, export
from tests.helpers.commands import Printed
from tests.helpers.evaluation import write_colour_folder

SIDE = 32
FILES = {"README.md", "export.json", "golden.json", "image.onnx", "preprocess.json"}
CLASS = "torchvision.models:shufflenet_v2_x0_5"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """By the name on the command line: the exports of two students."""
    root: Path = tmp_path_factory.mktemp("networks")
    keys: dict[str, dict[str, Any]] = {
        "timm": {"family": "timm", "model": "test_efficientnet"},
        "class": {"class_": CLASS, "without": "fc"},
    }
    for name, one in keys.items():
        export(build_student(StudentSpec(image_size=SIDE, **one), seed=0), str(root / name))
    return {"timm": str(root / "timm"), "class": f"class:{CLASS},{root}/class"}


@pytest.mark.parametrize("name", ["timm", "class"])
def test_onnx_computes_as_the_network_on_the_sets_of_a_config(
    name: str, folders: dict[str, str], tmp_path: Path, printed: Printed
) -> None:
    parts = {part: {"images": write_colour_folder(tmp_path / part, each)} for part, each in (("train", 2), ("test", 1))}
    config = tmp_path / "sets.yaml"
    config.write_text(yaml.safe_dump({"evaluate": {"probes": {"colours": {**parts, "k": [1], "l2": []}}}}))
    out = printed("export", "onnx", folders[name], str(tmp_path / "onnx"), "--config", str(config))
    assert "probes/colours/k1/top1:" in out
    assert {path.name for path in (tmp_path / "onnx").iterdir()} == FILES
    images = np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 3), np.uint8)
    [found] = onnxruntime.InferenceSession(str(tmp_path / "onnx/image.onnx")).run(None, {"images": images})
    preprocess = json.loads((tmp_path / "onnx/preprocess.json").read_text())
    mean, std = (torch.tensor(preprocess[key]).view(3, 1, 1) for key in ("mean", "std"))
    pixels = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.no_grad():
        expected = torch.nn.functional.normalize(_plain(name, folders[name]).eval()(pixels), dim=1)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)
    assert (preprocess["dim"], preprocess["logit_scale"]) == (found.shape[1], None)
    assert "tokenizer" not in (tmp_path / "onnx/README.md").read_text()
    assert printed("export", "onnx", str(tmp_path / "onnx"), "--check").startswith("image: cosine at least 1.0")


def test_core_ml_has_the_image_tower_alone(folders: dict[str, str], tmp_path: Path, printed: Printed) -> None:
    printed("export", "coreml", folders["timm"], str(tmp_path / "coreml"))
    report = json.loads((tmp_path / "coreml/export.json").read_text())
    assert report["towers"].keys() == {"image"}
    assert report["towers"]["image"]["cosine"]["min"] > 0.999


def test_transformers_loads_the_folder_of_a_model_of_timm(folders: dict[str, str]) -> None:
    model = transformers.AutoModel.from_pretrained(folders["timm"])
    pixels = torch.rand(2, 3, SIDE, SIDE)
    with torch.no_grad():
        found = model.eval()(pixel_values=pixels).pooler_output
        torch.testing.assert_close(found, _plain("timm", folders["timm"]).eval()(pixels))


def test_what_needs_a_text_tower_is_refused(folders: dict[str, str], tmp_path: Path, refused: Printed) -> None:
    model, out = folders["timm"], str(tmp_path / "out")
    sets = ["--zero-shot", f"a={write_colour_folder(tmp_path / 'images')}"]
    assert "no text tower: compare it on sets of `probes`" in refused("export", "onnx", model, out, *sets)
    assert "of a model of timm, AutoModel loads the folder itself" in refused("export", "transformers", model, out)
    assert "a network of images without a text tower, which is needed here" in refused("export", "latency", model)
    assert not (tmp_path / "out").exists()


def _plain(name: str, folder: str) -> torch.nn.Module:
    """The network as users load it without this program."""
    if name == "timm":
        found: torch.nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True)
        return found
    from torchvision.models import shufflenet_v2_x0_5

    network: torch.nn.Module = shufflenet_v2_x0_5()
    network.fc = torch.nn.Identity()
    network.load_state_dict(load_file(f"{folder.partition(',')[2]}/model.safetensors"))
    return network
