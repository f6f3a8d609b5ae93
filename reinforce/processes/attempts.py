"""How often something that may pass later is tried, and the pauses between: for storage, servers and workers.

What runs in a run's workers is tried again by the driver's policy, by ``failures.attempts`` of the config.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
_MAX_PAUSE_SECONDS = 60.0


def pause_seconds(attempt: int) -> float:
    """Exponential back-off with jitter after ``attempt`` failures: 2^(attempt - 1) s, at most 60 s, times a random
    factor between 0.5 and 1."""
    return min(_MAX_PAUSE_SECONDS, 2.0 ** min(attempt - 1, 10)) * random.uniform(0.5, 1.0)  # noqa: S311 - not a secret


@dataclass(frozen=True)
class Attempts:
    """So many attempts, with ``pauses`` in seconds after the first failures. None begins after ``within`` seconds."""

    count: int
    pauses: tuple[float, ...] = ()
    within: float = float("inf")

    def call(
        self,
        function: Callable[[], T],
        passing: Callable[[Exception], bool] = lambda error: True,
        wait: Callable[[Exception, float], None] = lambda error, pause: time.sleep(pause),
    ) -> T:
        """What ``function`` returns. Raises its last error, or the first one that is not ``passing``.

        ``wait`` gets the error and the seconds of the pause before another attempt.
        """
        begin = time.monotonic()
        for failures in range(self.count):
            try:
                return function()
            except Exception as error:
                over = failures == self.count - 1 or time.monotonic() - begin > self.within
                if over or not passing(error):
                    raise
                wait(error, self.pauses[failures] if self.pauses else 0.0)
        raise AssertionError


#: Reads of which too few bytes arrive, and listings that the storage does not continue.
READS = Attempts(3)
#: Images at the addresses of a table.
DOWNLOADS = Attempts(2)
#: Conditional puts that meet another one.
CONDITIONAL_PUTS = Attempts(4, (0.5, 1.0, 2.0))
#: The first file that is written to an object store.
FIRST_WRITE = Attempts(3, (2.0, 8.0), within=30.0)
#: Claims that other processes remove.
CLAIMS = Attempts(5)
#: Items of a parallel map whose storage fails or whose worker dies.
MAPPED_ITEMS = Attempts(3)
#: S3 requests: botocore's attempts, with its own pauses, and s3fs's, each of which makes botocore's.
BOTOCORE_REQUESTS, S3FS_REQUESTS = Attempts(4), Attempts(3)


def prefetch(pool: Executor, function: Callable[[T], R], items: Iterable[T], window: int) -> Generator[R, None, None]:
    """Yield ``function(item)`` in order, computed in threads or processes ahead of the consumer; at most ``window`` are
    pending."""
    futures: deque[Future[R]] = deque()
    try:
        for item in items:
            futures.append(pool.submit(function, item))
            while len(futures) > window:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()
    finally:
        for future in futures:
            future.cancel()
