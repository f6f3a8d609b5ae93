"""What ``stand_in_cuda`` replaces of ``torch.cuda``, of ``torch.autocast`` and of ``torch.compile``.

Streams run at once, in the order of the program. An event's time is that of the host.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from tests.helpers.stand_in_device import DEVICE, StandIn


class Stream:
    """A stream that has always finished."""

    device, device_index, cuda_stream = DEVICE, 0, 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.waited: list[Any] = []  # streams and events

    def wait_stream(self, stream: Stream) -> None:
        self.waited.append(stream)

    def wait_event(self, event: Event) -> None:
        self.waited.append(event)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        Runtime.cuda.wait("Stream.synchronize")


class Event:
    """An event that is reached when it is recorded."""

    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self.timing, self.time = enable_timing, 0.0

    def record(self, stream: Stream | None = None) -> None:
        self.time = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        (stream or Runtime.current).wait_event(self)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        Runtime.cuda.wait("Event.synchronize")

    def elapsed_time(self, end: Event) -> float:
        if not (self.timing and end.timing):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        return max(1e-6, (end.time - self.time) * 1000)


class CUDAGraph:
    """A graph. A capture changes no tensor; ``replay`` runs its operations on the tensors of the capture."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._tape: list[tuple[Any, Any, Any, Any]] = []

    def capture_begin(self, *_: Any, **__: Any) -> None:
        Runtime.cuda.tape = self._tape = []

    def capture_end(self) -> None:
        Runtime.cuda.tape = None

    def replay(self) -> None:
        Runtime.cuda.count_launch()
        Runtime.cuda.replay(self._tape)

    def pool(self) -> tuple[int, int]:
        return (0, 0)

    def reset(self) -> None:
        self._tape = []


class Runtime:
    """The device and the stream of this process."""

    cuda: StandIn
    default = current = Stream()


@contextmanager
def _stream(stream: Stream | None) -> Iterator[None]:
    previous = Runtime.current
    Runtime.current = stream or previous
    try:
        yield
    finally:
        Runtime.current = previous


@contextmanager
def _graph(graph: CUDAGraph, pool: Any = None, stream: Stream | None = None, **_: Any) -> Iterator[None]:
    with _stream(stream or Stream()):
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


@contextmanager
def replaced_runtime(cuda: StandIn) -> Iterator[None]:
    """Replace them while the context lasts."""
    Runtime.cuda, Runtime.current = cuda, Runtime.default
    with ExitStack() as stack:
        for name, value in _replacements(cuda).items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        stack.enter_context(patch.object(torch, "autocast", _Autocast))
        stack.enter_context(patch.object(torch.amp, "autocast", _Autocast))
        stack.enter_context(patch.object(torch, "compile", _compile(cuda)))
        yield


def _compile(cuda: StandIn) -> Callable[..., Any]:
    def compile_(function: Any = None, **options: Any) -> Any:
        if function is None:
            return lambda inner: compile_(inner, **options)
        cuda.compiled.append({"function": function, **options})
        return function

    return compile_


def _replacements(cuda: StandIn) -> dict[str, Any]:
    def nothing(*_: Any, **__: Any) -> None:
        return None

    def limit(fraction: float, device: Any = None) -> None:
        cuda.memory = int(fraction * total)

    def forget_peak(device: Any = None) -> None:
        cuda.peak = cuda.allocated

    def register(address: int, size: int, flags: int) -> int:
        cuda.pin(address, size)
        return 0

    def unregister(address: int) -> int:
        cuda.unpin(address)
        return 0

    total = cuda.memory
    properties = SimpleNamespace(
        name="stand-in", major=9, minor=0, total_memory=total, multi_processor_count=132, uuid="stand-in"
    )
    runtime = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=unregister)
    return {
        "_lazy_init": nothing,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": nothing,
        "device": lambda device: nullcontext(),
        "is_bf16_supported": lambda *_: True,
        "get_device_name": lambda device=None: properties.name,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: properties,
        "mem_get_info": lambda device=None: (cuda.memory - cuda.allocated, total),
        "memory_allocated": lambda device=None: cuda.allocated,
        "memory_reserved": lambda device=None: cuda.allocated,
        "max_memory_allocated": lambda device=None: cuda.peak,
        "max_memory_reserved": lambda device=None: cuda.peak,
        "memory_stats": lambda device=None: {"allocated_bytes.all.peak": cuda.peak},
        "reset_peak_memory_stats": forget_peak,
        "empty_cache": nothing,
        "set_per_process_memory_fraction": limit,
        "synchronize": lambda device=None: cuda.wait("torch.cuda.synchronize"),
        "cudart": lambda: runtime,
        "Stream": Stream,
        "Event": Event,
        "stream": _stream,
        "current_stream": lambda device=None: Runtime.current,
        "default_stream": lambda device=None: Runtime.default,
        "CUDAGraph": CUDAGraph,
        "graph": _graph,
        "graph_pool_handle": lambda: (0, 0),
        "is_current_stream_capturing": lambda: cuda.tape is not None,
        "manual_seed": nothing,
        "manual_seed_all": nothing,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": nothing,
        "get_rng_state_all": lambda: [torch.zeros(16, dtype=torch.uint8)],
        "set_rng_state_all": nothing,
    }
