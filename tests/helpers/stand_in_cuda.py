"""A stand-in for a CUDA device, for tests on a CPU.

Inside ``stand_in_cuda()``, ``Accelerator("cuda")``, ``tensor.to("cuda")`` and ``torch.zeros(3, device="cuda")`` work.
Their tensors are CPU tensors of a subclass that reports ``device.type == "cuda"``, so results are those of the CPU:

    with stand_in_cuda() as cuda:
        captioner = CocaCaptioner(spec, Accelerator("cuda"))
        with cuda.counted() as counts:
            captioner.caption(pixels, seeds)
    assert counts.synchronizations <= 20, counts

Raised, as CUDA does:

- RuntimeError where an operation mixes devices. CPU tensors of no dimension may be operands of pointwise operations,
  and CPU tensors may be indices, which is a blocking copy; TypeError by ``numpy()``.
- torch.OutOfMemoryError where the tensors that are alive exceed ``memory``, or inside ``failing_allocations``.
- RuntimeError by a synchronization or a blocking copy while a CUDA graph is captured.

Counted in a ``Counts``: kernels, copies (direction, bytes, blocking, stream), synchronizations with the place in the
code, allocations and the operations by name. A fused attention counts as one operation, though autograd decomposes it
in a training; views count as none; a replay of a graph counts as one.

``torch.cuda``'s streams, events, graphs and memory figures are replaced; see ``stand_in_runtime``. Threads that start
inside the context belong to it. Autocast follows the lists of the CPU. ``torch.compile`` returns its function as it
is and records its arguments in ``compiled``.

Not shown by a pass: that CUDA has the kernel for a data type, its rounding and its speed; memory that changes while
another stream or an asynchronous copy reads or writes it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.stand_in_device import Counts, CudaTensor, StandIn
from tests.helpers.stand_in_runtime import replaced_runtime
from tests.helpers.stand_in_streams import DEVICE

_to_copy: Any = torch.ops.aten._to_copy.default
__all__ = ["Counts", "CudaTensor", "StandIn", "stand_in_cuda"]


@contextmanager
def stand_in_cuda(memory: int = 80 * 2**30) -> Iterator[StandIn]:
    """Make one CUDA device with ``memory`` bytes available to torch in this process."""
    cuda = StandIn(memory)
    with ExitStack() as stack:
        stack.enter_context(replaced_runtime(cuda))
        stack.enter_context(_threads_included(cuda))
        overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrites)
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # `param.data = ` would keep a CPU parameter
        with _modes(cuda):
            yield cuda


@contextmanager
def _modes(cuda: StandIn) -> Iterator[None]:
    lifts = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") reaches the modes as a copy
    try:
        with _Functions(cuda), _Operations(cuda):
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(lifts)


@contextmanager
def _threads_included(cuda: StandIn) -> Iterator[None]:
    run = threading.Thread.run

    def run_inside(thread: threading.Thread) -> None:
        with _modes(cuda):
            run(thread)

    with patch.object(threading.Thread, "run", run_inside):
        yield


class _Operations(TorchDispatchMode):
    """Sees each operation of ATen."""

    def __init__(self, cuda: StandIn) -> None:
        super().__init__()
        self._cuda = cuda

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # which would import it, a second of CPU

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._cuda.operate(func, args, kwargs or {}, lambda: self)


class _Functions(TorchFunctionMode):
    """Sees the calls of torch that C++ would answer by the device of the CPU tensor."""

    def __init__(self, cuda: StandIn) -> None:
        super().__init__()
        self._cuda = cuda

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensor = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if tensor is not None and (replaced := _REPLACED.get(func)) is not None:
            return replaced(self._cuda, *args, **kwargs)
        if (device := kwargs.get("device")) is not None and torch.device(device).type == "cuda":
            kwargs = {**kwargs, "device": DEVICE}  # with its index, which C++ would ask CUDA for
        if kwargs.get("pin_memory"):
            made = func(*args, **{**kwargs, "pin_memory": False})
            self._cuda.pin(made.data_ptr(), made.nbytes, made)
            return made
        return func(*args, **kwargs)


def _to(cuda: StandIn, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if args and isinstance(args[0], torch.Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(
        *args[:3], **{name: value for name, value in kwargs.items() if name != "copy"}
    )
    there = device.type == "cuda" if device is not None else tensor.is_cuda
    if not there and not tensor.is_cuda:
        return torch.Tensor.to(tensor, *args, **kwargs)
    same = there == tensor.is_cuda and dtype in (None, tensor.dtype)
    if same and memory_format not in (None, torch.preserve_format):
        same = tensor.is_contiguous(memory_format=memory_format)
    if same and not kwargs.get("copy") and not any(args[3:4]):
        return tensor
    options = {"dtype": dtype, "non_blocking": non_blocking, "memory_format": memory_format}
    with nullcontext() if there else cuda.leaving():
        return _to_copy(tensor, device=DEVICE if there else "cpu", **options)


def _pin_memory(cuda: StandIn, tensor: torch.Tensor, *_: Any) -> torch.Tensor:
    if isinstance(tensor, CudaTensor):
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
    pinned = tensor if cuda.is_pinned(tensor) else tensor.clone()
    cuda.pin(pinned.data_ptr(), pinned.nbytes, pinned)
    return pinned


def _numpy(cuda: StandIn, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    if isinstance(tensor, CudaTensor):
        raise TypeError(
            f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory."
        )
    return torch.Tensor.numpy(tensor, *args, **kwargs)


_REPLACED: dict[Any, Any] = {
    torch.Tensor.to: _to,
    torch.Tensor.cuda: lambda cuda, tensor, device=None, non_blocking=False: _to(
        cuda, tensor, DEVICE, non_blocking=non_blocking
    ),
    torch.Tensor.cpu: lambda cuda, tensor: _to(cuda, tensor, "cpu"),
    torch.Tensor.tolist: lambda cuda, tensor: torch.Tensor.tolist(_to(cuda, tensor, "cpu")),
    torch.Tensor.pin_memory: _pin_memory,
    torch.Tensor.is_pinned: lambda cuda, tensor, *_: cuda.is_pinned(tensor),
    torch.Tensor.numpy: _numpy,
    torch.Tensor.__array__: _numpy,
    torch.Tensor.get_device: lambda cuda, tensor: tensor.device.index if tensor.is_cuda else -1,
}
