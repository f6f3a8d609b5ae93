"""Devices, precisions and copies; frozen layers compared with those of torch."""

from __future__ import annotations

import numpy as np
import open_clip
import pytest
import torch

from teachers.fast_paths.frozen import FrozenAttention, FrozenLinear, freeze
from teachers.runtime.accelerator import Accelerator
from tests.helpers.models.tiny_coca import coca_config


@pytest.mark.parametrize(
    ("name", "precision", "message"),
    [
        ("gpu", "fp32", "'gpu' is unknown: use auto, cpu"),
        ("cuda:64", "fp32", "not available: torch sees"),
        ("cpu", "int4", "use fp32, tf32, bf16, fp16"),
    ],
)
def test_an_unknown_device_or_precision_is_rejected(name: str, precision: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Accelerator(name, precision)  # type: ignore[arg-type]
    assert Accelerator("auto").device.type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_forward_computes_in_the_precision_and_keeps_float32_weights(precision: str, dtype: torch.dtype) -> None:
    device = Accelerator("cpu", precision)  # type: ignore[arg-type]
    module = device.prepare(torch.nn.Linear(8, 8))
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())
    with device.forward():
        out = module(torch.ones(1, 8))
    assert out.dtype == dtype
    assert out.is_inference()
    assert module.weight.dtype == torch.float32
    assert module(torch.ones(1, 8)).dtype == torch.float32, "autocast ends with the context"


def test_copies_and_marks_work_on_the_cpu() -> None:
    array = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
    frozen = array.copy()
    frozen.flags.writeable = False
    device = Accelerator("cpu")
    start = device.mark()
    for source in (array, frozen, array[:, ::-1].copy(), torch.from_numpy(array)):
        with device.copy_stream():
            tensor = device.put(source)
        device.wait_for_copies([tensor])
        assert tensor.dtype == torch.uint8
        np.testing.assert_array_equal(tensor.numpy(), np.asarray(source))
    device.synchronize()
    assert device.seconds_between(start, device.mark()) > 0
    assert device.peak_memory() > 0


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("precision", "apart"), [("fp32", 1e-5), ("bf16", 0.02), ("fp16", 0.02)])
def test_a_frozen_linear_layer_matches_torch_under_autocast(precision, apart, bias, packed):
    accelerator, plain = Accelerator("cpu", precision), torch.nn.Linear(48, 33, bias=bias)
    fixed = FrozenLinear(plain.weight, plain.bias, accelerator, packed)
    for shape in ((1, 48), (3, 7, 48), (0, 48)):
        with accelerator.forward():
            found, wanted = fixed(noise(*shape)), plain(noise(*shape))
        assert found.dtype == wanted.dtype == accelerator.dtype
        torch.testing.assert_close(found, wanted, atol=apart, rtol=apart)


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
