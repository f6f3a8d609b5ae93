"""Devices, precisions and copies; frozen layers compared with those of torch."""

from __future__ import annotations

import numpy as np
import open_clip
import pytest
import torch

from teachers.device.accelerator import Accelerator
from teachers.device.frozen import FrozenAttention, FrozenLinear, freeze
from tests.helpers.tiny_coca import coca_config


def test_auto_uses_the_cpu_without_cuda() -> None:
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert Accelerator("auto").device.type == expected


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


def test_prepared_modules_are_in_eval_mode_without_gradients() -> None:
    module = Accelerator("cpu").prepare(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout()))
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_forward_computes_in_the_precision_and_keeps_float32_weights(precision: str, dtype: torch.dtype) -> None:
    device = Accelerator("cpu", precision)  # type: ignore[arg-type]
    module = device.prepare(torch.nn.Linear(8, 8))
    with device.forward():
        out = module(torch.ones(1, 8))
    assert out.dtype == dtype
    assert out.is_inference()
    assert module.weight.dtype == torch.float32
    assert module(torch.ones(1, 8)).dtype == torch.float32, "autocast ends with the context"


def test_put_keeps_the_bytes_of_writable_and_read_only_arrays() -> None:
    array = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
    frozen = array.copy()
    frozen.flags.writeable = False
    device = Accelerator("cpu")
    for source in (array, frozen, array[:, ::-1].copy(), torch.from_numpy(array)):
        tensor = device.put(source)
        assert tensor.dtype == torch.uint8
        np.testing.assert_array_equal(tensor.numpy(), np.asarray(source))
    device.synchronize()


def test_copies_and_marks_work_on_the_cpu() -> None:
    device = Accelerator("cpu")
    start = device.mark()
    with device.copy_stream():
        tensor = device.put(np.arange(3))
    device.wait_for_copies([tensor])
    assert tensor.tolist() == [0, 1, 2]
    assert device.seconds_between(start, device.mark()) > 0
    assert device.peak_memory() > 0


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
