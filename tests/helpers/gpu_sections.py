"""Sections of the benchmark of a GPU that fail in the ways of a device, and some that do not."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu.bench import Bench
from benchmarks.pipeline.figures import Figure

#: Stands for the error of a device that all later calls of a process raise.
_broken: list[str] = []


def _launch(name: str) -> list[Figure]:
    if _broken:
        raise RuntimeError(f"{_broken[0]} (raised again)")
    return [Figure("section", name, float(os.getpid()), "processes/s")]


def passes(bench: Bench) -> list[Figure]:
    """A figure that is the process's id."""
    return bench.attempt("part", lambda: _launch("id"))


def breaks_the_device(bench: Bench) -> list[Figure]:
    """Two parts, the first of which leaves an error that the second one raises, too."""

    def fail() -> list[Figure]:
        _broken.append("CUDA error: device-side assert triggered")
        raise RuntimeError(_broken[0])

    return bench.attempt("first", fail) + bench.attempt("second", lambda: _launch("second"))


def crashes(bench: Bench) -> list[Figure]:
    """A part that ends, and then an access to memory that is not the process's."""
    figures = bench.attempt("part", lambda: _launch("before the crash"))
    ctypes.string_at(0)
    return figures


def is_killed(bench: Bench) -> list[Figure]:
    """As by the kernel when memory is short, while a child of the process holds what it inherited."""
    if os.fork() == 0:
        time.sleep(600)
    os.kill(os.getpid(), 9)
    return []


def hangs(bench: Bench) -> list[Figure]:
    """Never returns; a child in a session of its own does not either."""
    bench.attempt("part", lambda: _launch("before the hang"))
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    Path(bench.folder / "child").write_text(str(child.pid), encoding="utf-8")
    time.sleep(600)
    return []


def is_wrong(bench: Bench) -> list[Figure]:
    return [Figure("section", "rows that differ", 2.0, "", 0.0, "at most")]
