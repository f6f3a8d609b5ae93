"""The one place that knows where models run and in which arithmetic."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal, TypeAlias, TypeVar

import numpy as np
import torch

Precision = Literal["fp32", "bf16", "fp16"]
Module = TypeVar("Module", bound=torch.nn.Module)
Mark: TypeAlias = "float | torch.cuda.Event"

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
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def place(self, module: Module) -> Module:
        """Move a module here, convolutions channels-last on CUDA."""
        module.to(self.device)
        if self.device.type == "cuda":
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return module

    def prepare(self, module: Module, cast: bool = False) -> Module:
        """Place a module for inference: eval mode, no gradients.

        ``cast`` holds the weights in the precision itself: language models were trained so, and a step of theirs
        reads every weight for a few rows.
        """
        module.eval().requires_grad_(False)
        return module.to(self.device, _DTYPES[self.precision]) if cast else self.place(module)

    @property
    def dtype(self) -> torch.dtype:
        """What matrix products are computed in."""
        return _DTYPES[self.precision]

    def compile(self, function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """``torch.compile`` for few, static shapes; on CUDA each is captured as a graph and replayed."""
        mode = "reduce-overhead" if self.device.type == "cuda" else "default"
        return torch.compile(function, fullgraph=True, dynamic=False, mode=mode)

    def autocast(self) -> torch.autocast:
        """Run forward passes of a training inside: autocast when the precision is not fp32."""
        enabled = self.precision != "fp32"
        return torch.autocast(self.device.type, dtype=_DTYPES[self.precision] if enabled else None, enabled=enabled)

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Run forward passes of an inference inside: no autograd, autocast when the precision is not fp32."""
        with torch.inference_mode(), self.autocast():
            yield

    def layout(self, pixels: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] in the memory layout that `place` gave the convolutions."""
        return pixels.contiguous(memory_format=torch.channels_last) if self.device.type == "cuda" else pixels

    def put(self, array: np.ndarray | torch.Tensor) -> torch.Tensor:
        """Bring to the device: on CUDA by way of pinned memory and without waiting.

        On CPU an array that can be written to is shared, not copied.
        """
        tensor = torch.from_numpy(_writable(array)) if isinstance(array, np.ndarray) else array
        if self.device.type == "cuda" and tensor.device.type == "cpu":
            tensor = tensor.pin_memory()  # the allocator keeps it from reuse until the copy is done
        return tensor.to(self.device, non_blocking=True)

    @contextmanager
    def copy_stream(self) -> Iterator[None]:
        """What is put inside travels while the computation that is queued goes on; `arrived` ends the journey."""
        with torch.cuda.stream(self._copies) if self._copies else nullcontext():
            yield

    def wait_for_copies(self, tensors: Iterable[torch.Tensor]) -> None:
        """Let the computation wait for tensors that were put `beside` it."""
        if self._copies:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_stream(self._copies)
            for tensor in tensors:
                tensor.record_stream(stream)  # their memory is not reused before what is queued here is done

    def mark(self) -> Mark:
        """A moment on the device's own clock: when it gets to what is queued next."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds_between(self, start: Mark, end: Mark) -> float:
        """Seconds from one mark to another that the device has passed, such as those it was idle in between."""
        if isinstance(start, float) or isinstance(end, float):
            return end - start  # type: ignore[operator]
        return start.elapsed_time(end) / 1000

    def peak_memory(self) -> int:
        """Most bytes that tensors took on the device so far; on CPU, that the process took."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    def synchronize(self) -> None:
        """Wait until the device has done all that was queued; CPU work is done when its call returns."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _writable(array: np.ndarray) -> np.ndarray:
    # torch has no read-only tensors: arrays out of shared memory or Arrow are copied.
    return array if array.flags.writeable else array.copy()
