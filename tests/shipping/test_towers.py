"""Towers of an open_clip model, as they are exported."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch
from torch.nn.functional import normalize

from reinforce.shipping.towers import count_parameters, reparameterize, split_towers
from teachers.open_clip.teacher import image_spec, load_model
from teachers.spec import ModelSpec
from tests.helpers import shipping as models
from tests.helpers.tiny_coca import coca_model


def test_reparameterize_fuses_branches_and_leaves_the_model_unchanged(tmp_path: Path) -> None:
    clip = load_model(ModelSpec(model=models.fastvit(tmp_path / "model"))).eval()
    images = torch.rand(2, 3, 96, 64)
    before = clip.encode_image(images)
    fused = reparameterize(clip)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in fused.visual.trunk.stem.modules())
    assert count_parameters(fused)["image"] < count_parameters(clip)["image"]
    assert count_parameters(fused)["text"] == count_parameters(clip)["text"]
    assert torch.equal(clip.encode_image(images), before)
    torch.testing.assert_close(fused.encode_image(images), before, rtol=1e-3, atol=1e-4)
    assert fused.text is clip.text


def test_captioner_is_rejected(tmp_path: Path) -> None:
    captioner = load_model(ModelSpec(model=coca_model(tmp_path / "model")))
    with pytest.raises(ValueError, match="it is a captioner"):
        reparameterize(captioner)


def test_image_tower_takes_bytes_and_returns_unit_vectors(tmp_path: Path) -> None:
    clip = load_model(ModelSpec(model=models.vit(tmp_path / "model"))).eval()
    spec = image_spec(open_clip.get_model_preprocess_cfg(clip))
    image, text = split_towers(clip, spec, torch.ones(2, models.CONTEXT, dtype=torch.long))
    pixels = image.example(3)
    assert (pixels.shape, pixels.dtype) == ((3, spec.height, spec.width, 3), torch.uint8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))
    with torch.no_grad():
        expected = normalize(clip.encode_image((pixels.permute(0, 3, 1, 2) / 255 - mean) / std), dim=-1)
        torch.testing.assert_close(image.module(pixels), expected)
        torch.testing.assert_close(text.module(text.example(3)).norm(dim=-1), torch.ones(3))
