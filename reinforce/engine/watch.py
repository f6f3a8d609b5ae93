"""Decoding threads that record what they work on, so that the driver can see whether a worker still makes progress."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Pulse:
    """A worker's counts so far. ``key`` is the sample that has been in a decoding thread for the longest time, which
    is ``seconds``."""

    samples: int = 0
    busy: float = 0.0
    prepared: int = 0
    key: str | None = None
    seconds: float = 0.0


class WatchedThreads(ThreadPoolExecutor):
    """A thread pool that records for each thread the item (by its ``key``) in work and since when.

    A thread that hangs in a decoder cannot be killed; its process can.
    """

    def __init__(self, count: int) -> None:
        super().__init__(count, thread_name_prefix="decode")
        self.finished = 0  # approximate under threads; only its changes matter
        self._current: dict[int, tuple[float, str | None]] = {}

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return super().submit(self._watched, fn, *args, **kwargs)

    def _watched(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        thread = threading.get_ident()
        self._current[thread] = (time.monotonic(), getattr(args[0], "key", None) if args else None)
        try:
            return fn(*args, **kwargs)
        finally:
            del self._current[thread]
            self.finished += 1

    def longest(self) -> tuple[str | None, float]:
        """Key of the item that has been in work for the longest time, and the seconds; (None, 0) if none is."""
        if not (current := [*self._current.copy().values()]):
            return None, 0.0
        began, key = min(current, key=lambda entry: entry[0])
        return key, time.monotonic() - began
