"""Students of images alone: networks of timm and of classes, their exports, and what they cannot do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

import reinforce
from reinforce import settings
from reinforce.errors import UserError
from reinforce.evaluation.command import build_evaluation, evaluate_models
from reinforce.evaluation.model_names import resolve_models
from reinforce.student.config import Student as StudentSpec
from reinforce.student.config import StudentConfig
from reinforce.student.model import build_student, export
from reinforce.student.terms.features import Features
from reinforce.student.terms.registry import Terms
from reinforce.student.train import StudentTask
from teachers.protocols import ImageSpec
from tests.helpers.evaluation import write_colour_folder
from tests.helpers.models import HALF
from tests.helpers.students import IMAGE_TEACHER

SIDE = 32
PIXELS = torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
TIMM: dict[str, Any] = {"family": "timm", "model": "test_efficientnet", "image_size": SIDE}
VIT: dict[str, Any] = {"family": "timm", "model": "test_vit", "image_size": SIDE, "options": {"depth": 2}}
TORCHVISION: dict[str, Any] = {
    "class": "torchvision.models:shufflenet_v2_x0_5", "without": "fc", "image_size": SIDE,
}  # fmt: skip
OWN: dict[str, Any] = {"class": "tests.student.test_images_alone:Squares", "options": {"width": 6}}


class Squares(torch.nn.Module):
    """A network that states its preprocessing."""

    image = ImageSpec(SIDE, HALF, HALF, "bilinear")

    def __init__(self, width: int, output: str = "features") -> None:
        super().__init__()
        self.patches = torch.nn.Conv2d(3, width, 8, 8)
        self.output = output

    def forward(self, pixels: torch.Tensor) -> Any:
        maps = self.patches(pixels)
        return {"features": maps.relu().mean((2, 3)), "map": maps, "dict": {"out": maps}}[self.output]


def fails() -> torch.nn.Module:
    raise OSError("no licence")


def number() -> int:
    return 1


def built(keys: dict[str, Any], seed: int = 0) -> Any:
    spec = settings.parse(StudentSpec, keys)
    return build_student(spec, seed=seed, terms=Terms([Features(1.0, {"eyes": IMAGE_TEACHER})]))


def features(network: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = network.eval()(PIXELS)
        return found


def config_of(folder: Path, dataset: str, student: dict[str, Any], **sections: Any) -> StudentConfig:
    keys = {
        "output": str(folder / "out"), "student": student, "data": {"datasets": dataset, "workers": 0},
        "loss": {"features": "all"},
        "train": {"steps": 2, "batch": 6, "log_every": 1, "optimizer": {"warmup": 0, "hold": 9}},
    }  # fmt: skip
    return settings.parse(StudentConfig, settings.merge(keys, sections))


@pytest.mark.parametrize("keys", [TIMM, VIT, TORCHVISION, OWN])
def test_the_seed_determines_the_weights_and_every_one_learns(keys: dict[str, Any]) -> None:
    before = torch.get_rng_state()
    student, again, other = built(keys), built(keys), built(keys, 1)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in student.state_dict().items())
    assert not torch.equal(features(student.clip.network), features(other.clip.network))
    images = torch.randint(0, 256, (4, SIDE, SIDE, 3), dtype=torch.uint8)
    target = torch.nn.functional.normalize(torch.randn(4, 6), dim=1)
    encoded = student.train()({"image": images, "targets": {"eyes": {"image": target}}})
    assert encoded.features.keys() == {"image"}
    assert encoded.scalars == {}
    encoded.losses["features/image"].backward()
    assert [name for name, value in student.named_parameters() if value.grad is None] == []
    assert {student.tower_of(name) for name, _ in student.named_parameters() if "clip." in name} == {"image"}
    assert student.depths().keys() == {name for name, _ in student.named_parameters() if "clip." in name}


@pytest.mark.parametrize("keys", [TIMM, VIT])
def test_plain_timm_loads_an_export_with_its_preprocessing(keys: dict[str, Any], tmp_path: Path) -> None:
    stated = {"mean": [0.1, 0.2, 0.3], "interpolation": "bilinear"}
    student = built({**keys, "preprocess": stated})
    export(student, str(tmp_path))
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    torch.testing.assert_close(features(model), features(student.clip.network))
    found = timm.data.resolve_model_data_config(model)
    assert (found["input_size"], found["crop_pct"]) == ((3, SIDE, SIDE), 1.0)
    assert ([*found["mean"]], found["interpolation"]) == (stated["mean"], stated["interpolation"])
    names = {name.removeprefix("clip.visual.trunk.") for name in student.state_dict() if "clip." in name}
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys() == names
    again = built({"family": "timm", "model": f"local-dir:{tmp_path}"}, 1)
    assert torch.equal(features(again.clip.network), features(student.clip.network))
    assert (again.image, again.batch_norm) == (student.image, "keep"), "it starts from weights"
    file = built({**keys, "pretrained": str(tmp_path / "model.safetensors")}, 1)
    assert torch.equal(features(file.clip.network), features(student.clip.network))


def test_weights_of_a_class_are_read_with_the_module_that_is_left_out_and_without_it(tmp_path: Path) -> None:
    from torchvision.models import shufflenet_v2_x0_5

    whole = shufflenet_v2_x0_5()
    torch.save(whole.state_dict(), tmp_path / "whole.pth")
    student = built({**TORCHVISION, "pretrained": str(tmp_path / "whole.pth")})
    whole.fc = torch.nn.Identity()
    assert torch.equal(features(student.clip.network), features(whole))
    export(student, str(tmp_path / "exported"))
    whole.load_state_dict(load_file(tmp_path / "exported/model.safetensors"))
    again = built({**TORCHVISION, "pretrained": str(tmp_path / "exported/model.safetensors")})
    assert torch.equal(features(again.clip.network), features(whole))


@pytest.mark.parametrize("student", [TIMM, TORCHVISION])
def test_a_training_reads_no_caption_and_no_tokenizer_and_its_export_has_the_metrics_of_the_training(
    tmp_path: Path, dataset: str, student: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("open_clip.create_model", "open_clip.get_tokenizer", "teachers.open_clip.text.tokenizer_of"):
        monkeypatch.setattr(name, _refuse)
    monkeypatch.setattr("reinforce.student.model.tokenizer_of", _refuse)
    faces = {part: {"images": write_colour_folder(tmp_path / part, each)} for part, each in (("train", 5), ("test", 2))}
    sets = {"probes": {"colours": {**faces, "k": [1, 3]}}}
    made = config_of(tmp_path, dataset, student, evaluate=sets)
    task = StudentTask(made)
    assert task.tokenizer is None
    assert made.data.captions == "none"
    trained = reinforce.train(made)
    assert {*trained.metrics} == {*made.evaluate.metrics}
    name = str(tmp_path / "out")
    if "class" in student:
        with pytest.raises(UserError, match=rf"whose code runs.*class:torchvision\.models:shufflenet_v2_x0_5,{name}"):
            resolve_models([name], teachers=True).__enter__()
        name = f"class:{student['class']},{name}"
    evaluation = build_evaluation(None, overrides=[f"{key}={value}" for key, value in _overrides(sets)])
    with resolve_models([name], teachers=True) as specs:
        report = evaluate_models(specs, evaluation, "cpu", "fp32")
    [result] = report.as_json()["models"].values()
    assert result["metrics"] == pytest.approx(trained.metrics)
    if "class" not in student:
        with pytest.raises(UserError, match="without a text tower"), resolve_models([name]):
            pass


def test_networks_that_do_not_fit_are_refused_with_the_reason(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "other.pth")
    here = "tests.student.test_images_alone"
    refused: list[tuple[dict[str, Any], str]] = [
        ({"family": "timm", "model": "mobilenetv3_smal_100"}, "has no model .*; near names: .*mobilenetv3_small_100"),
        ({"family": "timm", "model": "local-dir:/nowhere"}, "folder /nowhere does not exist"),
        ({**TIMM, "pretrained": str(tmp_path / "other.pth")}, r"weights in .*other\.pth do not fit test_efficientnet"),
        ({"class": "nowhere:Net"}, "class nowhere:Net cannot be imported"),
        ({"class": f"{here}:SIDE"}, "is a int: name a class, or a function"),
        ({"class": f"{here}:fails"}, "cannot be built: OSError: no licence"),
        ({"class": f"{here}:number"}, "builds a int, and must build a torch.nn.Module"),
        ({"class": f"{here}:Squares"}, "missing a required argument: 'width'; its signature is"),
        ({**OWN, "options": {"width": 3, "output": "map"}}, r"gives torch.float32 \[1, 3, 4, 4\] for one image"),
        ({**OWN, "options": {"width": 3, "output": "dict"}}, r"gives a dict for images, and must give a tensor"),
        ({**OWN, "without": "fc"}, "has no module 'fc'; its modules are: patches"),
        ({**OWN, "pretrained": str(tmp_path / "other.pth")}, r"weights in .*other\.pth do not fit"),
        ({**OWN, "options": {"width": 3}, "batch_norm": "keep"}, "random weights"),
        ({**VIT, "options": {"depht": 2}}, "depht"),
    ]
    for keys, message in refused:
        with pytest.raises(UserError, match=f"student.*{message}"):
            built(keys)


def test_what_needs_texts_is_refused_by_the_config_alone(tmp_path: Path) -> None:
    folder = str(tmp_path)
    refused: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        (TIMM, {"data": {"captions": "both"}}, r"data\.captions: test_efficientnet has no text tower"),
        (OWN, {"evaluate": {"zero_shot": {"a": {"images": folder}}}}, r"zero_shot: class:.*Squares has no text"),
        (TIMM, {"evaluate": {"retrieval": {"a": {"pairs": folder}}}}, "use|evaluate it by `probes`"),
        (TIMM, {"loss": {"interactive": 1.0}}, r"loss\.interactive: test_efficientnet has no text tower"),
        (TIMM, {"loss": {"anchor": {"teacher": "a", "similarities": 1.0}}}, r"loss\.anchor\.similarities: .*no text"),
        (TIMM, {"loss": {"form": "sigmoid"}}, "there are no similarities of images with texts"),
        ({**TIMM, "freeze": ["image"]}, {}, "`freeze` is for models of open_clip"),
        ({**TIMM, "class": "a:B"}, {}, "set either `model`"),
        ({"model": "ViT-B-32", "options": {"a": 1}}, {}, "`options` belongs to `class` and to `family: timm`"),
        ({"model": "ViT-B-32", "without": "fc"}, {}, "`without` belongs to `class`"),
        ({}, {}, "set either `model`"),
    ]
    for student, sections, message in refused:
        with pytest.raises(UserError, match=message):
            config_of(tmp_path, "data", student, **sections)
    assert config_of(tmp_path, "data", {"model": "ViT-B-32"}).data.captions == "both"


def _refuse(*arguments: Any, **options: Any) -> Any:
    raise AssertionError(f"called with {arguments}")


def _overrides(sets: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for key, value in sets.items():
        found += _overrides(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return found
