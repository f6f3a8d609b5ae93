"""Devices, precisions and copies."""

import numpy as np
import pytest
import torch

from teachers.device.accelerator import Accelerator


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
