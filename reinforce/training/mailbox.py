"""Messages between the driver and the ranks of a training run on Ray. Its actor imports no torch."""

from __future__ import annotations

import asyncio
from typing import Any


class Mailbox:
    """An actor through which driver and ranks exchange messages."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._bar: tuple[str, float, float] | None = None
        self._starts: dict[int, int] = {}
        self._hosts: dict[int, Any] = {}
        self._controller: Any = None
        self._closed = False
        self._stop_requested = asyncio.Event()
        self._requested_signum = 0
        self._stop_received = False
        self._stopped_by = 0
        self._user_errors: dict[int, str] = {}

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
        self._stop_received = True

    async def report_stopped(self, signum: int) -> None:
        """The ranks wrote a checkpoint and ended because of the signal."""
        self._stopped_by = signum

    async def report_user_error(self, rank: int, message: str) -> None:
        """A rank failed with an error that only the user can fix."""
        self._user_errors[rank] = message

    async def stop_received(self) -> bool:
        """Whether a rank has received the signal."""
        return self._stop_received

    async def report_start(self, rank: int, host: Any) -> int | None:
        """A rank starts on a host; returns how often it has started before, None if the training run has ended."""
        if self._closed or self._user_errors:
            return None
        self._hosts[rank] = host
        self._starts[rank] = self._starts.get(rank, -1) + 1
        return self._starts[rank]

    async def rank_hosts(self) -> dict[int, Any]:
        """The host of each rank, as it reported it at its last start."""
        return self._hosts

    async def set_controller(self, controller: Any) -> None:
        """Keep the actor that restarts the ranks."""
        self._controller = controller

    async def close(self) -> Any:
        """Let no rank start any more; returns the actor that restarts the ranks, None before it has started."""
        self._closed = True
        return self._controller

    async def log(self, line: str) -> None:
        """Add a line for the driver's screen."""
        self._lines.append(line)

    async def draw(self, bar: tuple[str, float, float]) -> None:
        """Replace the progress bar of the driver's screen."""
        self._bar = bar

    async def read_screen(self) -> tuple[list[str], tuple[str, float, float] | None, int]:
        """Lines and bar that are new since the last call, and how often the ranks were started."""
        lines, bar = self._lines, self._bar
        self._lines, self._bar = [], None
        return lines, bar, max(self._starts.values(), default=-1) + 1

    async def outcome(self) -> tuple[dict[int, str], int]:
        """User errors by rank, and the signal that ended the training run, or 0."""
        return self._user_errors, self._stopped_by
