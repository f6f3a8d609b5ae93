"""Servers that share the requests of a captioner: which one is asked, and when one that failed is asked again.

The server with the fewest requests in flight is asked. One that fails is left alone for a while, twice as long after
each failure, and then gets a single request; its answer ends the failure. Time without an answer of any server is
bounded, and logged; by less where every server rejects what it is asked, as with a key that has expired.
"""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from teachers.protocols import ServerUnavailable

FIRST_PAUSE = 0.5  # seconds
LONGEST_PAUSE = 30.0
REJECTED_SECONDS = 60.0  # a server behind a proxy may be rejected for a moment while it starts
_CHECK_SECONDS = 1.0  # between two looks at how long the servers have been waited for
_LOG_SECONDS = 60.0  # between two lines about servers that do not answer

_log = logging.getLogger(__name__)


@dataclass
class Server:
    """A server and its ``client``. It is asked again at ``free_from`` after ``failures`` in a row.

    ``reason`` is that of the last failure; ``rejects_since`` is when the first of the rejections in a row came.
    """

    address: str
    client: Any
    in_flight: int = 0
    failures: int = 0
    free_from: float = 0.0
    reason: str = ""
    rejects_since: float | None = None


class Servers:
    """The servers of the captioner ``name``, for all threads of a worker.

    ``wait`` is the longest time in seconds without an answer of any server while some are asked; at most
    REJECTED_SECONDS count where each rejects its requests.
    """

    def __init__(self, name: str, servers: Sequence[Server], wait: float) -> None:
        self._name, self._servers, self._wait = name, servers, wait
        self._changed = threading.Condition()
        self._down_since: float | None = None  # the first failure after the last answer of any server
        self._logged = 0.0
        self.answered = False  # whether any server ever did

    @contextlib.contextmanager
    def lend(self) -> Iterator[Server]:
        """A server for one request, as soon as one may be asked. Raises ServerUnavailable after the wait."""
        server = self._take()
        try:
            yield server
        finally:
            with self._changed:
                server.in_flight -= 1
                self._changed.notify_all()

    def _take(self) -> Server:
        with self._changed:
            while True:
                now = time.monotonic()
                self._check_waited(now)
                ready = [one for one in self._servers if one.free_from <= now and not (one.failures and one.in_flight)]
                if ready:
                    server = min(ready, key=lambda one: (one.failures > 0, one.in_flight))
                    server.in_flight += 1
                    return server
                # A server that is being tried again ends its request before long, which notifies.
                times = [one.free_from - now for one in self._servers if one.free_from > now]
                self._changed.wait(min([*times, _CHECK_SECONDS]))

    def _check_waited(self, now: float) -> None:
        """Raise ServerUnavailable if the servers have been waited for long enough."""
        reasons = "; ".join(f"{one.address}: {one.reason}" if one.reason else one.address for one in self._servers)
        rejecting = [one.rejects_since for one in self._servers if one.rejects_since is not None]
        if len(rejecting) == len(self._servers) and now - max(rejecting) > min(REJECTED_SECONDS, self._wait):
            raise ServerUnavailable(
                f"every request is rejected ({reasons}). Correct the address, the model or the key, and run the same "
                "command again."
            )
        if self._down_since is not None and now - self._down_since > self._wait:
            raise ServerUnavailable(
                f"no server has answered for {now - self._down_since:.0f} s ({reasons}); `wait` allows "
                f"{self._wait:g}. Start the server and run the same command again."
            )

    def record_answer(self, server: Server) -> None:
        """Record that a server works."""
        with self._changed:
            if server.failures:
                _log.warning("captioner %s: %s answers again", self._name, server.address)
            server.failures, server.free_from, server.rejects_since = 0, 0.0, None
            self._down_since, self.answered = None, True
            self._changed.notify_all()

    def record_failure(self, server: Server, reason: str, rejected: bool = False, pause: float | None = None) -> None:
        """Record a failure; the server is asked again after ``pause`` seconds, if it names some.

        ``rejected`` is whether the server does not take this request, nor others.
        """
        with self._changed:
            now = time.monotonic()
            server.reason = reason
            server.rejects_since = (server.rejects_since or now) if rejected else None
            self._down_since = now if self._down_since is None else self._down_since
            if now < server.free_from:
                return  # a request that was under way when another one failed
            server.failures += 1
            doubled = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(server.failures - 1, 10))
            longest = doubled if pause is None else min(max(pause, doubled), 2 * LONGEST_PAUSE)
            server.free_from = now + longest * random.uniform(0.75, 1.0)  # noqa: S311
            if server.failures == 1 or now - self._logged > _LOG_SECONDS:
                self._logged = now
                _log.warning(
                    "captioner %s: %s: %s; waiting for it, %.0f of at most %g s so far",
                    *(self._name, server.address, reason, now - self._down_since, self._wait),
                )
            self._changed.notify_all()
