"""Image teachers of timm compared with the library itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf

from teachers.image_encoder import patches_of
from teachers.registry import describe_model, load_model, teacher_spec
from teachers.timm import family
from tests.helpers.commands import json_of_process
from tests.helpers.models import tiny_models

NAME, SIDE = "test_vit", 32
PIXELS = torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
_WITHOUT_TORCH = """
import json, sys
from teachers.registry import describe_model, teacher_spec
found = describe_model("mine", teacher_spec(family="timm", model="vit_small_patch14_dinov2.lvd142m"))
loaded = sorted({"timm", "torch"} & sys.modules.keys())
import timm
from teachers.timm import family
print(json.dumps([found.images, found.texts, loaded, sorted(family._names()[0] ^ {*timm.list_models()})]))
"""


def load(**keys: Any) -> Any:
    return load_model("mine", teacher_spec(family="timm", **keys), "cpu")


def features(model: Any, pixels: torch.Tensor = PIXELS) -> torch.Tensor:
    """The pooled features of a model of timm with its classifier removed, at unit norm."""
    model.reset_classifier(0)
    with torch.no_grad():
        return torch.nn.functional.normalize(model.eval()(pixels), dim=-1)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_models.seeded(lambda: timm.create_model(NAME, num_classes=7, img_size=SIDE), 0)


@pytest.fixture(scope="module")
def file(model: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("timm") / "weights.pth"
    torch.save(model.state_dict(), path)
    return str(path)


@pytest.mark.parametrize("safe", [True, False])
def test_a_folder_gives_the_features_and_the_preprocessing_of_timm(tmp_path: Path, safe: bool) -> None:
    model = timm.create_model(NAME, img_size=SIDE)
    save_for_hf(model, str(tmp_path), model_args={"img_size": SIDE}, safe_serialization=safe)
    teacher = load(model=f"local-dir:{tmp_path}")
    torch.testing.assert_close(teacher.encode_images(PIXELS), features(model))
    config = timm.data.resolve_model_data_config(model)
    found = teacher.image
    assert (found.height, found.width) == config["input_size"][1:]
    assert (found.mean, found.std, found.interpolation) == (config["mean"], config["std"], config["interpolation"])
    assert teacher.dim == 64
    assert not hasattr(teacher, "encode_texts")
    before = describe_model("mine", teacher_spec(family="timm", model=f"local-dir:{tmp_path}")).identity
    assert before["files"].keys() == {"config.json", "model.safetensors" if safe else "pytorch_model.bin"}
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text() + " ")
    assert describe_model("mine", teacher_spec(family="timm", model=f"local-dir:{tmp_path}")).identity != before


def test_a_name_with_a_file_gives_the_features_of_its_weights_at_another_image_size(model: Any, file: str) -> None:
    options = {"num_classes": 7, "img_size": SIDE}
    teacher = load(model=NAME, pretrained=file, options=options)
    torch.testing.assert_close(teacher.encode_images(PIXELS), features(model))
    patches = patches_of(teacher, torch.device("cpu")).encode_patches(PIXELS)
    assert patches.shape == (3, 2, 2, 64)
    with torch.no_grad():
        expected = model.forward_intermediates(PIXELS, indices=1, norm=True, intermediates_only=True)
    torch.testing.assert_close(patches, expected[0].permute(0, 2, 3, 1))
    larger = load(model=NAME, pretrained=file, options={**options, "img_size": [48, 64]})
    assert larger.image.size == (48, 64)
    assert larger.encode_images(torch.rand(2, 3, 48, 64)).shape == (2, 64)


def test_weights_that_do_not_fit_are_an_error_and_never_random(model: Any, file: str, tmp_path: Path) -> None:
    state, own = model.state_dict(), {"num_classes": 7, "img_size": SIDE}
    del state["blocks.0.norm1.weight"]
    save_file(state, part := str(tmp_path / "part.safetensors"))
    for pretrained, options, message in (
        (part, own, "the weights in .* do not fit test_vit: .*Missing key.*blocks.0.norm1"),
        (file, {"img_size": SIDE}, "size mismatch for head.weight"),
        (file, {**own, "depth": 2}, "Unexpected key"),
        (str(tmp_path / "none.pt"), own, "does not exist"),
        (file, {**own, "global_pool": ""}, r"features of shape \[.*64\] .*, not one vector: set `global_pool`"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=f"teacher mine: .*{message}"):
            load(model=NAME, pretrained=pretrained, options=options)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model": "vit_smal_patch14_dinov2"}, "has no model vit_smal_patch14_dinov2; .*: vit_small_patch14_dinov2"),
        ({"model": "vit_small_patch14_dinov2.lvd"}, "no weights lvd of model .*; .*vit_small_patch14_dinov2.lvd142m"),
        ({"model": "zzzzzz"}, "timm .* has no model zzzzzz. `timm.list_models"),
        ({"model": "local-dir:absent"}, "absent/config.json does not exist"),
        ({"model": NAME, "pretrained": "absent.pt"}, "absent.pt does not exist"),
        ({"model": "s3://bucket/net"}, "use a name of timm, hf-hub:ORG/REPO or local-dir:FOLDER"),
        ({"model": NAME, "pooling": "cls"}, "pooling: used only with family transformers"),
    ],
)
def test_a_wrong_name_is_one_error_before_anything_is_loaded(keys: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        describe_model("mine", teacher_spec(family="timm", **keys))


def test_names_are_those_of_timm_and_are_found_without_it() -> None:
    assert json_of_process(_WITHOUT_TORCH) == [True, False, [], []]
    former = "vit_tiny_patch16_224_in21k"
    for name in (*timm.list_pretrained("vit_*"), *timm.list_pretrained("*siglip*"), former):
        family.check_model(name)
