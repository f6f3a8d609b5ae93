"""The one place that knows where models run and in which arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, TypeVar

import numpy as np
import torch

Precision = Literal["fp32", "bf16", "fp16"]
Module = TypeVar("Module", bound=torch.nn.Module)

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Accelerator:
    """A device and the arithmetic of forward passes on it; the same calls serve CPU and CUDA.

    ``name`` is ``auto`` (CUDA if there is any, else CPU) or a torch device. Weights stay float32 and lower
    precisions go through autocast: norms and softmax keep float32 as in the models' own training, and any
    module fits. Casting the weights beforehand would save their conversion in each pass, which is small beside
    a large batch, but it would round the text towers' residual stream too.

    Raises ValueError if the device is unknown or not there.
    """

    def __init__(self, name: str = "auto", precision: Precision = "fp32") -> None:
        if precision not in _DTYPES:
            raise ValueError(f"precision {precision!r} is unknown: use {', '.join(_DTYPES)}")
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise ValueError(f"device {name!r} is unknown: use auto, cpu, cuda or cuda:0") from error
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"device {name!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices")
        self.device = device
        self.precision = precision

    def prepare(self, module: Module) -> Module:
        """Move a module here for inference: eval mode, no gradients, convolutions channels-last on CUDA."""
        module.eval().requires_grad_(False).to(self.device)
        if self.device.type == "cuda":
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return module

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Run forward passes inside: no autograd, autocast when the precision is not fp32."""
        enabled = self.precision != "fp32"
        dtype = _DTYPES[self.precision] if enabled else None
        with torch.inference_mode(), torch.autocast(self.device.type, dtype=dtype, enabled=enabled):
            yield

    def layout(self, pixels: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] in the memory layout that `prepare` gave the convolutions."""
        return pixels.contiguous(memory_format=torch.channels_last) if self.device.type == "cuda" else pixels

    def put(self, array: np.ndarray | torch.Tensor) -> torch.Tensor:
        """Bring to the device: on CUDA by way of pinned memory and without waiting.

        On CPU an array that can be written to is shared, not copied.
        """
        tensor = torch.from_numpy(_writable(array)) if isinstance(array, np.ndarray) else array
        if self.device.type == "cuda" and tensor.device.type == "cpu":
            tensor = tensor.pin_memory()  # the allocator keeps it from reuse until the copy is done
        return tensor.to(self.device, non_blocking=True)

    def synchronize(self) -> None:
        """Wait until the device has done all that was queued; CPU work is done when its call returns."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _writable(array: np.ndarray) -> np.ndarray:
    # torch has no read-only tensors: arrays out of shared memory or Arrow are copied.
    return array if array.flags.writeable else array.copy()
