"""An ordered map over threads or processes that runs ahead of its consumer within bounds."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Executor, Future
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def prefetch(pool: Executor, function: Callable[[T], R], items: Iterable[T], window: int) -> Generator[R, None, None]:
    """Yield ``function(item)`` in order, computed ahead of the consumer; at most ``window`` are pending."""
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
