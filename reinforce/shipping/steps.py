"""What an export is doing, and for how long, also while the output of a converter is discarded."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator

from rich.console import Console

from reinforce.terminal import Screen, format_duration

_REDRAW_SECONDS = 1.0  # of a step that goes on


@contextlib.contextmanager
def step_screen() -> Iterator[Screen]:
    """Yield a screen on a copy of standard output, which stays open when ``silenced`` redirects that of the process."""
    with contextlib.ExitStack() as stack:
        console = None
        with contextlib.suppress(OSError, ValueError, AttributeError):  # not a file
            sys.stdout.flush()
            number = os.dup(sys.stdout.fileno())
            copy = stack.enter_context(open(number, "w", encoding=sys.stdout.encoding, errors="backslashreplace"))
            console = Console(file=copy, highlight=False)
        yield stack.enter_context(Screen(console))


@contextlib.contextmanager
def step(screen: Screen, label: str) -> Iterator[None]:
    """Show what is done and the time since it began; once it is done, print how long it took."""
    start, ended = time.monotonic(), threading.Event()

    def line() -> str:
        return f"{label}: {format_duration(time.monotonic() - start)}"

    def redraw() -> None:
        while not ended.wait(_REDRAW_SECONDS):
            screen.draw(line(), 0, 1)

    screen.draw(label, 0, 1)
    thread = threading.Thread(target=redraw, name="step", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    screen.log(line())


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Discard what converters, in Python or C++, print on standard output and error."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [(number, os.dup(number)) for number in (1, 2)]
    with open(os.devnull, "w", encoding="utf-8") as null, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for number, _ in saved:
                os.dup2(null.fileno(), number)
            with contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):  # in notebooks not 1, 2
                yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, copy in saved:
                os.dup2(copy, number)
                os.close(copy)
