"""Handlers of the signals that end a run or a training run."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from types import FrameType

_REPEAT_SECONDS = 2.0  # a second signal that comes earlier is one that torchrun has forwarded
#: From SIGTERM until the process ends in any case; a training run on Ray ends before: it kills its ranks after 40 s.
_TERMINATION_SECONDS = 55.0
_TERMINATED = 128 + signal.SIGTERM  # the exit status by which shells report it
_written: list[int] = []  # the file descriptor to which signals are written, inside `ends_after_sigterm`


@contextlib.contextmanager
def ends_after_sigterm(program: bool = False) -> Iterator[None]:
    """End the process with one line and status 143 if it still runs 55 seconds after a SIGTERM that it handles.

    This also ends calls that never return, in which Python runs no handler: the handler in C writes to a file
    descriptor, and a thread reads it. Only a call that holds Python's lock for good needs SIGKILL. The deadline is void
    when the block ends, but not if a ``program`` exits with status 143 there: the interpreter waits for threads. A
    nested block does nothing, nor does one outside the main thread, where Python forbids it.
    """
    if _written or threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    _written.append(writer)
    ended = threading.Event()
    threading.Thread(target=_watch, args=(reader, before, ended), name="deadline", daemon=True).start()
    exits = False
    try:
        yield
    except SystemExit as error:
        exits = program and error.code == _TERMINATED
        raise
    finally:
        if not exits:
            ended.set()
            signal.set_wakeup_fd(before)
            os.close(_written.pop())  # ends the thread


def _watch(reader: int, before: int, ended: threading.Event) -> None:
    """Wait for SIGTERM on ``reader``, and then for ``ended``; ``before`` is a descriptor that gets all signals too."""
    with open(reader, "rb", buffering=0) as signals:
        while number := signals.read(1):
            if before >= 0:
                with contextlib.suppress(OSError):
                    os.write(before, number)
            if number[0] == signal.SIGTERM:
                break
        else:
            return
        if ended.wait(_TERMINATION_SECONDS):
            return
    place = ""
    for thread in (threading.main_thread(), *threading.enumerate()):
        frame = sys._current_frames().get(thread.ident or 0)
        if (
            frame is None
            or thread.daemon
            or any(caller.f_code.co_name == "_shutdown" for caller, _ in traceback.walk_stack(frame))
        ):
            continue  # also the main thread, where it waits for the others at the end of the program
        place = f": it is in {frame.f_code.co_name} ({frame.f_code.co_filename}:{frame.f_lineno})"
        break
    line = f"ended {_TERMINATION_SECONDS:.0f} s after SIGTERM, because a call did not return{place}"
    with contextlib.suppress(OSError):  # nobody reads standard error any more
        os.write(2, f"{line}. What is stored is kept: run the same command again to resume.\n".encode())
    os._exit(_TERMINATED)


def _leave_to_parent() -> None:
    """In a forked process: write its signals no more to the pipe of its parent, whose deadline they are not."""
    if _written:
        signal.set_wakeup_fd(-1)
        os.close(_written.pop())


os.register_at_fork(after_in_child=_leave_to_parent)


@contextlib.contextmanager
def handled_signals(handle: Callable[[int], None]) -> Iterator[None]:
    """Call ``handle`` with the number of each SIGINT and SIGTERM; afterwards the earlier handlers are set again.

    If the block has not ended 55 seconds after SIGTERM, the process ends, as in `ends_after_sigterm`. Does nothing
    outside the main thread, where Python forbids it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    with ends_after_sigterm():
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, lambda signum, _: handle(signum)) for number in numbers}
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
        self.status = _TERMINATED
        super().__init__(self.status)


@contextlib.contextmanager
def terminated_by_exception() -> Iterator[None]:
    """Raise Terminated on SIGTERM, so that what the program holds is released, where nothing handles the signal.

    If the block has not ended within 55 seconds, the process ends, as in `ends_after_sigterm`.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def terminate(signum: int, frame: FrameType | None) -> None:
        raise Terminated

    with ends_after_sigterm():
        signal.signal(signal.SIGTERM, terminate)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Stopped(Exception):
    """A signal ended the training run after it wrote a checkpoint; the same command resumes it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum, self.status = signum, 128 + signum  # the exit status of a process that the signal ended


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
