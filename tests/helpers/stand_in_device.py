"""The device of ``stand_in_cuda``: its tensors, its memory, its streams, and what is counted."""

from __future__ import annotations

import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch.utils._pytree import tree_map_only

from tests.helpers.stand_in_streams import DEVICE, Copy, Counts, Event, Stream, current, default

aten = torch.ops.aten
_ROOT = str(Path(__file__).parents[2])
_TO_COPY, _COPY = aten._to_copy.default, aten.copy_.default
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
_WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "unique_consecutive"}
_known: dict[int, _Facts] = {}  # by the id of an operation, whose hash takes long
_CPU_VALUES = {"fill_", "masked_fill_", "masked_fill", "where", "index_put_", "index_put"}  # and pointwise ones


class _Facts(NamedTuple):
    """What is known of an operation of ATen."""

    name: str
    composite: bool
    view: bool  # returns a view and changes nothing
    counted: bool
    mutable: bool
    pointwise: bool


class CudaTensor(torch.Tensor):
    """A CPU tensor that reports a CUDA device, or that of ``stand_in_mps``."""

    device = property(lambda self: DEVICE)  # type: ignore[assignment]
    is_cuda = property(lambda self: DEVICE.type == "cuda")  # type: ignore[assignment]
    is_mps = property(lambda self: DEVICE.type == "mps")  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl

    def record_stream(self, stream: Stream) -> None:
        """Keep the memory until what is queued on ``stream`` is done."""
        stream.recorded.append(_storage(self))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on a tensor of the stand-in outside of stand_in_cuda()")


