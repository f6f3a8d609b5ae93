"""Polling of workers for their pulse, in turns, with those that have not answered yet."""

from __future__ import annotations

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
        self._turns: dict[_Worker, float] = {}  # time from which a worker is due, in the order of their turns
        self._asked: dict[_Worker, float] = {}  # in the order in which they were asked
        self._looked: float | None = None

    def add(self, worker: _Worker, now: float) -> None:
        self._turns[worker] = now + POLL_SECONDS

    def remove(self, worker: _Worker) -> None:
        self._turns.pop(worker, None)
        self._asked.pop(worker, None)

    def due(self, now: float, least: float) -> list[_Worker]:
        """The workers to ask now; ``least`` is the smallest limit of a step."""
        interval = poll_interval(len(self._turns), least)
        free = MAX_IN_FLIGHT - sum(now - asked <= _SLOW_ANSWER_SECONDS for asked in self._asked.values())
        turns: list[_Worker] = []
        due: list[_Worker] = []
        for worker, at in self._turns.items():
            if at > now or len(due) >= free:
                break
            turns.append(worker)
            if worker not in self._asked:
                self._asked[worker] = now
                due.append(worker)
        for worker in turns:
            del self._turns[worker]  # its next turn is after those of the others
            self._turns[worker] = now + interval
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
