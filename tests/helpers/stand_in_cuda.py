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
code, those after which the device has nothing to do until the host launches more, allocations and the operations by
name. A fused attention counts as one operation, though autograd decomposes it in a training; views count as none; a
replay of a graph counts as one.

``torch.cuda``'s streams, events, graphs and memory figures are replaced; optimizers and ``clip_grad_norm_`` take the
paths of a CUDA device. Threads that start inside the context belong to it. Autocast follows the lists of the CPU.
``torch.compile`` makes no kernels and records its arguments in ``compiled``; see ``stand_in_compiler``.

Inside ``delayed``, what is queued runs only where the host waits for it, so that memory that changes before an
asynchronous copy has read it is seen.

Not shown by a pass: that CUDA has the kernel for a data type, its rounding and its speed; memory that changes while
another stream reads or writes it; work of two streams at the same time; what torch's own C++ code copies, waits for and
compiles on a card. So `make test` has only the tests that count copies and waits; the others are in tests/gpu, which
`make test-card` runs.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.utils._foreach_utils as foreach
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from teachers.fast_paths import recompilation
from tests.helpers import stand_in_device
from tests.helpers import stand_in_streams as streams
from tests.helpers.stand_in_compiler import compiler
from tests.helpers.stand_in_device import DEVICE, Counts, CudaTensor, StandIn

optimizers: Any = sys.modules[torch.optim.Optimizer.__module__]
_group = torch._C._group_tensors_by_device_and_dtype


class CUDAGraph:
    """A graph. A capture changes no tensor; ``replay`` runs its operations on the tensors of the capture."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._tape: list[tuple[Any, Any, Any, Any]] = []

    def capture_begin(self, *_: Any, **__: Any) -> None:
        self._tape = []
        _device[0].tape = self._tape

    def capture_end(self) -> None:
        _device[0].tape = None

    def replay(self) -> None:
        _device[0].count_launch()
        _device[0].replay(self._tape)

    def pool(self) -> tuple[int, int]:
        return (0, 0)

    def reset(self) -> None:
        self._tape = []


_device: list[StandIn] = []  # of the stand_in_cuda() that is entered


@contextmanager
def _graph(graph: CUDAGraph, pool: Any = None, stream: Any = None, **_: Any) -> Iterator[None]:
    torch.cuda.synchronize()  # as torch does
    with streams.use(stream or streams.Stream()):
        graph.capture_begin()
        try:
            yield
        finally:
            graph.capture_end()


class _Autocast(torch.autocast):
    """Autocast of the CPU for the tensors of the stand-in."""

    def __init__(self, device_type: str, dtype: Any = None, enabled: bool = True, cache_enabled: Any = None) -> None:
        if device_type == DEVICE.type:
            device_type, dtype = "cpu", dtype or torch.float16
        if not enabled:
            dtype = torch.bfloat16
        super().__init__(device_type, dtype=dtype, enabled=enabled, cache_enabled=cache_enabled)


class _Generator(torch.Generator):
    """A generator of the CPU, since the operations run there."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        return super().__new__(cls, "cpu")


def _grouped(*arguments: Any) -> Any:
    """Groups of tensors by device and data type, as optimizers and clip_grad_norm_ make them."""
    return {
        (DEVICE if isinstance(lists[0][0], CudaTensor) else device, dtype): (lists, indices)
        for (device, dtype), (lists, indices) in _group(*arguments).items()
    }


@contextmanager
def _replaced_runtime(cuda: StandIn) -> Iterator[None]:
    """Replace parts of ``torch.cuda``, of ``torch.autocast``, of ``torch.compile`` and of optimizers."""
    _device[:] = [cuda]
    streams.Event.on_wait, streams.Event.launched = staticmethod(cuda.wait), staticmethod(lambda: cuda.launches)
    streams.begin()
    types = [*foreach._foreach_supported_types, CudaTensor]
    replaced = [
        *_runtime(cuda),
        (torch, "autocast", _Autocast),
        (torch.amp, "autocast", _Autocast),
        (torch, "compile", compiler(cuda.compiled, _Operations)),
        (torch.nn.Module, "compile", compiler(cuda.compiled, _Operations)),
        (recompilation, "inductor", lambda graph, inputs: graph.forward),
        (torch, "Generator", _Generator),
        (foreach, "_foreach_supported_types", types),
        (optimizers, "_foreach_supported_types", types),
        (torch._C, "_group_tensors_by_device_and_dtype", _grouped),
    ]
    with ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(patch.object(owner, name, value))
        yield
        kept = [name for owner, name, value in replaced if getattr(owner, name) is not value]
        assert not kept, f"a monkeypatch that is undone later would put the stand-in's {kept} into torch"


