"""Grids of patches against the outputs of the libraries, computed in another way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
import transformers

from teachers.image_encoder import PatchEncoder, encoder_of_model, features_and_map, patches_of
from teachers.protocols import ImageSpec
from teachers.registry import load_model, teacher_spec
from teachers.runtime.accelerator import Accelerator
from tests.helpers.compiled_graphs import captured_graphs
from tests.helpers.models import ColorTeacher, TextOnly, named_models, tiny_models
from tests.helpers.models.patches import Cells
from tests.helpers.models.tiny_coca import coca_model

CPU = torch.device("cpu")
TEXT = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
HALF = (0.5, 0.5, 0.5)


def images(count: int, height: int = 32, width: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def load(model: str, **options: Any) -> Any:
    return load_model("tiny", teacher_spec(model=model, **options), "cpu")


def check(encoder: PatchEncoder, pixels: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare with maps [B, C, rows, columns], and the grid that was stated before."""
    found = encoder.encode_patches(pixels)
    assert (encoder.rows, encoder.columns, encoder.dim) == (expected.shape[2], expected.shape[3], expected.shape[1])
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected.permute(0, 2, 3, 1), rtol=0, atol=1e-4)
    for row in range(len(pixels)):  # each image by itself
        torch.testing.assert_close(encoder.encode_patches(pixels[row : row + 1])[0], found[row], rtol=0, atol=1e-4)


def of_tokens(tokens: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    return torch.stack([tokens[:, i] for i in range(rows * columns)], -1).reshape(len(tokens), -1, rows, columns)


def tokens_of(visual: Any, pixels: torch.Tensor) -> torch.Tensor:
    """All tokens of an open_clip transformer behind its last block."""
    found: list[torch.Tensor] = []
    hook = visual.transformer.resblocks[-1].register_forward_hook(lambda _, __, out: found.append(out))
    with torch.no_grad():
        visual(pixels)
    hook.remove()
    return found[0]


def test_a_transformer_of_open_clip_gives_its_normalised_tokens_without_the_class_token(tmp_path: Path) -> None:
    name = tiny_models.open_clip_model(tmp_path)
    visual = open_clip.create_model(name).eval().visual
    pixels = images(3)
    with torch.no_grad():
        expected = visual.ln_post(tokens_of(visual, pixels))[:, 1:]
    check(patches_of(load(name), CPU), pixels, of_tokens(expected, 4, 4))


def test_a_vector_lies_where_its_patch_lies(tmp_path: Path) -> None:
    encoder = patches_of(load(tiny_models.open_clip_model(tmp_path)), CPU)
    black = torch.zeros(1, 3, 32, 32)
    changed = black.clone()
    changed[:, :, 8:16, 24:32] = 3.0
    change = (encoder.encode_patches(changed) - encoder.encode_patches(black))[0].norm(dim=-1)
    assert divmod(int(change.argmax()), 4) == (1, 3)


def test_coca_gives_the_tokens_before_its_pooler(tmp_path: Path) -> None:
    name = coca_model(tmp_path)
    model = open_clip.create_model(name).eval()
    pixels = images(2, model.visual.image_size[0], model.visual.image_size[1])
    encoder = encoder_of_model(model, ImageSpec(pixels.shape[-1], HALF, HALF), Accelerator("cpu"))
    check(encoder, pixels, of_tokens(tokens_of(model.visual, pixels)[:, 1:], *model.visual.grid_size))


@pytest.mark.parametrize(("stage", "stride"), [(0, 4), (2, 16), (-1, 32)])
def test_stages_of_fastvit_in_open_clip_are_those_of_timm(tmp_path: Path, stage: int, stride: int) -> None:
    name = named_models.open_clip_named(tmp_path, "MobileCLIP2-S0")
    pixels = images(2, 64, 96)
    trunk = open_clip.create_model(name).eval().visual.trunk
    with torch.no_grad():
        expected = trunk.stem(pixels)
        for block in list(trunk.stages)[: stage % 4 + 1]:
            expected = block(expected)
    encoder = patches_of(load(name), CPU, stage, size=(64, 96))
    assert (encoder.rows, encoder.columns) == (64 // stride, 96 // stride)
    check(encoder, pixels, expected)


@pytest.mark.parametrize("name", ["PE-Core-T-16-384", "ViT-B-16-SigLIP2"])
def test_transformers_of_timm_give_no_prefix_tokens(tmp_path: Path, name: str) -> None:
    folder = named_models.open_clip_named(tmp_path, name)
    trunk = open_clip.create_model(folder).eval().visual.trunk
    pixels = images(2)
    with torch.no_grad():
        tokens = trunk.forward_features(pixels)[:, trunk.num_prefix_tokens :]
    check(patches_of(load(folder), CPU), pixels, of_tokens(tokens, 4, 4))


def test_a_model_of_timm_with_registers_alone() -> None:
    model: Any = timm.create_model("vit_small_patch14_reg4_dinov2", img_size=56, depth=2, num_classes=0).eval()
    pixels = images(2, 56, 56)
    with torch.no_grad():
        tokens = model.forward_features(pixels)[:, 5:]
    encoder = encoder_of_model(model, ImageSpec(56, HALF, HALF), Accelerator("cpu"))
    check(encoder, pixels, of_tokens(tokens, 4, 4))
    larger = encoder_of_model(model, ImageSpec(56, HALF, HALF), Accelerator("cpu"), size=(70, 56))
    assert (larger.rows, larger.columns, larger.dim) == (5, 4, 384)
    assert model.patch_embed.img_size == (56, 56)


def test_models_of_transformers_give_normalised_tokens_behind_their_prefix(tmp_path: Path) -> None:
    pixels = images(2)
    made = {
        "clip": (tiny_models.transformers_clip(tmp_path / "clip"), transformers.CLIPModel, 1),
        "siglip": (tiny_models.transformers_siglip(tmp_path / "siglip"), transformers.SiglipModel, 0),
        "dinov3": (named_models.dinov3(tmp_path / "dinov3"), transformers.DINOv3ViTModel, 3),
        "radio": (named_models.radio(tmp_path / "radio"), transformers.RadioModel, 0),
    }
    for name, (folder, cls, prefix) in made.items():
        model = cls.from_pretrained(folder).eval()
        with torch.no_grad():
            output = getattr(model, "vision_model", model)(pixel_values=pixels)
            tokens = output.last_hidden_state[:, prefix:]
            if name == "clip":
                tokens = model.vision_model.post_layernorm(tokens)
            if name == "radio":
                tokens = output.features
        options = {"pooling": "summary"} if name == "radio" else {}
        check(patches_of(load(folder, family="transformers", **options), CPU), pixels, of_tokens(tokens, 4, 4))


def test_dinov2_takes_images_of_another_size(tmp_path: Path) -> None:
    folder = tiny_models.transformers_dinov2(tmp_path)
    pixels = images(2, 56, 42)
    with torch.no_grad():
        tokens = transformers.AutoModel.from_pretrained(folder).eval()(pixels).last_hidden_state[:, 1:]
    encoder = patches_of(load(folder, family="transformers"), CPU, size=(56, 42))
    check(encoder, pixels, of_tokens(tokens, 4, 3))


def test_naflex_gives_the_patches_of_square_images(tmp_path: Path) -> None:
    teacher = load(named_models.naflex(tmp_path), family="transformers")
    encoder = patches_of(teacher, CPU)
    assert (encoder.rows, encoder.columns, encoder.dim) == (4, 4, 32)
    assert encoder.encode_patches(images(2)).shape == (2, 4, 4, 32)


def test_position_embeddings_are_interpolated_as_open_clip_does_when_it_loads(tmp_path: Path) -> None:
    name = tiny_models.open_clip_model(tmp_path)
    teacher = load(name)
    before = teacher.encode_images(images(2))
    larger = open_clip.create_model(name, force_image_size=48).eval().visual
    pixels = images(2, 48, 48)
    with torch.no_grad():
        expected = larger.ln_post(tokens_of(larger, pixels))[:, 1:]
    check(patches_of(teacher, CPU, size=(48, 48)), pixels, of_tokens(expected, 6, 6))
    assert teacher.encode_images(images(2)).equal(before)


def test_features_come_with_a_map_in_one_pass(tmp_path: Path) -> None:
    pixels = images(2)
    for name in (
        tiny_models.open_clip_model(tmp_path / "vit"),
        named_models.open_clip_named(tmp_path / "mci", "MobileCLIP2-S0"),
    ):
        visual = open_clip.create_model(name).eval().visual
        with torch.no_grad():
            features, grid = features_and_map(visual, pixels)
            torch.testing.assert_close(features, visual(pixels), rtol=0, atol=1e-5)
        check(patches_of(load(name), CPU), pixels, grid)


@pytest.mark.parametrize("stage", [0, 2, -1])
def test_a_resnet_of_open_clip_gives_any_stage_beside_its_own_features(stage: int) -> None:
    model = tiny_models.seeded(
        lambda: open_clip.CLIP(16, {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}, TEXT), 0
    ).eval()
    visual, pixels = model.visual, images(2, 64, 64)
    with torch.no_grad():
        expected = visual.stem(pixels)
        for layer in (visual.layer1, visual.layer2, visual.layer3, visual.layer4)[: stage % 5]:
            expected = layer(expected)
        features, grid = features_and_map(visual, pixels, stage)
        torch.testing.assert_close(features, visual(pixels))
    torch.testing.assert_close(grid, expected)
    check(encoder_of_model(model, ImageSpec(64, HALF, HALF), Accelerator("cpu"), stage), pixels, expected)
    with pytest.raises(ValueError, match=r"CLIP, stage 5 gives no patches .* 5 is out of range \(0 to 4\)"):
        encoder_of_model(model, ImageSpec(64, HALF, HALF), Accelerator("cpu"), 5)


def test_compiled_blocks_give_the_grids_of_any_batch(tmp_path: Path) -> None:
    name = tiny_models.open_clip_model(tmp_path)
    with captured_graphs() as graphs:
        plain, compiled = (patches_of(load(name, compile=value), CPU) for value in (False, True))
        for count in (1, 3):
            before = graphs.calls
            torch.testing.assert_close(
                compiled.encode_patches(images(count)), plain.encode_patches(images(count)), rtol=0, atol=1e-4
            )
            assert graphs.calls > before


class OneVector(ColorTeacher):
    def encode_patches(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.mean((2, 3))


class Changing(Cells):
    def encode_patches(self, pixels: torch.Tensor) -> torch.Tensor:
        return super().encode_patches(pixels)[:, : 1 + (len(pixels) == 1)]


def test_a_class_of_the_user_gives_its_own_patches() -> None:
    pixels = images(3, 16, 16)
    quarters = [pixels[:, :, top : top + 8, left : left + 8].mean((2, 3)) for top in (0, 8) for left in (0, 8)]
    check(patches_of(Cells(CPU), CPU), pixels, of_tokens(torch.stack(quarters, 1), 2, 2))


@pytest.mark.parametrize(
    ("teacher", "stage", "message"),
    [
        (ColorTeacher(CPU), -1, r"ColorTeacher has no patches: add a method `encode_patches\(pixels\)"),
        (TextOnly(CPU), -1, "TextOnly has no patches, since it encodes no images"),
        (OneVector(CPU), -1, r"OneVector gives no patches .*: \[1, rows, columns, dim\] is needed, got \[1, 3\]"),
        (Cells(CPU), 2, "Cells gives its own patches, of no stages: remove stage 2"),
    ],
)
def test_a_teacher_without_patches_is_refused(teacher: Any, stage: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        patches_of(teacher, CPU, stage)


def test_a_grid_that_changes_is_refused() -> None:
    encoder = patches_of(Changing(CPU), CPU)
    with pytest.raises(ValueError, match=r"Changing gives patches of shape \[3, 1, 2, 3\], not \[3, 2, 2, 3\]"):
        encoder.encode_patches(images(3, 16, 16))


def test_stages_and_images_that_a_model_does_not_have_are_refused(tmp_path: Path) -> None:
    vit, dino = load(tiny_models.open_clip_model(tmp_path / "vit")), named_models.dinov3(tmp_path / "dino")
    with pytest.raises(ValueError, match=r"CLIP, stage 7 gives no patches for images of 32 x 32 pixels: .*7"):
        patches_of(vit, CPU, 7)
    with pytest.raises(ValueError, match="no patches for images of 4 x 4 pixels"):
        patches_of(vit, CPU, size=(4, 4))
    with pytest.raises(ValueError, match="DINOv3ViTModel of transformers gives its last map alone, not stage 1"):
        patches_of(load(dino, family="transformers"), CPU, 1)
    yolos = transformers.YolosConfig(**tiny_models.VISION | {"image_size": [32, 32]}, num_detection_tokens=4)
    model = transformers.YolosModel(yolos).eval()
    with pytest.raises(
        ValueError, match=r"YolosModel gives no patches .*21 tokens, which are no grid of 4 x 4 after 1"
    ):
        encoder_of_model(model, ImageSpec(32, HALF, HALF), Accelerator("cpu"))
    with pytest.raises(ValueError, match="Linear has no patches that are known here"):
        encoder_of_model(torch.nn.Linear(2, 2), ImageSpec(32, HALF, HALF), Accelerator("cpu"))
