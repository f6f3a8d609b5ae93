"""Handlers of the signals that end a run or a training run, and the end of child processes whose parent has ended."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


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
