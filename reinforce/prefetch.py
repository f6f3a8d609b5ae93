"""An ordered map over threads that runs ahead of its consumer within bounds."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_MAX_PENDING_BYTES = 128 * 2**20

T = TypeVar("T")
R = TypeVar("R")


def prefetch(
    pool: ThreadPoolExecutor,
    function: Callable[[T], R],
    items: Iterable[T],
    window: int,
    size_of: Callable[[T], int] = lambda item: 0,
) -> Iterator[R]:
    """Yield ``function(item)`` in order, computed in threads ahead of the consumer.

    At most ``window`` items are pending, and fewer if their ``size_of``, in bytes, adds up to more than 128 MiB.
    """
    futures: deque[tuple[Future[R], int]] = deque()
    pending_bytes = 0
    try:
        for item in items:
            size = size_of(item)
            futures.append((pool.submit(function, item), size))
            pending_bytes += size
            while len(futures) > window or (pending_bytes > _MAX_PENDING_BYTES and len(futures) > 1):
                future, size = futures.popleft()
                pending_bytes -= size
                yield future.result()
        while futures:
            yield futures.popleft()[0].result()
    finally:
        for future, _ in futures:
            future.cancel()
