"""What a person sees while a run goes on: a live line on a terminal, a plain line now and then in a job's log."""

from __future__ import annotations

import sys
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from reinforce.terminal import plain

if TYPE_CHECKING:
    from typing import Self

_LOG_SECONDS = 10.0
_WINDOW_SECONDS = 60.0


@dataclass(frozen=True)
class Snapshot:
    """Totals at one moment; ``busy`` is in accelerator-seconds, ``alive`` in worker-seconds. ``samples`` counts those
    of unfinished shards too, ``samples_done`` does not."""

    shards_done: int
    shards: int
    samples: int
    samples_done: int
    busy: float
    alive: float
    workers: int
    quarantined_shards: int
    refused_rows: int


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

    def say(self, text: str) -> None:
        """One plain line that stays."""
        self._console.print(plain(text), soft_wrap=True, markup=False)

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
            self.say(line)

    def advance(self, done: float) -> None:
        """Move the bar alone, where there is one."""
        if self._live and self._shown:
            self.draw(self._shown[0], done, self._shown[1])


class Progress(Screen):
    """Call ``show`` as often as you like; it decides when there is something to print."""

    def __init__(self) -> None:
        super().__init__()
        self._history: deque[tuple[float, Snapshot]] = deque()
        self._start = time.monotonic()

    def show(self, now: Snapshot) -> None:
        moment = time.monotonic()
        self._history.append((moment, now))
        while moment - self._history[0][0] > _WINDOW_SECONDS and len(self._history) > 2:
            self._history.popleft()
        self.draw(self.line(now), now.samples if now.samples_done else 0, _expected(now) or 1)

    def line(self, now: Snapshot) -> str:
        then_moment, then = self._history[0] if self._history else (self._start, now)
        span = time.monotonic() - then_moment
        parts = [f"{now.shards_done:,} of {now.shards:,} shards", f"{now.samples:,} samples"]
        if span > 0 and now.samples > then.samples:
            parts.append(f"{(now.samples - then.samples) / span:,.0f} samples/s")
        if now.busy > 0 and now.alive > then.alive:
            parts.append(f"accelerator busy {min(1.0, (now.busy - then.busy) / (now.alive - then.alive)):.0%}")
        parts.append(f"{now.workers} worker{'s' * (now.workers != 1)}")
        eta = self._eta(now)
        if eta is not None:
            parts.append(f"ETA {clock(eta)}")
        if now.quarantined_shards or now.refused_rows:
            parts.append(f"quarantine: {now.quarantined_shards} shards, {now.refused_rows:,} rows")
        return "  ".join(parts)

    def _eta(self, now: Snapshot) -> float | None:
        """Seconds to go at the pace of this run so far."""
        expected = _expected(now)
        if expected is None:
            return None
        return (time.monotonic() - self._start) / now.samples * (expected - now.samples)


def _expected(now: Snapshot) -> float | None:
    """Samples of all shards, if the others are as long as the finished ones."""
    if now.samples_done == 0:
        return None
    return max(now.samples, now.samples_done / now.shards_done * now.shards)


def clock(seconds: float) -> str:
    """Days, hours, minutes and seconds as a clock shows them."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}d {hours:02d}:{minutes:02d}:{rest:02d}" if days else f"{hours}:{minutes:02d}:{rest:02d}"