class StandIn:
    """The state of the device: what is counted, what is pinned, how much memory is in use."""

    def __init__(self, memory: int) -> None:
        self.memory, self._allocated, self.peak = memory, 0, 0
        self.launches = 0  # of kernels and graphs
        self.tape: list[tuple[Any, Any, Any, Any]] | None = None  # of the graph that is captured
        self._queue: list[tuple[Stream, tuple[Any, Any, Any, Any]]] | None = None  # of operations that are delayed
        self._references: dict[int, ref[torch.Tensor]] = {}
        self._released: deque[tuple[int, ref[torch.Tensor]]] = deque()  # tensors whose memory is to be given back
        self._one_thread = threading.RLock()
        self.compiled: list[dict[str, Any]] = []
        self._counting: list[Counts] = []
        self._pinned: dict[int, tuple[int, Any]] = {}  # address -> (bytes, what keeps the memory)
        self._alive: Counter[int] = Counter()  # storages and the tensors that refer to them
        self._sizes: dict[int, int] = {}
        self._fail: Callable[[int], bool] | None = None
        self._leaving = False

    @contextmanager
    def counted(self) -> Iterator[Counts]:
        """Count what happens inside."""
        counts = Counts()
        self._counting.append(counts)
        try:
            yield counts
        finally:
            self._counting.remove(counts)

    @contextmanager
    def failing_allocations(self, fail: Callable[[int], bool]) -> Iterator[None]:
        """Raise torch.OutOfMemoryError for each new tensor of ``bytes`` for which ``fail(bytes)``."""
        self._fail = fail
        try:
            yield
        finally:
            self._fail = None

    @contextmanager
    def delayed(self) -> Iterator[None]:
        """Run what is queued only where the host waits for it: for an event of its stream, or for the device."""
        self._queue = []
        try:
            yield
            self._run_queued()
        finally:
            self._queue = None

    def wait(self, reason: str, event: Event | None = None) -> None:
        """Record that the host waits for the device, or for what was queued before an event."""
        if self.tape is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {reason} at {_place()}")
        for counts in self._counting:
            counts.waits[f"{reason} at {_place()}"] += 1
            if event is None or event.launches == self.launches:
                counts.idle[f"{reason} at {_place()}"] += 1
        self._run_queued(event.stream if event else None)

    def _run_queued(self, only: Stream | None = None) -> None:
        """Run delayed operations, of one stream or, since the computing stream waits for others, of all."""
        with self._one_thread:
            if self._queue is None:
                return
            queued, self._queue = self._queue, []
            for stream, operation in queued:
                if only in (None, default(), stream):
                    self._run_tape([operation])
                else:
                    self._queue.append((stream, operation))

    def pin(self, address: int, size: int, owner: Any = None) -> None:
        self._pinned[address] = (size, owner)

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        start = tensor.data_ptr()
        end = start + tensor.numel() * tensor.element_size()
        return any(first <= start and end <= first + size for first, (size, _) in self._pinned.items())

    # -- operations

    def operate(self, func: Any, args: Any, kwargs: dict[str, Any], modes: Callable[[], Any]) -> Any:
        """Run one operation of ATen, on the device if it has a tensor of it or makes one."""
        tensors = _tensors(args)
        if kwargs:
            tensors += _tensors(kwargs.values())
        on_device = [tensor for tensor in tensors if isinstance(tensor, CudaTensor)]
        wanted = self._wanted_device(kwargs["device"], on_device) if "device" in kwargs else None
        if not on_device and not wanted:
            return _run(func, args, kwargs)
        with self._one_thread:
            return self._operate(func, args, kwargs, modes, tensors, on_device, wanted)

    def _operate(self, func: Any, args: Any, kwargs: Any, modes: Any, tensors: Any, on_device: Any, wanted: Any) -> Any:
        facts = _facts(func)
        if func is _TO_COPY or func is _COPY:
            return self._copy(func, facts.name, args, kwargs, wanted)
        if facts.composite:
            with modes():
                return func.decompose(*args, **kwargs)
        if len(on_device) < len(tensors):
            _check_devices(facts, args, tensors, on_device)
        if facts.counted:
            self._count(facts.name, args)
        out = self._execute(func, args, {**kwargs, "device": "cpu"} if wanted else kwargs)
        return self._adopt(out) if wanted is not False else out

    def _wanted_device(self, device: Any, on_device: list[torch.Tensor]) -> bool | None:
        """Whether the result is to be on the device; None: as the inputs.

        C++ passes the CPU as the device of our tensors, so only ``leaving`` takes a tensor to the host.
        """
        if device is None or (on_device and torch.device(device).type == "cpu" and not self._leaving):
            return None
        return torch.device(device).type == DEVICE.type

    @contextmanager
    def leaving(self) -> Iterator[None]:
        """Tensors of the device go to the host where an operation says so."""
        self._leaving = True
        try:
            yield
        finally:
            self._leaving = False

    def count(self, name: str) -> None:
        """Count one kernel."""
        self.launches += 1
        for counts in self._counting:
            counts.operations += 1
            counts.by_name[name] += 1

    def count_launch(self) -> None:
        """Count the replay of a graph."""
        for counts in self._counting:
            counts.graph_launches += 1
        self.count("graph")

    def _count(self, name: str, args: Any) -> None:
        self.count(name)
        if name in _WAITING:
            self.wait({"_local_scalar_dense": "item"}.get(name, name))
        if name in _INDEXING:
            for index in args[1]:
                if index is None:
                    continue
                if not isinstance(index, CudaTensor):
                    self._record_copy(index, True, False)
                elif index.dtype in (torch.bool, torch.uint8):
                    self.wait("index by a mask")

    def _copy(self, func: Any, name: str, args: Any, kwargs: Any, wanted: bool | None) -> Any:
        if func is _COPY:
            target, source = args[:2]
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            blocking = False
            if isinstance(target, CudaTensor) == isinstance(source, CudaTensor):
                self.count(name)
            else:
                blocking = self._record_copy(source, isinstance(target, CudaTensor), non_blocking, target)
            return _run(func, args, kwargs) if blocking else self._execute(func, args, kwargs)
        source, on_device = args[0], isinstance(args[0], CudaTensor)
        wanted = on_device if wanted is None else wanted
        plain = {**kwargs, "device": "cpu"} if "device" in kwargs else kwargs
        blocking = False
        if on_device == wanted:
            self.count(name)
        else:
            blocking = self._record_copy(source, wanted, kwargs.get("non_blocking", False))
            plain = {**plain, "non_blocking": False}
        out = _run(func, args, plain) if blocking else self._execute(func, args, plain)
        if wanted:
            return self._adopt(out)
        if kwargs.get("non_blocking"):
            self.pin(out.data_ptr(), out.nbytes, out)  # CUDA allocates pinned memory for it
        return out

    def _record_copy(
        self, source: torch.Tensor, to_device: bool, non_blocking: bool, target: torch.Tensor | None = None
    ) -> bool:
        """Count a copy between the host and the device -> whether the host waits for it."""
        host = source if to_device else target
        pinned = non_blocking if host is None else self.is_pinned(host)
        blocking = not (non_blocking and pinned)
        if DEVICE.type == "mps" and non_blocking:
            raise AssertionError(f"a copy that MPS may not have done when it is used, at {_place()}")
        if blocking:
            self.wait("blocking copy to the device" if to_device else "blocking copy to the host")
        for counts in self._counting:
            counts.copies.append(Copy(to_device, source.nbytes, blocking, _place(), current()))
        return blocking

    def _execute(self, func: Any, args: Any, kwargs: Any) -> Any:
        if self.tape is None and self._queue is None:
            return _run(func, args, kwargs)
        # A capture runs nothing, but the shapes are needed: only what changes tensors is left out.
        out = kwargs.get("out", args[0]) if _facts(func).mutable else _shaped(func, args, kwargs)
        if self.tape is not None:
            self.tape.append((func, args, kwargs, out))
        elif self._queue is not None:
            self._queue.append((current(), (func, args, kwargs, out)))
        return out

    def replay(self, tape: list[tuple[Any, Any, Any, Any]]) -> None:
        """Run a captured graph again, into the tensors of its capture."""
        if self._queue is None:
            self._run_tape(tape)
        else:
            self._queue += [(current(), operation) for operation in tape]

    def _run_tape(self, tape: list[tuple[Any, Any, Any, Any]]) -> None:
        with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
            for func, args, kwargs, out in tape:
                if not (facts := _facts(func)).view:
                    again = func(*args, **kwargs)
                    if not facts.mutable:
                        for old, new in zip(_tensors([out]), _tensors([again]), strict=True):
                            old.copy_(new)

    # -- memory

    @property
    def allocated(self) -> int:
        self._give_back()
        return self._allocated

    def _adopt(self, out: Any) -> Any:
        """Put what an operation returned on the device."""
        if isinstance(out, (list, tuple)):
            return type(out)(map(self._adopt, out))
        if not isinstance(out, torch.Tensor) or isinstance(out, CudaTensor):
            return out
        if DEVICE.type == "mps" and out.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"Cannot convert a MPS Tensor to float64 dtype, which MPS does not have, at {_place()}")
        storage = out.untyped_storage()
        self._give_back()  # or a new storage may have the number of one that was released
        if (number := storage._cdata) not in self._alive:
            self._allocate(number, storage.nbytes())
        adopted: torch.Tensor = torch.Tensor._make_subclass(CudaTensor, out)
        self._alive[number] += 1
        reference = ref(adopted, partial(self._release, number))
        self._references[id(reference)] = reference
        return adopted

    def _allocate(self, storage: int, size: int) -> None:
        if self.allocated + size > self.memory or (self._fail is not None and self._fail(size)):
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {size} bytes; {self.allocated} of {self.memory} are in use"
            )
        self._sizes[storage] = size
        self._allocated += size
        self.peak = max(self.peak, self._allocated)
        for counts in self._counting:
            counts.allocations += 1

    def _release(self, storage: int, reference: ref[torch.Tensor]) -> None:
        """Note that a tensor is gone. Never waits: threads of gloo drop tensors while they hold their queue's lock."""
        self._released.append((storage, reference))
        if self._one_thread.acquire(blocking=False):
            try:
                self._give_back()
            finally:
                self._one_thread.release()

    def _give_back(self) -> None:
        with self._one_thread:
            while self._released:
                storage, reference = self._released.popleft()
                del self._references[id(reference)]
                self._alive[storage] -= 1
                if not self._alive[storage]:
                    del self._alive[storage]
                    self._allocated -= self._sizes.pop(storage)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    with torch._C._DisableTorchDispatch():
        return func(*args, **kwargs)


