"""Streams and events of ``stand_in_cuda``, and the races between streams that CUDA would not report.

Work runs at once, in the order of the program. Each stream counts its operations. A stream ``knows`` of another how
many of its operations are finished before its own next one: by waiting for it, for one of its events, or because the
host has waited. An operation that reads what another stream wrote, or writes what it read, without knowing of it, is
a race.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

DEVICE = torch.device("cuda", 0)


class Stream:
    """A queue of operations."""

    device, device_index = DEVICE, 0

    def __init__(self, *_: Any, **__: Any) -> None:
        self.count = 0
        self.known: dict[Stream, int] = {}

    def progress(self) -> dict[Stream, int]:
        """What is finished when the operations queued so far are."""
        return _later(self.known, _state.host, {self: self.count})

    def wait_stream(self, stream: Stream) -> None:
        self.known = _later(self.known, stream.progress())

    def wait_event(self, event: Event) -> None:
        self.known = _later(self.known, event.progress)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        _state.on_wait("Stream.synchronize")
        host_waits_for(self)


class Event:
    """A point in a stream. Its time is that of the host."""

    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self.timing, self.time = enable_timing, 0.0
        self.progress: dict[Stream, int] = {}

    def record(self, stream: Stream | None = None) -> None:
        self.time, self.progress = time.perf_counter(), (stream or current()).progress()

    def wait(self, stream: Stream | None = None) -> None:
        (stream or current()).wait_event(self)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        _state.on_wait("Event.synchronize")
        _state.host = _later(_state.host, self.progress)

    def elapsed_time(self, end: Event) -> float:
        if not (self.timing and end.timing):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        return (end.time - self.time) * 1000 or 1e-6


class _State:
    def __init__(self) -> None:
        self.host: dict[Stream, int] = {}  # what the host has waited for
        self.default = Stream()
        self.of_thread = threading.local()
        self.on_wait: Callable[[str], None] = lambda reason: None


_state = _State()


def start(on_wait: Callable[[str], None]) -> None:
    """Forget all streams; ``on_wait`` is called where the host waits."""
    _state.__init__()  # type: ignore[misc]
    _state.on_wait = on_wait


def current(device: Any = None) -> Stream:
    """The current stream of this thread."""
    stream: Stream = getattr(_state.of_thread, "stream", _state.default)
    return stream


def default(device: Any = None) -> Stream:
    return _state.default


@contextmanager
def use(stream: Stream | None) -> Iterator[None]:
    """Operations of this thread go to ``stream``, as ``torch.cuda.stream`` does."""
    previous = current()
    _state.of_thread.stream = stream or previous
    try:
        yield
    finally:
        _state.of_thread.stream = previous


def host_waits_for(*streams: Stream) -> None:
    """The host has waited for these streams, or for all that the device has."""
    _state.host = _later(_state.host, *(stream.progress() for stream in streams))


class Races:
    """Which stream last wrote each storage, which read it since, and where races would be."""

    def __init__(self) -> None:
        self.at_release: list[str] = []  # memory that is reused while another stream may still use it
        self._home: dict[int, Stream] = {}
        self._written: dict[int, tuple[Stream, int, str]] = {}
        self._used: dict[int, dict[Stream, tuple[int, str]]] = {}
        self._recorded: dict[int, set[Stream]] = {}
        self._streams: set[Stream] = set()

    def synchronize(self) -> None:
        host_waits_for(*self._streams)

    def allocate(self, storage: int, place: Callable[[], str]) -> None:
        """The last operation has made this storage and written to it."""
        stream = self._home[storage] = current()
        self._written[storage] = (stream, stream.count, _cheap(stream, place))

    def record(self, storage: int, stream: Stream) -> None:
        """The allocator waits for what is queued on ``stream`` before it reuses the memory (``record_stream``)."""
        self._recorded.setdefault(storage, set()).add(stream)

    def operate(self, reads: Iterable[int], writes: Iterable[int], place: Callable[[], str]) -> None:
        """An operation of the current stream. Raises RuntimeError for a race."""
        stream = current()
        stream.count += 1
        self._streams.add(stream)
        reads, writes = set(reads), set(writes)
        for storage in reads | writes:
            written = self._written.get(storage)
            if written is not None and not _is_known(stream, *written[:2]):
                raise RuntimeError(f"race: {place()} uses what another stream writes at {written[2]}, without waiting")
        for storage in writes:
            for other, (count, where) in self._used.get(storage, {}).items():
                if not _is_known(stream, other, count):
                    raise RuntimeError(f"race: {place()} writes what another stream reads at {where}, without waiting")
            self._written[storage] = (stream, stream.count, _cheap(stream, place))
        for storage in reads | writes:
            self._used.setdefault(storage, {})[stream] = (stream.count, _cheap(stream, place))

    def release(self, storage: int) -> None:
        """The memory goes back to the stream that it was allocated on."""
        home, recorded = self._home.pop(storage, None), self._recorded.pop(storage, set())
        self._written.pop(storage, None)
        for stream, (count, where) in self._used.pop(storage, {}).items():
            if home is not None and stream not in recorded and not _is_known(home, stream, count):
                self.at_release.append(f"memory used on another stream at {where} is freed without record_stream")


def _is_known(stream: Stream, other: Stream, count: int) -> bool:
    return stream is other or max(stream.known.get(other, 0), _state.host.get(other, 0)) >= count


def _cheap(stream: Stream, place: Callable[[], str]) -> str:
    return place() if stream is not _state.default else "the default stream"


def _later(*all_progress: dict[Stream, int]) -> dict[Stream, int]:
    merged: dict[Stream, int] = {}
    for progress in all_progress:
        for stream, count in progress.items():
            merged[stream] = max(count, merged.get(stream, 0))
    return merged
