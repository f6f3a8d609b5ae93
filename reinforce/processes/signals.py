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
import time
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
def stop_requests() -> Iterator[list[int]]:
    """The numbers of SIGINT and SIGTERM as they arrive. An exception of a handler could be lost in a call into Ray."""
    received: list[int] = []
    with handled_signals(received.append):
        yield received


class Terminated(SystemExit):
    """SIGTERM ended the program, with the exit status by which shells report it."""

    def __init__(self) -> None:
        self.status = 128 + signal.SIGTERM
        super().__init__(self.status)


@contextlib.contextmanager
def terminated_by_exception() -> Iterator[None]:
    """Raise Terminated on SIGTERM, so that what the program holds is released, where nothing handles the signal."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def terminate(signum: int, frame: FrameType | None) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


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


# -- Ending a training run early, between two steps, without losing work.

_REPEAT_SECONDS = 2.0


class Stopped(Exception):
    """A signal ended the training run after it wrote a checkpoint; the same command resumes it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum

    @property
    def status(self) -> int:
        """Exit status of a process that the signal ended."""
        return 128 + self.signum


class StopSignal:
    """A request to end the training run; ``signum`` is the requesting signal, or 0."""

    def __init__(self) -> None:
        self.signum = 0
        self._requested = 0.0
        self._interruptible = False

    def request(self, signum: int) -> None:
        """End after the current step, or raise Stopped at once inside ``interruptible``.

        A second signal more than 2 seconds later raises KeyboardInterrupt. An earlier one is ignored: torchrun
        forwards signals that its ranks have already received from the terminal.
        """
        if self.signum:
            if time.monotonic() - self._requested > _REPEAT_SECONDS:
                raise KeyboardInterrupt
            return
        self.signum, self._requested = signum, time.monotonic()
        if self._interruptible:
            raise Stopped(signum)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Mark a block in which all progress is saved, so a signal may end it at once. Raises Stopped."""
        if self.signum:
            raise Stopped(self.signum)
        self._interruptible = True
        try:
            yield
        finally:
            self._interruptible = False

    def handle_signals(self) -> contextlib.AbstractContextManager[None]:
        """Call ``request`` on SIGINT and SIGTERM, inside the main thread."""
        return handled_signals(self.request)