def _runtime(cuda: StandIn) -> list[tuple[Any, str, Any]]:
    """What is replaced of ``torch.cuda``, or of ``torch.mps``."""
    if DEVICE.type == "cuda":
        return [(torch.cuda, name, value) for name, value in _replacements(cuda).items()]
    return [
        (torch.backends.mps, "is_available", lambda: True),
        (torch.amp, "is_autocast_available", lambda device: True),
        (torch.mps, "synchronize", lambda: cuda.wait("torch.mps.synchronize")),
        (torch.mps, "empty_cache", lambda: None),
    ]


def _replacements(cuda: StandIn) -> dict[str, Any]:
    def nothing(*_: Any, **__: Any) -> None:
        return None

    def forget_peak(device: Any = None) -> None:
        cuda.peak = cuda.allocated

    def register(address: int, size: int, flags: int) -> int:
        cuda.pin(address, size)
        return 0

    total = cuda.memory
    properties = SimpleNamespace(
        name="stand-in", major=9, minor=0, total_memory=total, multi_processor_count=132, uuid="stand-in"
    )
    runtime = SimpleNamespace(cudaHostRegister=register)
    return {
        "_lazy_init": nothing,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": nothing,
        "device": lambda device: nullcontext(),
        "get_device_name": lambda device=None: properties.name,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: properties,
        "memory_allocated": lambda device=None: cuda.allocated,
        "max_memory_allocated": lambda device=None: cuda.peak,
        "reset_peak_memory_stats": forget_peak,
        "empty_cache": nothing,
        "synchronize": lambda device=None: cuda.wait("torch.cuda.synchronize"),
        "cudart": lambda: runtime,
        "Stream": streams.Stream,
        "Event": streams.Event,
        "stream": streams.use,
        "current_stream": streams.current,
        "default_stream": streams.default,
        "is_current_stream_capturing": lambda: cuda.tape is not None,
        "CUDAGraph": CUDAGraph,
        "graph": _graph,
        "manual_seed": nothing,
        "manual_seed_all": nothing,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": nothing,
        "get_rng_state_all": lambda: [torch.zeros(16, dtype=torch.uint8)],
        "set_rng_state_all": nothing,
    }


_to_copy: Any = torch.ops.aten._to_copy.default
__all__ = ["Counts", "CudaTensor", "StandIn", "stand_in_cuda", "stand_in_mps"]


@contextmanager
def stand_in_cuda(memory: int = 80 * 2**30) -> Iterator[StandIn]:
    """Make one CUDA device with ``memory`` bytes available to torch in this process."""
    cuda = StandIn(memory)
    with ExitStack() as stack:
        stack.enter_context(_replaced_runtime(cuda))
        stack.enter_context(_threads_included(cuda))
        overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrites)
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # `param.data = ` would keep a CPU parameter
        with _modes(cuda):
            yield cuda


@contextmanager
def stand_in_mps() -> Iterator[StandIn]:
    """Make a GPU of Apple available to torch in this process.

    As MPS does, it raises TypeError where a tensor of float64 would be on the device, and ``torch.cuda`` has no card.
    AssertionError by copies with ``non_blocking``: MPS may not have done them when the host uses their memory.
    Not shown by a pass: that MPS has the operations.
    """
    device = torch.device("mps", 0)
    with ExitStack() as stack:
        for module in (streams, stand_in_device, sys.modules[__name__]):
            stack.enter_context(patch.object(module, "DEVICE", device))
        yield stack.enter_context(stand_in_cuda())


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
        if (replaced := _REPLACED.get(func)) is not None and isinstance(args[0], torch.Tensor):
            return replaced(self._cuda, *args, **(kwargs or {}))
        if not kwargs:
            return func(*args)
        if (device := kwargs.get("device")) is not None and torch.device(device).type == DEVICE.type:
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
    here = isinstance(tensor, CudaTensor)
    there = device.type == DEVICE.type if device is not None else here
    if not there and not here:
        return torch.Tensor.to(tensor, *args, **kwargs)
    same = there == here and dtype in (None, tensor.dtype)
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
    torch.Tensor.get_device: lambda cuda, tensor: tensor.device.index if isinstance(tensor, CudaTensor) else -1,
}
