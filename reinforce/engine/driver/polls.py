"""Polling of workers for their pulse, in turns, with those that have not answered yet."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from typing import Generic, TypeVar

POLL_SECONDS = 5.0  # between two requests to one worker, at least
POLLS_PER_SECOND = 100.0  # of all workers, unless the limit needs more
MAX_IN_FLIGHT = 1024
_SLOW_ANSWER_SECONDS = 30.0  # requests that wait longer do not count for MAX_IN_FLIGHT
_PAUSE_SECONDS = 30.0  # a driver that did not look for so long was itself stopped

_Worker = TypeVar("_Worker", bound=Hashable)


def poll_interval(workers: int, least: float) -> float:
    """Seconds between two requests to one worker: more with many workers, a quarter of the ``least`` limit at most."""
    return max(POLL_SECONDS, min(least / 4, workers / POLLS_PER_SECOND))


class Polls(Generic[_Worker]):
    """Requests to workers for their pulse.

    The driver calls ``due`` once a tick and asks the workers that it returns. At most ``MAX_IN_FLIGHT`` requests are
    under way, not counting slow ones.
    """

    def __init__(self) -> None:
        self._turns: deque[tuple[float, _Worker]] = deque()  # time from which a worker is due
        self._known: set[_Worker] = set()
        self._asked: dict[_Worker, float] = {}  # in the order in which they were asked
        self._looked: float | None = None

    def add(self, worker: _Worker, now: float) -> None:
        self._known.add(worker)
        self._turns.append((now + POLL_SECONDS, worker))

    def remove(self, worker: _Worker) -> None:
        self._known.discard(worker)
        self._asked.pop(worker, None)

    def due(self, now: float, least: float) -> list[_Worker]:
        """The workers to ask now; ``least`` is the smallest limit of a step."""
        interval = poll_interval(len(self._known), least)
        free = MAX_IN_FLIGHT - self._quick(now)
        due: list[_Worker] = []
        while self._turns and len(due) < free and self._turns[0][0] <= now:
            _, worker = self._turns.popleft()
            if worker not in self._known:
                continue
            self._turns.append((now + interval, worker))
            if worker not in self._asked:
                self._asked[worker] = now
                due.append(worker)
        return due

    def answered(self, worker: _Worker) -> None:
        self._asked.pop(worker, None)

    def unanswered(self, now: float) -> list[tuple[_Worker, float]]:
        """Workers that were asked and have not answered, with the seconds since then, the longest first.

        Time in which the driver itself did not run does not count.
        """
        if self._looked is not None and now - self._looked > _PAUSE_SECONDS:
            self._asked = dict.fromkeys(self._asked, now)
        self._looked = now
        return [(worker, now - asked) for worker, asked in self._asked.items()]

    def _quick(self, now: float) -> int:
        """Number of requests under way that are not slow."""
        quick = 0
        for asked in reversed(self._asked.values()):
            if now - asked > _SLOW_ANSWER_SECONDS:
                break
            quick += 1
        return quick
