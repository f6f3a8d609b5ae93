"""Streams, events and counts of ``stand_in_cuda``. Work runs in the order of the program, at once or ``delayed``."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

DEVICE = torch.device("cuda", 0)


class Stream:
    """A queue that records which streams it waited for, and the storages that are kept for it."""

    device, device_index = DEVICE, 0

    def __init__(self, *_: Any, **__: Any) -> None:
        self.awaited: list[Stream] = []
        self.recorded: list[int] = []

    def wait_stream(self, stream: Stream) -> None:
        self.awaited.append(stream)


class Event:
    """A point in a stream. Its time is that of the host."""

    on_wait: Callable[[str, Event], None]
    launched: Callable[[], int]

    def __init__(self, enable_timing: bool = False) -> None:
        self.timing, self.time = enable_timing, 0.0

    def record(self, stream: Stream | None = None) -> None:
        self.time, self.stream, self.launches = time.perf_counter(), stream or current(), self.launched()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.on_wait("Event.synchronize", self)

    def elapsed_time(self, end: Event) -> float:
        if not (self.timing and end.timing):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        return (end.time - self.time) * 1000 or 1e-6


@dataclass(frozen=True)
class Copy:
    """A copy between the host and the device."""

    to_device: bool
    bytes: int
    blocking: bool
    place: str
    stream: Stream


@dataclass
class Counts:
    """What a piece of code asked the device to do."""

    operations: int = 0
    allocations: int = 0
    graph_launches: int = 0
    by_name: Counter[str] = field(default_factory=Counter)
    copies: list[Copy] = field(default_factory=list)
    waits: Counter[str] = field(default_factory=Counter)  # by reason and place
    idle: Counter[str] = field(default_factory=Counter)  # those of ``waits`` that leave the device without work

    @property
    def synchronizations(self) -> int:
        """How often the host waited for the device; blocking copies are among them."""
        return self.waits.total()

    def copies_to_device(self) -> list[Copy]:
        return [copy for copy in self.copies if copy.to_device]


_default = Stream()
_of_thread = threading.local()


def current(device: Any = None) -> Stream:
    """The current stream of this thread."""
    stream: Stream = getattr(_of_thread, "stream", _default)
    return stream


def default(device: Any = None) -> Stream:
    return _default


def begin() -> None:
    """Forget what the default stream has recorded, of another stand-in."""
    _default.awaited.clear()
    _default.recorded.clear()


@contextmanager
def use(stream: Stream | None) -> Iterator[None]:
    """Operations of this thread go to ``stream``, as ``torch.cuda.stream`` does."""
    previous = current()
    _of_thread.stream = stream or previous
    try:
        yield
    finally:
        _of_thread.stream = previous
