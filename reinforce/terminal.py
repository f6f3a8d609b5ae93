"""Text, progress and numbers as a terminal, a notebook or a job's log shows them."""

from __future__ import annotations

import re
import sys
import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from typing import Self

_LOG_SECONDS = 10.0

# Control characters except line ends and tabs, and characters that change the direction of writing.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def escape(text: str) -> str:
    """Text with control characters written as ``\\x1b`` or ``\\u202e``.

    Names and messages come from data, and data may hold escape sequences that a terminal would execute.
    """
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class Screen:
    """A bar with a line beside it on a terminal; elsewhere the line alone, every few seconds."""

    def __init__(self) -> None:
        self._console = Console(file=sys.stdout, highlight=False)
        self._live = Live(console=self._console, refresh_per_second=4, transient=True) if sys.stdout.isatty() else None
        self._printed = time.monotonic()
        self._shown: tuple[str, float] | None = None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def log(self, text: str) -> None:
        """One plain line that stays."""
        self._console.print(escape(text), soft_wrap=True, markup=False)

    def draw(self, line: str, done: float, total: float) -> None:
        """Show how much of a total is done; call it as often as you like."""
        self._shown = line, total
        if self._live:
            row = Table.grid(padding=(0, 1))
            row.add_row(
                ProgressBar(total=total, completed=done, width=20), Text(line, no_wrap=True, overflow="ellipsis")
            )
            self._live.update(row)
        elif time.monotonic() - self._printed >= _LOG_SECONDS:
            self._printed = time.monotonic()
            self.log(line)

    def advance(self, done: float) -> None:
        """Move the bar alone, where there is one."""
        if self._live and self._shown:
            self.draw(self._shown[0], done, self._shown[1])


def format_duration(seconds: float) -> str:
    """Days, hours, minutes and seconds as a clock shows them."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}d {hours:02d}:{minutes:02d}:{rest:02d}" if days else f"{hours}:{minutes:02d}:{rest:02d}"


def format_bytes(count: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError
