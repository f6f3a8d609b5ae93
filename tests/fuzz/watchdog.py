"""Limits on one case: ten seconds of CPU time and a gigabyte."""

from __future__ import annotations

import faulthandler
import re
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SECONDS = 10  # CPU time, because other processes may delay this one
WAIT_SECONDS = 600  # elapsed time, for cases that block
BYTES = 2**30
_PEAK = Path("/proc/self/clear_refs")  # Linux: writing 5 resets the peak to the current value


@contextmanager
def bounded() -> Iterator[None]:
    """End the process with a traceback of all threads if the block takes too long, even inside a C library.

    Raises AssertionError if the block takes more than a gigabyte in addition to the memory used before.
    """
    resettable = _reset()
    before = _peak()
    faulthandler.register(signal.SIGPROF, all_threads=True, chain=True)  # then the process ends
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    faulthandler.dump_traceback_later(WAIT_SECONDS, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.unregister(signal.SIGPROF)
    more = _peak() - before
    assert not resettable or more < BYTES, f"{more / 2**20:.0f} MiB were used"


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
