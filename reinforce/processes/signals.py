"""Handlers of the signals that end a run or a training run, and the end of child processes whose parent has ended."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

_PR_SET_PDEATHSIG = 1


@contextlib.contextmanager
def handled_signals(handle: Callable[[int], None]) -> Iterator[None]:
    """Call ``handle`` with the number of each SIGINT and SIGTERM; afterwards the earlier handlers are set again.

    Does nothing outside the main thread, where Python forbids it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def call(signum: int, frame: FrameType | None) -> None:
        handle(signum)

    before = {number: signal.signal(number, call) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set. An exception raised by a handler could be lost inside a call into Ray."""
    stop = threading.Event()
    with handled_signals(lambda _: stop.set()):
        yield stop


def exit_with_parent() -> None:
    """Exit this process of ``multiprocessing`` when its parent has ended, also by a kill, which pools do not notice."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def wait() -> None:
        multiprocessing.connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=wait, name="exit-with-parent", daemon=True).start()


def kill_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent dies, even inside a function that hangs (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(0)


def describe_exit(status: int) -> str:
    """How a process ended, by its exit status as of ``subprocess``."""
    if status >= 0:
        return f"exit status {status}"
    with contextlib.suppress(ValueError):
        return f"signal {signal.Signals(-status).name}"
    return f"signal {-status}"
