"""Waiting for what threads and other processes do."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import psutil


def wait_for(condition: Callable[[], object], problem: Callable[[], object] = str, seconds: float = 600) -> None:
    """Wait until a condition is true. Raises AssertionError with the ``problem`` if it is not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, problem()
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def processes_below(pid: int, command: str) -> list[int]:
    """Descendants of a process by the start of their command, or its file's name."""
    found: list[int] = []
    try:
        children = psutil.Process(pid).children(recursive=True)
    except psutil.Error:  # it has ended
        return found
    for child in children:
        with contextlib.suppress(psutil.Error):  # it has ended
            text = " ".join(child.cmdline())
            if text.startswith(command) or text.partition(" ")[0].rpartition("/")[2] == command:
                found.append(child.pid)
    return found
