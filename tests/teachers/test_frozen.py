"""Frozen layers compared with those of torch."""

import open_clip
import pytest
import torch

from teachers.device.accelerator import Accelerator
from teachers.device.frozen import FrozenAttention, FrozenLinear, freeze
from tests.helpers.tiny_coca import coca_config


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 48), (3, 7, 48), (0, 48)])
def test_a_frozen_linear_layer_matches_torch(shape, bias, packed):
    plain = torch.nn.Linear(48, 33, bias=bias)
    fixed = FrozenLinear(plain.weight, plain.bias, Accelerator("cpu"), packed)
    x = noise(*shape)
    with torch.inference_mode():
        torch.testing.assert_close(fixed(x), plain(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_lower_precision_matches_autocast(precision):
    accelerator = Accelerator("cpu", precision)
    plain, x = torch.nn.Linear(48, 33), noise(5, 48)
    with accelerator.forward():
        found, wanted = FrozenLinear(plain.weight, plain.bias, accelerator)(x), plain(x)
    assert found.dtype == wanted.dtype == accelerator.dtype
    torch.testing.assert_close(found, wanted, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 24, "vdim": 24}], ids=str)
@pytest.mark.parametrize("masked", [True, False])
def test_a_frozen_attention_matches_torch(options, masked):
    plain = torch.nn.MultiheadAttention(32, 4, batch_first=True, **options).eval()
    query, key = noise(2, 5, 32), noise(2, 6, options.get("kdim", 32), seed=1)
    mask = noise(5, 6, seed=2) if masked else None
    with torch.inference_mode():
        wanted, _ = plain(query, key, key, need_weights=False, attn_mask=mask)
        found, _ = FrozenAttention(plain, Accelerator("cpu"))(query, key, key, need_weights=False, attn_mask=mask)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pooled", [True, False])
def test_a_frozen_image_tower_gives_the_same_tokens(pooled):
    config = coca_config()["model_cfg"]
    config["vision_cfg"]["attentional_pool"] = pooled
    del config["custom_text"]
    visual = open_clip.CoCa(**config).eval().requires_grad_(False).visual
    pixels = noise(2, 3, 32, 32)
    with torch.inference_mode():
        wanted = visual(pixels)
        freeze(visual, Accelerator("cpu"))
        found = visual(pixels)
    kinds = [type(module) for module in visual.modules()]
    assert kinds.count(FrozenAttention) == (2 if pooled else 1)
    assert torch.nn.Linear not in kinds
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
