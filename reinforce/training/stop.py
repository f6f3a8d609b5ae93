"""Ending a training run early, between two steps, without losing work."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from reinforce.processes.signals import handled_signals

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
