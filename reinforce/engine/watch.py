"""What a worker's threads are at, for whoever asks from outside whether it still gets on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Pulse:
    """A worker's counts so far; ``key`` is the sample that a thread has been at for the longest, for ``seconds``."""

    samples: int = 0
    busy: float = 0.0
    prepared: int = 0
    key: str | None = None
    seconds: float = 0.0


class WatchedThreads(ThreadPoolExecutor):
    """Threads that note at which item (by its ``key``) they are and since when.

    A thread that hangs in a decoder cannot be ended; its process can.
    """

    def __init__(self, count: int) -> None:
        super().__init__(count, thread_name_prefix="decode")
        self.finished = 0  # of interest is that it moves
        self._at: dict[int, tuple[float, str | None]] = {}

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return super().submit(self._watched, fn, *args, **kwargs)

    def _watched(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        thread = threading.get_ident()
        self._at[thread] = (time.monotonic(), getattr(args[0], "key", None) if args else None)
        try:
            return fn(*args, **kwargs)
        finally:
            del self._at[thread]
            self.finished += 1

    def longest(self) -> tuple[str | None, float]:
        """Key of the item that a thread has been at for the longest, and the seconds; (None, 0) if none is at any."""
        if not (at := [*self._at.copy().values()]):
            return None, 0.0
        began, key = min(at, key=lambda since: since[0])
        return key, time.monotonic() - began
