"""Progress, messages and numbers for people, on a terminal, in a notebook or in the log of a job."""

from __future__ import annotations

import io
import os
import re
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Self

T = TypeVar("T")
_LOG_SECONDS = 10.0
_DRAW_SECONDS = 0.25  # between two lines of a progress, which may be messages to another process
_NOTEBOOK_SECONDS = 0.5
_NOTEBOOK_COLUMNS = 115
_BAR_COLUMNS = 20
_PIPE_COLUMNS = 10_000

# Control characters except line ends and tabs, and characters that change the direction of writing.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def escape(text: str) -> str:
    """Write control characters as ``\\x1b`` or ``\\u202e``.

    Names and messages come from data, and data may contain escape sequences that a terminal would execute.
    """
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class Screen:
    """Shows a progress bar and a line that are updated in place; in a log, prints the line every ten seconds.

    A notebook has one output for the line, without a widget, so that it needs nothing but IPython. ``current`` is the
    one that is open in this process.
    """

    current: ClassVar[Screen | None] = None

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(file=sys.stdout, highlight=False)
        self._live: Live | None = None
        self._notebook: _NotebookLine | None = None
        if self._console.is_jupyter:
            self._notebook = _NotebookLine()
        elif sys.stdout.isatty():
            self._live = Live(console=self._console, refresh_per_second=4, transient=True)
        self._printed = time.monotonic()
        self._last_draw: tuple[str, float] | None = None
        self._outer: Screen | None = None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        self._outer, Screen.current = Screen.current, self
        return self

    def __exit__(self, *_: object) -> None:
        Screen.current = self._outer
        if self._live:
            self._live.stop()
        if self._notebook:
            self._notebook.clear()

    def log(self, text: str) -> None:
        """Print a line that stays."""
        self._console.print(escape(text), soft_wrap=True, markup=False)

    def draw(self, line: str, done: float, total: float) -> None:
        """Show ``line``, and how much of ``total`` is done. Can be called at any rate."""
        self._last_draw = line, total
        if self._live:
            self._live.update(_bar_and_line(line, done, total))
        elif self._notebook:
            self._notebook.update(line, done, total)
        elif time.monotonic() - self._printed >= _LOG_SECONDS:
            self._printed = time.monotonic()
            self.log(line)

    def advance(self, done: float) -> None:
        """Move the bar and keep the line; does nothing in a log."""
        if (self._live or self._notebook) and self._last_draw:
            line, total = self._last_draw
            self.draw(line, done, total)


class _NotebookLine:
    """An output of a notebook cell whose text is replaced, at most twice a second."""

    def __init__(self) -> None:
        self._handle: Any = None  # IPython.display.DisplayHandle
        self._updated = 0.0

    def update(self, line: str, done: float, total: float) -> None:
        if self._handle is None or time.monotonic() - self._updated >= _NOTEBOOK_SECONDS:
            self._updated = time.monotonic()
            out = io.StringIO()
            plain: dict[str, Any] = {"force_jupyter": False, "force_terminal": False, "no_color": True}
            # Without colours, rich leaves the rest of a bar blank.
            Console(file=out, width=_NOTEBOOK_COLUMNS, **plain).print(_bar_and_line(escape(line), done, total))
            data = {"text/plain": out.getvalue().rstrip("\n")}
            if self._handle is None:
                from IPython.display import display  # every notebook has it

                self._handle = display(data, raw=True, display_id=True)
            else:
                self._handle.update(data, raw=True)

    def clear(self) -> None:
        """Empty the output; the next update starts a new one."""
        if self._handle is not None:
            self._handle.update({"text/plain": ""}, raw=True)
            self._handle = None


def show_progress(items: Iterable[T], total: int, unit: str, label: str = "") -> Iterator[T]:
    """Yield items, and show how many of ``total`` there have been; ``unit`` is the noun for one.

    The line is on the open screen, whose own line comes back at the end, or else on a new one.
    """
    start, drawn = time.monotonic(), float("-inf")
    with Screen() if Screen.current is None else nullcontext(Screen.current) as screen:
        before = screen._last_draw
        try:
            for done, item in enumerate(items, start=1):
                now = time.monotonic()
                if now - drawn >= _DRAW_SECONDS or done == total:
                    drawn, rate = now, done / max(now - start, 1e-9)
                    line = f"{label}{done:,} of {plural(total, unit)}  {rate:.1f} {unit}s/s  ETA "
                    screen.draw(line + format_duration((total - done) / rate), done, total)
                yield item
        finally:
            screen._last_draw = before


def _bar_and_line(line: str, done: float, total: float) -> Table:
    row = Table.grid(padding=(0, 1))
    bar = ProgressBar(total=total, completed=done, width=_BAR_COLUMNS)
    row.add_row(bar, Text(line, no_wrap=True, overflow="ellipsis"))
    return row


def plural(count: int, noun: str) -> str:
    """A number of things: '1 shard', '2,000 shards'."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def first_names(names: Sequence[str], most: int = 3) -> str:
    """The first of some names in one line: 'a, b, c, ...'."""
    return ", ".join([*names[:most], *["..."] * (len(names) > most)])


def first_lines(lines: Sequence[str], most: int, more: str = "more") -> list[str]:
    """The first of some lines, and the number of the others: 'and 2,000 more'."""
    return [*lines[:most], *([f"and {len(lines) - most:,} {more}"] if len(lines) > most else [])]


def print_table(table: RenderableType) -> None:
    """Print a table, or lines and tables; in a pipe or file without ``COLUMNS``, as wide as they are."""
    console = Console()
    fits = console.is_terminal or console.is_jupyter or "COLUMNS" in os.environ
    (console if fits else Console(width=_PIPE_COLUMNS)).print(table)


def format_duration(seconds: float) -> str:
    """Format seconds as ``[days]d hours:minutes:seconds``: 93784 -> '1d 02:03:04', 65 -> '0:01:05'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}d {hours:02d}:{minutes:02d}:{rest:02d}" if days else f"{hours}:{minutes:02d}:{rest:02d}"


def format_bytes(count: float) -> str:
    """Format a number of bytes with a binary unit: 1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError
