"""Teachers of open_clip compared with the library itself."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from teachers.device.accelerator import Accelerator
from teachers.open_clip import catalog
from teachers.open_clip.teacher import OpenClipTeacher, image_spec
from teachers.registry import teacher_spec
from tests.helpers import tiny_models
from tests.helpers.tiny_models import FULL_LENGTH, TRIMMED

CPU = Accelerator("cpu")
TEXTS = ["a", "a photo of a dog on the beach", "", "so many words " * 60, "Ünïcode – 犬"]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REINFORCE_CACHE", str(tmp_path / "cache"))


def _teacher(model: str, device: Accelerator = CPU, **spec: Any) -> OpenClipTeacher:
    return OpenClipTeacher(teacher_spec(model=model, **spec), device)


def _load_open_clip(model: str) -> tuple[Any, Any]:
    return open_clip.create_model(model).eval(), open_clip.get_tokenizer(model)


@pytest.mark.parametrize("kind", [*TRIMMED, *FULL_LENGTH])
def test_embeddings_match_open_clip(models: dict[str, str], kind: str) -> None:
    teacher, (model, tokenizer) = _teacher(models[kind]), _load_open_clip(models[kind])
    size = TRIMMED.get(kind, {}).get("image_size", 32)
    pixels = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        images = model.encode_image(pixels, normalize=True)
        texts = model.encode_text(tokenizer(TEXTS), normalize=True)
    torch.testing.assert_close(teacher.encode_images(pixels), images, rtol=0, atol=1e-6)
    torch.testing.assert_close(teacher.encode_texts(TEXTS), texts, rtol=0, atol=1e-6)
    torch.testing.assert_close(teacher.encode_texts(TEXTS[:2]), texts[:2], rtol=0, atol=1e-6)
    assert teacher.dim == images.shape[1] == texts.shape[1]
    assert images.std(dim=0).max() > 0.01, "outputs depend on the inputs"
    assert texts.std(dim=0).max() > 0.01, "outputs depend on the inputs"


def test_logit_scale_defaults_to_the_models_own(models: dict[str, str]) -> None:
    assert _teacher(models["small"]).logit_scale == pytest.approx(1 / 0.07)
    assert _teacher(models["small"], logit_scale=60.0).logit_scale == 60


def test_each_model_has_its_own_preprocessing(models: dict[str, str]) -> None:
    small, large = _teacher(models["small"]).image, _teacher(models["large"]).image
    assert small is not None
    assert large is not None
    assert (small.size, small.mean) == (32, tiny_models.MEAN)
    assert (large.size, large.mean, large.std) == (48, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def test_bf16_is_close_to_fp32_and_returns_unit_norm_float32(models: dict[str, str]) -> None:
    exact, fast = _teacher(models["small"]), _teacher(models["small"], Accelerator("cpu", "bf16"))
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for one, other in (
        (exact.encode_images(pixels), fast.encode_images(pixels)),
        (exact.encode_texts(TEXTS), fast.encode_texts(TEXTS)),
    ):
        assert other.dtype == torch.float32
        assert not torch.equal(one, other)
        torch.testing.assert_close(other.norm(dim=-1), torch.ones(len(other)))
        assert (one * other).sum(dim=-1).min() > 0.99


@pytest.mark.parametrize("name", ["open_clip_pytorch_model.bin", "weights.pt"])
def test_torch_checkpoints_load_like_safetensors(models: dict[str, str], tmp_path: Path, name: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(catalog.local_folder(models["small"]), folder)
    (folder / "open_clip_model.safetensors").unlink()
    torch.save({"state_dict": _load_open_clip(models["small"])[0].state_dict()}, folder / name)
    copy = _teacher(f"local-dir:{folder}")
    assert torch.equal(copy.encode_texts(TEXTS), _teacher(models["small"]).encode_texts(TEXTS))


def test_weights_that_do_not_fit_are_rejected(models: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    shutil.copytree(catalog.local_folder(models["small"]), folder)
    shutil.copy(catalog.folder_weights(models["large"]), folder)
    with pytest.raises(ValueError, match=r"open_clip_model.safetensors do not fit local-dir:.*: \w+"):
        _teacher(f"local-dir:{folder}")
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt do not fit ViT-B-32"):
        _teacher("ViT-B-32", pretrained=str(tmp_path / "a.pt"))


def test_padding_preprocessing_is_rejected(tmp_path: Path) -> None:
    model = tiny_models.open_clip_model(tmp_path / "m", preprocess={"resize_mode": "longest"})
    with pytest.raises(ValueError, match=r"resize_mode 'longest' pads images.*shortest or squash"):
        _teacher(model)


def test_preprocessing_is_converted_as_open_clip_applies_it() -> None:
    config = {"size": [32, 48], "mean": 0.5, "std": [1, 2, 3], "interpolation": "bilinear", "resize_mode": "shortest"}
    assert image_spec(config).interpolation == "bicubic"  # open_clip always uses bicubic for crops that are not square
    assert (image_spec(config).height, image_spec(config).width) == (32, 48)
    assert image_spec({**config, "resize_mode": "squash"}).interpolation == "bilinear"
    assert image_spec({**config, "size": (48, 48)}).size == 48
    assert image_spec({**config, "size": 48, "interpolation": "random"}).interpolation == "bicubic"


def test_weights_of_the_other_activation_are_rejected_before_download() -> None:
    with pytest.raises(ValueError, match=r"trained with QuickGELU .* use model ViT-L-14-quickgelu"):
        _teacher("ViT-L-14", pretrained="dfn2b")
    with pytest.raises(ValueError, match="models with that tag: ViT-L-14"):
        _teacher("ViT-L-14-quickgelu", pretrained="dfn2b_s39b")
