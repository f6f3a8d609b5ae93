"""What ``stand_in_cuda`` replaces of ``torch.cuda``, of ``torch.autocast`` and of ``torch.compile``.

Optimizers and ``clip_grad_norm_`` take the paths of a CUDA device.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.utils._foreach_utils as foreach

from tests.helpers import stand_in_streams as streams
from tests.helpers.stand_in_device import DEVICE, CudaTensor, StandIn

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
        if device_type == "cuda":
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
def replaced_runtime(cuda: StandIn) -> Iterator[None]:
    """Replace them while the context lasts."""
    _device[:] = [cuda]
    streams.Event.on_wait = staticmethod(cuda.wait)
    streams.begin()
    types = [*foreach._foreach_supported_types, CudaTensor]
    replaced = [
        *((torch.cuda, name, value) for name, value in _replacements(cuda).items()),
        (torch, "autocast", _Autocast),
        (torch.amp, "autocast", _Autocast),
        (torch, "compile", _compile(cuda)),
        (torch.nn.Module, "compile", _compile(cuda)),
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


def _compile(cuda: StandIn) -> Callable[..., Any]:
    """For functions and, as a method, for modules."""

    def compile_(function: Any, **options: Any) -> Any:
        cuda.compiled.append({"function": function, **options})
        return function

    return compile_


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
        "CUDAGraph": CUDAGraph,
        "graph": _graph,
        "manual_seed": nothing,
        "manual_seed_all": nothing,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": nothing,
        "get_rng_state_all": lambda: [torch.zeros(16, dtype=torch.uint8)],
        "set_rng_state_all": nothing,
    }
