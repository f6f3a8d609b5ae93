"""The position of each rank, in the store of the process group, so that errors name the rank that others wait for.

A collective that times out, of NCCL as of gloo, does not say which rank is missing. Therefore each rank counts the
places that it passes, which are the same on all ranks, and writes the last one to the store every few seconds, from a
thread. A rank that stays at one place while another is behind logs which one it waits for. If that lasts for the time
limit of collectives, the collective raises or NCCL ends the process; a wait without a collective ends here.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from types import FrameType

import torch.distributed as dist

from reinforce.terminal import Screen

#: Longest wait for the slowest rank in a step. It must exceed compiling, a stalled storage, and a slow first batch.
TIMEOUT = timedelta(hours=1)
_INTERVAL = 10.0  # seconds between two messages to the store
_FIRST_WARNING = 300.0  # seconds; then whenever the time has doubled
_NAMED = 5  # ranks that a message describes
_GRACE = 120.0  # seconds after the time limit in which a collective raises by itself
_COLLECTIVE_ERROR = re.compile(r"Timed out waiting|[Cc]onnection (closed|reset) by peer|[Gg]loo|NCCL|Broken pipe")
_LIBRARIES = re.compile(r"/torch/|/lib/python3\.\d+/(?!site-packages)")  # torch and Python's own modules
_COLLECTIVES = re.compile(r"/torch/(distributed|autograd)/")


class AbsentRanks(RuntimeError):
    """Some ranks did not reach the collective in which the others wait. The message names them and where they are."""


@dataclass(frozen=True)
class RankPlace:
    """Where a rank is in its training run.

    ``count`` numbers the places of a rank, ``what`` names the place, ``since`` is when it was reached, ``frame`` the
    line of code, and ``waits`` whether the rank waits for others there. ``written`` is the time of this message,
    ``ended`` the error that ended the rank.
    """

    count: int
    what: str
    since: float
    frame: str
    waits: bool
    host: str
    pid: int
    written: float
    ended: str = ""


class RankWatch:
    """Writes this rank's place to a store, reads those of others, and reports whom it waits for."""

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        size: int,
        timeout: timedelta = TIMEOUT,
        report: Callable[[str], None] | None = None,
        interval: float | None = None,
        end_process: Callable[[int], None] = os._exit,
    ) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._limit, self._report = timeout.total_seconds(), report or Screen().log
        self._interval = min(_INTERVAL, self._limit / 5) if interval is None else interval
        self._end_process = end_process
        self._thread_id = threading.get_ident()
        self._silence = 3 * self._interval + 5  # seconds after which a rank that writes nothing counts as lost
        self._at = (0, "the start", time.time(), False)
        self._due = self._first = min(_FIRST_WARNING, self._limit / 2)  # seconds until the next report
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="rank watch")
        self._thread.start()

    def at(self, what: str, waits: bool = False) -> None:
        """Record that the rank is at ``what``, where it may wait for others; every rank calls this equally often."""
        self._at, self._due = (self._at[0] + 1, what, time.time(), waits), self._first

    def close(self, error: BaseException | None = None) -> None:
        """End the thread. ``error`` is what ended the rank."""
        self._closed.set()
        self._thread.join(2 * self._interval)
        with contextlib.suppress(RuntimeError, OSError):  # rank 0 may be gone
            if error is not None:
                self._write(f"{type(error).__name__}: {error}"[:300])

    def explain(self, error: BaseException) -> AbsentRanks | None:
        """The error that names the absent ranks, for one of a collective."""
        if not isinstance(error, RuntimeError) or not _COLLECTIVE_ERROR.search(str(error)):
            return None
        return AbsentRanks(f"{self.describe()} The error of rank {self._rank} is: {str(error).splitlines()[0][:300]}")

    def describe(self) -> str:
        """The ranks that this one waits for, and where to look."""
        try:
            places = self._read()
        except (RuntimeError, OSError):
            return (
                f"rank {self._rank} waits at {self._at[1]}, and rank 0, which keeps the list of places, cannot be "
                "reached: its process has ended or its machine is lost. See its log."
            )
        absent = absent_ranks(places, self._rank, self._size, self._silence)
        if not absent:
            return (
                f"all {self._size} ranks have arrived at {self._at[1]}, so the likely cause is the network between "
                "them: run again with NCCL_DEBUG=INFO, and check NCCL_SOCKET_IFNAME and the firewalls of the machines."
            )
        names = ", ".join(map(str, absent[:_NAMED])) + (f" and {len(absent) - _NAMED} more" * (len(absent) > _NAMED))
        lines = [describe_rank(rank, places.get(rank), self._silence) for rank in absent[:_NAMED]]
        return f"rank {self._rank} waits at {self._at[1]} for rank {names}. {' '.join(lines)}"

    def _watch(self) -> None:
        while not self._closed.wait(self._interval):
            with contextlib.suppress(RuntimeError, OSError):  # rank 0 may be gone
                self._write()
                self._report_wait(time.time() - self._at[2])

    def _report_wait(self, waited: float) -> None:
        """Log whom this rank waits for; end the process if that has lasted for the time limit."""
        due = self._due
        if waited < due:
            return
        self._due = next_report(waited, self._first, self._limit + _GRACE)
        if not any(place.count < self._at[0] for place in self._read().values()):
            return
        over = waited >= self._limit + _GRACE
        if over or self._store.add(f"reports/{self._at[0]}/{due:.2f}", 1) == 1:
            self._report(f"{self.describe()} It has waited for {waited:,.0f} s.")
        if over:
            self._end_process(1)  # the waiting thread is in a library that does not return

    def _write(self, ended: str = "") -> None:
        count, what, since, waits = self._at
        frame, collective = _frame_of(sys._current_frames().get(self._thread_id))
        host, pid = socket.gethostname(), os.getpid()
        place = RankPlace(count, what, since, frame, waits or collective, host, pid, time.time(), ended)
        self._store.set(f"places/{self._rank}", json.dumps(asdict(place)))

    def _read(self) -> dict[int, RankPlace]:
        """The places of the other ranks that have written one, and this one's own."""
        self._write()
        found = {}
        for rank in range(self._size):
            if self._store.check([f"places/{rank}"]):
                found[rank] = RankPlace(**json.loads(self._store.get(f"places/{rank}")))
        return found


