"""Turns at the accelerator: one user at a time, and of those who wait the oldest shard first."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import threading
from collections.abc import Iterator


class Turns:
    """A lock that goes to the lowest number among those who wait, and among equal ones to the first.

    With turns in alternation, two shards of one length would also end together, and the accelerator would wait until
    the first images of the next two are decoded. So the older shard comes first, and the younger one is decoded ahead.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[tuple[int, int]] = []  # a heap of (order, ticket)
        self._tickets = itertools.count()
        self._numbers = itertools.count(1)
        self._taken = False

    def next_order(self) -> int:
        """A number above all before, for a shard that begins."""
        return next(self._numbers)

    @property
    def waiting(self) -> int:
        """Number of those who wait."""
        return len(self._waiting)

    @contextlib.contextmanager
    def take(self, order: int) -> Iterator[None]:
        """Hold the lock."""
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
