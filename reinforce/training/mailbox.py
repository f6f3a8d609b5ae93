"""Messages between the driver and the ranks of a training run on Ray.

The actor's process imports this module and no torch, since what the messages hold is defined here.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class RankHost:
    """A host on which a rank runs or may run: Ray's id of the node, and the name and address of the host."""

    node: str
    name: str
    address: str


@dataclass
class Status:
    """What the ranks have reported.

    ``hosts`` are those of each rank at its last start, ``user_errors`` are errors by rank that only the user can fix,
    ``stopped_by`` is the signal because of which the ranks wrote a checkpoint and ended, or 0. ``stop_received`` is
    whether a rank has received the driver's signal.
    """

    hosts: dict[int, RankHost] = field(default_factory=dict)
    user_errors: dict[int, str] = field(default_factory=dict)
    stopped_by: int = 0
    stop_received: bool = False


class Mailbox:
    """An actor through which driver and ranks exchange messages."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._bar: tuple[str, float, float] | None = None
        self._starts: dict[int, int] = {}
        self._status = Status()
        self._controller: Any = None
        self._closed = False
        self._stop_requested = asyncio.Event()
        self._requested_signum = 0

    async def request_stop(self, signum: int) -> None:
        """The driver received a signal."""
        self._requested_signum = signum
        self._stop_requested.set()

    async def wait_for_stop(self) -> int:
        """Wait until the driver receives a signal, and return it."""
        await self._stop_requested.wait()
        return self._requested_signum

    async def confirm_stop(self) -> None:
        """A rank has received the signal. One that has died while it waited for the signal does not confirm."""
        self._status.stop_received = True

    async def report_end(self, rank: int, signum: int = 0, user_error: str | None = None) -> None:
        """A rank ended because of a signal, after the ranks wrote a checkpoint, or of an error."""
        self._status.stopped_by = signum or self._status.stopped_by
        if user_error is not None:
            self._status.user_errors[rank] = user_error

    async def report_start(self, rank: int, host: RankHost) -> int | None:
        """A rank starts on a host; returns how often it has started before, None if the training run has ended."""
        if self._closed or self._status.user_errors:
            return None
        self._status.hosts[rank] = host
        self._starts[rank] = self._starts.get(rank, -1) + 1
        return self._starts[rank]

    async def status(self) -> Status:
        """What the ranks have reported so far."""
        return self._status

    async def set_controller(self, controller: Any) -> None:
        """Keep the actor that restarts the ranks. Raises RuntimeError if the training run has ended."""
        if self._closed:
            raise RuntimeError("the training run has ended")
        self._controller = controller

    async def close(self) -> Any:
        """Let no rank start any more; returns the actor that restarts the ranks, None before it has started."""
        self._closed = True
        return self._controller

    async def show(self, line: str | None = None, bar: tuple[str, float, float] | None = None) -> None:
        """Add a line for the driver's screen, or replace its progress bar."""
        self._lines += [] if line is None else [line]
        self._bar = bar or self._bar

    async def read_screen(self) -> tuple[list[str], tuple[str, float, float] | None, int]:
        """Lines and bar that are new since the last call, and how often the ranks were started."""
        lines, bar = self._lines, self._bar
        self._lines, self._bar = [], None
        return lines, bar, max(self._starts.values(), default=-1) + 1
