"""Bounds on one case: ten seconds of work and a gigabyte."""

from __future__ import annotations

import faulthandler
import re
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SECONDS = 10  # of the processor, since a machine that is shared lets one wait
STILL_SECONDS = 600  # of the clock, for what waits for ever
BYTES = 2**30
_PEAK = Path("/proc/self/clear_refs")  # of Linux: 5 written to it sets the peak back to what is held now


@contextmanager
def bounded() -> Iterator[None]:
    """Ends the process with a traceback of its threads where the block takes too long, also inside a C library.

    Raises AssertionError where it took more than a gigabyte beyond what was held before.
    """
    resettable = _reset()
    before = _peak()
    faulthandler.register(signal.SIGPROF, all_threads=True, chain=True)  # and then what it does by default: the end
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    faulthandler.dump_traceback_later(STILL_SECONDS, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.unregister(signal.SIGPROF)
    more = _peak() - before
    assert not resettable or more < BYTES, f"{more / 2**20:.0f} MiB were taken"


def _reset() -> bool:
    try:
        _PEAK.write_text("5")
    except OSError:  # not Linux, or not allowed
        return False
    return True


def _peak() -> int:
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        found = None
    return int(found[1]) * 1024 if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
