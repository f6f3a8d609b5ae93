"""Writers that collect what a run has finished, and write it every few minutes."""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod

from reinforce.errors import StorageError


class PeriodicWriter(ABC):
    """Collects what ``flush`` writes: now, or by ``flush_when_due`` every few minutes."""

    seconds = 300.0

    def __init__(self) -> None:
        self._flushed = time.monotonic()

    @abstractmethod
    def flush(self) -> None:
        """Write what is new. Raises StorageError."""

    def flush_when_due(self) -> None:
        """``flush`` if the last time is long ago. After a storage error, a later call writes the same."""
        if time.monotonic() - self._flushed > self.seconds:
            self._flushed = time.monotonic()
            with contextlib.suppress(StorageError):
                self.flush()
