"""What a worker reports to the driver while its shards run: counts, and the stage of each lease."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar

from reinforce.processes.shared_memory import SharedMemory

#: Stages of a lease. While it runs a model, its stage is the name of the layer.
READING = "reading"
DECODING = "decoding"
WRITING = "writing"
WAITING = "waiting for the accelerator"  # which the other lease of the worker uses
SERVER = "waiting for a server"  # a captioner; it bounds this time itself
PREPARING = "preparing"
#: Stages that never count as a hang.
UNLIMITED_STAGES = (WAITING, SERVER)
_SHORT_STAGES = (READING, DECODING)  # entered for each sample
_STAGES_WITHOUT_MODEL = (READING, DECODING, WRITING, WAITING, SERVER, PREPARING)

_At: TypeAlias = "tuple[str, str, float]"  # stage, what it works on, since when

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
    prepared: int = 0
    key: str | None = None
    leases: tuple[LeasePulse, ...] = ()
    slowest: Mapping[str, float] = field(default_factory=dict)
    memory: int = 0


class Board:
    """The stages of the leases of a worker, in memory that other processes of its node can read.

    Code that holds the interpreter lock keeps a worker from answering, but its board can be read.
    """

    BYTES = 1024  # of an entry

    def __init__(self, entries: int) -> None:
        self._memory = SharedMemory(entries * self.BYTES)

    @property
    def descriptor(self) -> int:
        return self._memory.descriptor

    def set(self, entry: int, shard: str, stage: str, what: str) -> None:
        data = json.dumps([shard, stage, what[:150], time.monotonic()], ensure_ascii=False).encode()
        os.pwrite(self.descriptor, data[: self.BYTES].ljust(self.BYTES, b"\0"), entry * self.BYTES)

    def clear(self, entry: int) -> None:
        os.pwrite(self.descriptor, bytes(self.BYTES), entry * self.BYTES)


def read_board(pid: int, descriptor: int) -> tuple[LeasePulse, ...]:
    """The entries of the board of a process on this machine; none if it cannot be read."""
    data, found = b"", []
    with contextlib.suppress(OSError), open(f"/proc/{pid}/fd/{descriptor}", "rb") as file:
        data = file.read()
    for start in range(0, len(data), Board.BYTES):
        with contextlib.suppress(ValueError):  # an empty entry, or one that is being written
            shard, stage, what, since = json.loads(data[start : start + Board.BYTES].rstrip(b"\0"))
            found.append(LeasePulse(shard, stage, time.monotonic() - since, what))
    return tuple(found)


class LeaseWatch:
    """The stage of one lease. Its threads write it, and the thread that answers the driver reads it.

    The stage of the lease is that of its main thread, which created this object, or of its longest-running model.
    Entering and leaving a stage is progress. ``slowest`` receives the seconds of the slowest step by stage, and
    ``board`` at ``entry`` the current stage. ``read_bytes`` counts the encoded images and texts that were read, and
    ``seconds`` the time of the main thread by innermost stage.
    """

    def __init__(
        self, shard: str = "", slowest: dict[str, float] | None = None, board: Board | None = None, entry: int = 0
    ) -> None:
        self.shard = shard
        self._slowest = {} if slowest is None else slowest
        self._board, self._entry = board, entry
        self._showing = threading.Lock()  # the last write must be the latest state
        self.read_bytes = 0
        self.seconds: dict[str, float] = {}
        self._thread = threading.get_ident()
        self._at: dict[int, _At] = {self._thread: (PREPARING, "", time.monotonic())}  # by thread
        self._show(PREPARING)

    @contextlib.contextmanager
    def stage(self, name: str, what: str = "") -> Iterator[None]:
        """Be in a stage, and afterwards in the one before it."""
        thread = threading.get_ident()
        before = self._at.get(thread)
        entered = time.monotonic()
        if thread == self._thread:
            self._count(entered)
        self._at[thread] = (name, what, entered)
        self._show(name)
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
            self._show(name)

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
        stage, what, since = self._where()
        return LeasePulse(self.shard, stage, now - (max(since, prepared_at) if stage == DECODING else since), what)

    def _where(self) -> _At:
        """The stage of the longest-running model, or else of the main thread."""
        threads = list(self._at.values())
        models = [at for at in threads if at[0] not in _STAGES_WITHOUT_MODEL]
        return min(models, key=lambda at: at[2]) if models else threads[0]

    def _show(self, changed: str) -> None:
        """Write the stage of the lease to the board, after one was entered or left."""
        if self._board is None or changed in _SHORT_STAGES:
            return
        with self._showing:
            stage, what, _ = self._where()
            if stage in _SHORT_STAGES:
                stage, what = PREPARING, ""
            self._board.set(self._entry, self.shard, stage, what)


class WorkerWatch:
    """The leases of a worker, and the progress of its decode processes."""

    def __init__(self, leases: int = 2) -> None:
        self.slowest: dict[str, float] = {}
        self.board = Board(leases)
        self._leases: dict[int, LeaseWatch] = {}  # by entry of the board
        self._free = list(range(leases))
        self._prepared = (0, time.monotonic())  # number of decoded items, and when it last changed

    @contextlib.contextmanager
    def lease(self, shard: str) -> Iterator[LeaseWatch]:
        """The watch of a lease, while it runs."""
        entry = self._free.pop()
        watch = self._leases[entry] = LeaseWatch(shard, self.slowest, self.board, entry)
        try:
            yield watch
        finally:
            del self._leases[entry]
            self.board.clear(entry)
            self._free.append(entry)

    def pulses(self, prepared: int, now: float) -> tuple[LeasePulse, ...]:
        """The pulses of the leases, after ``prepared`` items were decoded."""
        if prepared != self._prepared[0]:
            self._prepared = (prepared, now)
        return tuple(watch.pulse(self._prepared[1], now) for watch in list(self._leases.values()))


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
