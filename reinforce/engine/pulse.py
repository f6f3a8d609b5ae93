"""What a worker reports to the driver while its shards run: counts, and the stage of each lease."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

#: Stages of a lease. While it runs a model, its stage is the name of the layer.
READING = "reading"
DECODING = "decoding"
WRITING = "writing"
WAITING = "waiting for the accelerator"  # which the other lease of the worker uses
SERVER = "waiting for a server"  # a captioner; it bounds this time itself
PREPARING = "preparing"
#: Stages that never count as a hang.
UNLIMITED_STAGES = (WAITING, SERVER)
_STAGES_WITHOUT_MODEL = (READING, DECODING, WRITING, WAITING, SERVER, PREPARING)
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class LeasePulse:
    """The ``stage`` of the lease of a shard, for how many ``seconds`` it is in it, and ``what`` it works on."""

    shard: str
    stage: str
    seconds: float
    what: str = ""


@dataclass(frozen=True)
class Pulse:
    """A worker's counts so far.

    ``key`` is the sample that a decode process has worked on for the longest time, ``slowest`` the seconds of the
    slowest finished step by stage, and ``memory`` the bytes of memory that the worker's process uses.
    """

    samples: int = 0
    busy: float = 0.0
    key: str | None = None
    leases: tuple[LeasePulse, ...] = ()
    slowest: Mapping[str, float] = field(default_factory=dict)
    memory: int = 0


class LeaseWatch:
    """The stage of one lease. Its threads write it, and the thread that answers the driver reads it.

    The stage of the lease is that of its main thread, which created this object, or of its longest-running model.
    Entering and leaving a stage is progress. ``slowest`` receives the seconds of the slowest step by stage.
    ``read_bytes`` counts the encoded images and texts that were read, and ``seconds`` the time of the main thread by
    innermost stage.
    """

    def __init__(self, shard: str = "", slowest: dict[str, float] | None = None) -> None:
        self.shard = shard
        self._slowest = {} if slowest is None else slowest
        self.read_bytes = 0
        self.seconds: dict[str, float] = {}
        self._thread = threading.get_ident()
        # By thread: stage, what it works on, since when.
        self._at: dict[int, tuple[str, str, float]] = {self._thread: (PREPARING, "", time.monotonic())}

    @contextlib.contextmanager
    def stage(self, name: str, what: str = "") -> Iterator[None]:
        """Be in a stage, and afterwards in the one before it."""
        thread = threading.get_ident()
        before = self._at.get(thread)
        entered = time.monotonic()
        if thread == self._thread:
            self._count(entered)
        self._at[thread] = (name, what, entered)
        try:
            yield
        finally:
            left = time.monotonic()
            if thread == self._thread:
                self._count(left)
            if left - entered > self._slowest.get(name, 0.0):
                self._slowest[name] = left - entered
            if before is None:
                del self._at[thread]
            else:
                self._at[thread] = (before[0], before[1], left)

    def _count(self, now: float) -> None:
        """Add the time of the main thread to the stage that it leaves or interrupts."""
        stage, _, since = self._at[self._thread]
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - since

    def take_seconds(self) -> dict[str, float]:
        """The seconds by stage until now, at the end of the lease."""
        self._count(time.monotonic())
        return self.seconds

    def steps(self, name: str, items: Iterable[_Item]) -> Iterator[_Item]:
        """Yield ``items``; producing each is a step of the stage."""
        iterator, count = iter(items), 0
        while True:
            with self.stage(name, f"after {count:,} of its samples"):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            count += 1
            yield item

    def pulse(self, prepared_at: float, now: float) -> LeasePulse:
        """The pulse of the lease. ``prepared_at`` is when a decode process of the worker last finished an item."""
        threads = list(self._at.values())
        models = [at for at in threads if at[0] not in _STAGES_WITHOUT_MODEL]
        stage, what, since = min(models, key=lambda at: at[2]) if models else threads[0]
        return LeasePulse(self.shard, stage, now - (max(since, prepared_at) if stage == DECODING else since), what)


class WorkerWatch:
    """The leases of a worker, and the progress of its decode processes."""

    def __init__(self) -> None:
        self.slowest: dict[str, float] = {}
        self._leases: list[LeaseWatch] = []
        self._prepared = (0, time.monotonic())  # number of decoded items, and when it last changed

    @contextlib.contextmanager
    def lease(self, shard: str) -> Iterator[LeaseWatch]:
        """The watch of a lease, while it runs."""
        watch = LeaseWatch(shard, self.slowest)
        self._leases.append(watch)
        try:
            yield watch
        finally:
            self._leases.remove(watch)

    def pulses(self, prepared: int, now: float) -> tuple[LeasePulse, ...]:
        """The pulses of the leases, after ``prepared`` items were decoded."""
        if prepared != self._prepared[0]:
            self._prepared = (prepared, now)
        return tuple(watch.pulse(self._prepared[1], now) for watch in list(self._leases))


def process_memory() -> int:
    """Bytes of memory that this process uses, 0 if the system does not report it."""
    with contextlib.suppress(OSError, ValueError, IndexError), open("/proc/self/status") as file:
        for line in file:
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    return 0


def output_path() -> str:
    """The file that this process writes its errors to, or ''."""
    with contextlib.suppress(OSError):
        path = os.readlink("/proc/self/fd/2")
        return path if os.path.isfile(path) else ""
    return ""
