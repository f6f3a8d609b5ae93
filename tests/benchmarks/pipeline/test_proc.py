"""CPU and memory of other processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from benchmarks.pipeline import proc
from reinforce.processes.shared_memory import SharedMemory

MEGABYTE = 10**6
_BUSY = "import time; t = time.process_time\nwhile t() < {}: pass\nprint('done', flush=True); input()"
_TOUCH = """\
import sys
from reinforce.processes.shared_memory import SharedMemory
memory = SharedMemory(descriptor=int(sys.argv[1])).array()
memory[:] = 1
print("done", flush=True); input()
"""


@pytest.fixture
def shared() -> Iterator[SharedMemory]:
    memory = SharedMemory(50 * MEGABYTE)
    yield memory
    memory.close()


def start(code: str, *words: str, **more: object) -> subprocess.Popen[bytes]:
    """A child that has done its work and waits."""
    child = subprocess.Popen(  # type: ignore[call-overload]
        [sys.executable, "-c", code, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, **more
    )
    assert child.stdout.readline() == b"done\n"
    return child  # type: ignore[no-any-return]


def test_cpu_of_a_child_is_counted_and_waiting_is_not() -> None:
    with start(_BUSY.format(0.3)) as child:
        assert child.pid in proc.children(os.getpid())
        assert 0.25 < proc.cpu_seconds(child.pid) < 0.6
        child.kill()
    assert proc.cpu_seconds(child.pid) == 0
    assert child.returncode == -signal.SIGKILL


def test_shared_memory_of_several_processes_counts_once(shared: SharedMemory) -> None:
    shared.array()[:] = 1
    here = shared.array()
    assert here.sum() == 50 * MEGABYTE  # mapped and read in this process, too
    descriptor = str(shared.descriptor)
    with start(_TOUCH, descriptor, pass_fds=[shared.descriptor]) as child:
        sizes = [proc.memory(pid) for pid in (os.getpid(), child.pid)]
        with proc.watch_memory(os.getpid(), seconds=0.01) as peak:
            child.communicate(b"\n")  # ends it
    assert 45 * MEGABYTE < sum(size.shared for size in sizes) < 60 * MEGABYTE
    assert min(size.own for size in sizes) > MEGABYTE
    assert proc.memory(child.pid) == proc.Memory()
    assert peak.total >= peak.parent > MEGABYTE


def test_peak_keeps_the_parts_of_the_largest_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {1: proc.Memory(10, 4), 2: proc.Memory(3, 4), 3: proc.Memory(5, 4)}
    monkeypatch.setattr(proc, "memory", found.__getitem__)
    peak = proc.Peak()
    peak.look(1, [2, 3])
    found[1] = proc.Memory(9, 4)
    peak.look(1, [2, 3])
    assert peak == proc.Peak(total=30, parent=10, child=4.0, shared=12)
