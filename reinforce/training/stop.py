"""Ending a training early, between two steps, with nothing lost."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

_ECHO_SECONDS = 2.0


class Stopped(Exception):
    """The training was asked to end and has written a checkpoint; the same command goes on from it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum

    @property
    def status(self) -> int:
        """Exit status of a process that ended by the signal."""
        return 128 + self.signum


class Stop:
    """Remembers that the training should end; ``signum`` is the signal that asked for it, or 0."""

    def __init__(self) -> None:
        self.signum = 0
        self._asked = 0.0
        self._safe = False

    def ask(self, signum: int) -> None:
        """End after the current step, or at once where nothing can be lost. Later again: KeyboardInterrupt.

        torchrun passes a signal on that its ranks have got from the terminal already.
        """
        if self.signum:
            if time.monotonic() - self._asked > _ECHO_SECONDS:
                raise KeyboardInterrupt
            return
        self.signum, self._asked = signum, time.monotonic()
        if self._safe:
            raise Stopped(signum)

    @contextlib.contextmanager
    def safe(self) -> Iterator[None]:
        """Inside, all that was learnt is saved: a signal ends the work at once."""
        if self.signum:
            raise Stopped(self.signum)
        self._safe = True
        try:
            yield
        finally:
            self._safe = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Let SIGINT and SIGTERM ask. Does nothing outside of the main thread, which alone may."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(signum: int, frame: FrameType | None) -> None:
            self.ask(signum)

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