def _shaped(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operation returns, whose values may be anything: its inputs may hold indices that are to be computed."""
    try:
        return _run(func, args, kwargs)
    except IndexError:
        with torch._C._DisableTorchDispatch():
            args = tree_map_only(torch.Tensor, lambda one: torch.empty_like(one, device="meta"), args)
            found = func(*args, **kwargs)
            return tree_map_only(torch.Tensor, lambda one: torch.zeros_like(one, device="cpu"), found)


def _tensors(values: Iterable[Any]) -> list[torch.Tensor]:
    """All tensors in nested tuples and lists; quicker than by ``tree_leaves``."""
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found


def _facts(func: Any) -> _Facts:
    if (known := _known.get(id(func))) is None:
        name = func._schema.name.removeprefix("aten::")
        implicit = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
        composite = implicit and "scaled_dot_product_attention" not in name and func._can_decompose()
        aliases = [argument.alias_info for argument in func._schema.arguments if argument.alias_info is not None]
        view = bool(aliases) and not any(alias.is_write for alias in aliases)
        counted = torch.Tag.inplace_view not in func.tags and not view
        known = _Facts(name, composite, view, counted, func._schema.is_mutable, torch.Tag.pointwise in func.tags)
        _known[id(func)] = known
    return known


def _check_devices(facts: _Facts, args: Any, tensors: list[torch.Tensor], on_device: list[Any]) -> None:
    """Raise RuntimeError where CUDA does for tensors of two devices."""
    others = [tensor for tensor in tensors if not isinstance(tensor, CudaTensor)]
    if not on_device:
        return
    if facts.name in _INDEXING and isinstance(args[0], CudaTensor):
        others = [tensor for tensor in others if all(tensor is not index for index in args[1])]
    scalars = facts.pointwise or facts.name in _CPU_VALUES
    if mixed := [tensor for tensor in others if tensor.ndim or not scalars]:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in mixed)
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {DEVICE} and cpu! "
            f"{facts.name} got CPU tensors of shape {shapes} at {_place()}"
        )


def _place() -> str:
    """The file and line of this project that is running, as ``teachers/decoding/decode.py:85``."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(_ROOT) and "/stand_in_" not in path and "/.venv/" not in path:
            return f"{path[len(_ROOT) + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back
    return "unknown"