def next_report(waited: float, first: float, limit: float) -> float:
    """Seconds of waiting at which the next report is due, after one at ``waited``; the same on all ranks.

    Reports are due at ``first``, at twice that, and so on up to ``limit``; after it, every ``first`` seconds.
    """
    if waited >= limit:
        return waited + first
    due = first
    while due <= waited:
        due *= 2
    return min(due, limit)


def absent_ranks(places: dict[int, RankPlace], own: int, size: int, silence: float) -> list[int]:
    """The ranks that have not arrived at the place of rank ``own``.

    They are the ranks behind it; if there are none, those that have ended or have written nothing for ``silence``
    seconds; if there are none either, those that run other code at the same place.
    """
    now, here = time.time(), places[own].count
    others = [rank for rank in range(size) if rank != own]
    behind = [rank for rank in others if rank not in places or places[rank].count < here]
    lost = [rank for rank in others if rank not in places or places[rank].ended or now - places[rank].written > silence]
    busy = [rank for rank in others if rank in places and not places[rank].waits]
    return behind or lost or busy


def describe_rank(rank: int, place: RankPlace | None, silence: float) -> str:
    """A sentence about an absent rank, and one about what to look at."""
    if place is None:
        return f"Rank {rank} has not started: look at the log of its process."
    where = f"Rank {rank} (pid {place.pid} on {place.host})"
    quiet = time.time() - place.written
    if place.ended:
        return f"{where} has failed at {place.what}: {place.ended}."
    if quiet > silence:
        return (
            f"{where} has written nothing for {quiet:,.0f} s, at {place.what}: it was killed, perhaps for its memory, "
            "it holds Python's interpreter lock, or its machine is lost. Look at the logs of its process and machine."
        )
    return (
        f"{where} has been at {place.what} for {place.written - place.since:,.0f} s, in {place.frame}. Look at what it "
        f"waits for there: `py-spy dump --pid {place.pid}` on {place.host} shows its threads."
    )


def _frame_of(frame: FrameType | None) -> tuple[str, bool]:
    """The innermost frame outside torch and Python, as ``FILE:LINE in FUNCTION``, and whether it is in a collective."""
    collective = False
    while frame is not None:
        file = frame.f_code.co_filename
        collective = collective or bool(_COLLECTIVES.search(file))
        if not file.startswith("<") and not _LIBRARIES.search(file):
            name = "/".join(file.split("/")[-3:])
            return f"{name}:{frame.f_lineno} in {frame.f_code.co_name}", collective
        frame = frame.f_back
    return "code of libraries", collective
