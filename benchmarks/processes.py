"""Processes that work while they are measured, and CPU seconds and memory of processes, from /proc (Linux)."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

_TICK = os.sysconf("SC_CLK_TCK")
_PROC = Path("/proc")
T = TypeVar("T")


def children(pid: int) -> list[int]:
    """Process ids of the children of a process."""
    return [int(path.name) for path in _PROC.glob("[0-9]*") if _stat(int(path.name))[1:2] == [str(pid)]]


def cpu_seconds(pid: int) -> float:
    """CPU seconds of a process so far, without its children; 0 if it has ended."""
    stat = _stat(pid)
    return (int(stat[11]) + int(stat[12])) / _TICK if stat else 0.0


def cpu_of_all() -> float:
    """CPU seconds of this process and of those that multiprocessing has started in it and that live."""
    below = [process.pid for process in multiprocessing.active_children()]
    return time.process_time() + sum(cpu_seconds(pid) for pid in below if pid is not None)


def in_own_process(work: Callable[..., T], *arguments: Any) -> T:
    """Run a function in a new process, whose memory and CPU are those of the function alone; return its result."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def own_peak() -> int:
    """Largest memory of this process so far, in bytes. ``ru_maxrss`` may be that of the process that started it."""
    found = re.search(r"VmHWM:\s+(\d+) kB", (_PROC / "self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


@dataclass(frozen=True)
class Memory:
    """Bytes of memory in which a page that several processes share counts in parts (PSS): ``shared`` memory such as the
    pixel cells, and everything else."""

    own: int = 0
    shared: int = 0


def memory(pid: int) -> Memory:
    """Memory of a process; 0 if it has ended."""
    with contextlib.suppress(OSError):
        text = (_PROC / f"{pid}/smaps_rollup").read_text()
        sizes = {name: 1024 * int(size) for name, size in re.findall(r"^(Pss\w*): +(\d+) kB", text, flags=re.MULTILINE)}
        shared = sizes.get("Pss_Shmem", 0)
        return Memory(sizes["Pss"] - shared, shared)
    return Memory()


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on, or none if the process has ended."""
    try:
        return (_PROC / f"{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


@dataclass
class Peak:
    """Peak memory in bytes of a process with its children. At that moment, ``parent`` is the process's own, ``child``
    the mean of its children's own, and ``shared`` the shared memory of all."""

    total: int = 0
    parent: int = 0
    child: float = 0.0
    shared: int = 0

    def look(self, pid: int, below: Sequence[int]) -> None:
        """Look at the processes, and keep what is found if it is more than before."""
        parent, *others = (memory(process) for process in (pid, *below))
        own = [other.own for other in others]
        shared = parent.shared + sum(other.shared for other in others)
        if (total := parent.own + sum(own) + shared) > self.total:
            self.total, self.parent, self.child, self.shared = total, parent.own, sum(own) / max(1, len(own)), shared


@contextlib.contextmanager
def watch_memory(pid: int, seconds: float = 0.05) -> Iterator[Peak]:
    """Record the peak memory of a process and its children, looking every ``seconds``."""
    peak, stop, below = Peak(), threading.Event(), children(pid)

    def watch() -> None:
        while not stop.wait(seconds):
            peak.look(pid, below)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


class Child:
    """A process that answers requests, one at a time. The constructor does not wait until it is ready."""

    def __init__(self, serve: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, *arguments), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def send(self, request: Any) -> None:
        self._pipe.send(request)

    def receive(self) -> Any:
        """The oldest answer; the first one says that the process is ready. Raises EOFError if the process has died."""
        return self._pipe.recv()

    def close(self) -> None:
        self._pipe.close()
        self._process.join()


class Children(contextlib.AbstractContextManager["Children"]):
    """Processes of the same kind that work at the same time."""

    def __init__(self, serve: Callable[..., None], arguments: Sequence[tuple[Any, ...]]) -> None:
        self.all = [Child(serve, *each) for each in arguments]
        self._receive()

    def run(self, requests: Sequence[Any]) -> list[Any]:
        """Send each process a request and return the answers of all."""
        for child, request in zip(self.all, requests, strict=True):
            child.send(request)
        return self._receive()

    def __exit__(self, *_: object) -> None:
        for child in self.all:
            child.close()

    def _receive(self) -> list[Any]:
        return [child.receive() for child in self.all]


def serve(pipe: Connection, answer: Callable[[Any], Any]) -> None:
    """Answer requests until the parent closes the pipe."""
    pipe.send("ready")
    with contextlib.suppress(EOFError):
        while True:
            pipe.send(answer(pipe.recv()))
