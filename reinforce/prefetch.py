"""Work done in threads before it is asked for, with a bound on what is kept ready."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_BYTES = 128 * 2**20

T = TypeVar("T")
R = TypeVar("R")


def prefetch(
    pool: ThreadPoolExecutor,
    function: Callable[[T], R],
    items: Iterable[T],
    window: int,
    size_of: Callable[[T], int] = lambda item: 0,
) -> Iterator[R]:
    """Map in threads, in order, ahead of the consumer: at most ``window`` items, and none beyond 128 MiB of them."""
    futures: deque[tuple[Future[R], int]] = deque()
    waiting = 0
    try:
        for item in items:
            size = size_of(item)
            futures.append((pool.submit(function, item), size))
            waiting += size
            while len(futures) > window or (waiting > _BYTES and len(futures) > 1):
                future, size = futures.popleft()
                waiting -= size
                yield future.result()
        while futures:
            yield futures.popleft()[0].result()
    finally:
        for future, _ in futures:
            future.cancel()
