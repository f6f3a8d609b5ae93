"""The order in which shards use the accelerator."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import threading
from collections.abc import Iterator


class PriorityLock:
    """A lock that the oldest waiting shard gets first.

    If two shards of equal length alternated, they would also end together, and the accelerator would wait until the
    first images of the next two are decoded. So the older shard comes first, and the younger one is decoded ahead.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[tuple[int, int]] = []  # a heap of (order, ticket)
        self._tickets = itertools.count()
        self._numbers = itertools.count(1)
        self._taken = False

    def next_order(self) -> int:
        """Return the number of a shard that begins, which is above those of all older shards."""
        return next(self._numbers)

    @property
    def waiting(self) -> int:
        """Number of threads that wait."""
        return len(self._waiting)

    @contextlib.contextmanager
    def take(self, order: int) -> Iterator[None]:
        """Hold the lock. Among equal ``order``, the thread that has waited longest comes first."""
        with self._changed:
            entry = (order, next(self._tickets))
            heapq.heappush(self._waiting, entry)
            self._changed.wait_for(lambda: not self._taken and self._waiting[0] == entry)
            heapq.heappop(self._waiting)
            self._taken = True
        try:
            yield
        finally:
            with self._changed:
                self._taken = False
                self._changed.notify_all()
