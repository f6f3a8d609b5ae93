"""A section of the benchmark in a separate process, with which a crash, a hang or an error of the device ends."""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.probe import probing
from benchmarks.pipeline.figures import Figure
from benchmarks.pipeline.page import limit_text, number
from reinforce.processes.children import describe_exit, kill_with_parent, start_process
from reinforce.processes.cores import available_cores
from teachers.fast_paths import recompilation
from teachers.fast_paths.usage import set_enabled
from teachers.runtime import determinism

_LOOK_SECONDS = 0.1
_START_SECONDS = 300.0  # for imports
_END_SECONDS = 30.0  # for a process to exit after its last message, and for killed ones to be gone
_MARK = "REINFORCE_BENCH_SECTION"  # a variable that all processes of a section inherit
_PLACE = re.compile(r"Current thread [^\n]*\n  (File [^\n]*)")  # of faulthandler: the innermost frame

Entry = dict[str, Any]


@dataclass(frozen=True)
class Section:
    """A part of the benchmark, and the minutes that it takes on an H100 with compiling, as estimated.

    It is killed after twice these ``minutes``. Figures of one that ``checks`` must meet their limits. One for ``ranks``
    needs several cards. ``measure`` is a function of a module, since its name is sent to the process.
    """

    measure: Callable[[Bench], list[Figure]]
    minutes: float
    checks: bool = False
    ranks: bool = False


def run_section(bench: Bench, name: str, section: Section) -> Entry:
    """The entry of a section: its figures, what failed in it, readings of the card, traces, and uses of fast paths.

    If its process crashes or reaches the limit of time, the entry has what was measured until then, and how it ended.
    """
    start, log, mark = time.monotonic(), bench.folder / "logs" / f"{name}.txt", f"{name}-{uuid.uuid4().hex}"
    log.parent.mkdir(parents=True, exist_ok=True)
    variables = {
        _MARK: mark,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(available_cores())),
        "TORCHINDUCTOR_CACHE_DIR": str(bench.folder / "compiled"),  # what a section compiles, others load
    }
    entry = _entry(bench, name, [])
    with probing(bench.device) as readings, log.open("wb") as output, log.open("rb") as written:
        look = partial(_show, written)
        process, connection = start_process(__name__, os.getpid(), variables=variables, output=output.fileno())
        try:
            connection.send((bench, name, section))
            last, entry = _receive(process, connection, start + _START_SECONDS, look)
            end = time.monotonic() + 120 * section.minutes
            while not last:
                last, entry = _receive(process, connection, end, look)
            process.wait(_END_SECONDS)
        except TimeoutError:
            _abort(process)
            reason = f"no result after {2 * section.minutes:g} minutes"
            entry["failures"][name] = f"{reason}; killed in {_place(log)}"
        except (EOFError, OSError):
            entry["failures"][name] = f"its process ended with {describe_exit(process.wait())} in {_place(log)}"
        except subprocess.TimeoutExpired:
            bench.log(f"{name}: its process did not exit, and is killed")
        finally:
            _kill_marked(mark)
            process.wait()
            connection.close()
            look()
    return {**entry, "seconds": round(time.monotonic() - start, 1), "card": readings}


def measure(bench: Bench, name: str, section: Section) -> Entry:
    """The entry of a section that is measured in this process, without readings of the card."""
    with contextlib.nullcontext() if bench.on_cuda else _captured_only():
        determinism.set_flags(bench.device)
        set_enabled(True)  # counts of fast paths begin anew
        figures = bench.attempt(name, lambda: section.measure(bench))
    for figure in figures:
        if section.checks and (figure.met is False or math.isnan(figure.value)):
            bench.fail(f"{name}: {figure.name}", f"{number(figure.value, figure.unit)}, not {limit_text(figure)}")
    return _entry(bench, name, figures)


def serve(descriptor: int, parent: int) -> None:
    """Measure the section that the parent sends, and send its entry whenever a part has ended."""
    kill_with_parent(parent)
    faulthandler.enable()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    connection = Connection(descriptor)
    sent, name, section = connection.recv()
    bench: Bench = replace(sent, on_part=lambda: connection.send((False, _entry(bench, name, bench.figures))))
    bench.on_part()
    connection.send((True, measure(bench, name, section)))


def _entry(bench: Bench, name: str, figures: list[Figure]) -> Entry:
    kept = {"figures": [asdict(figure) for figure in figures], "failures": dict(bench.failures)}
    return {"section": name, **kept, "traces": dict(bench.traces), "usage": dict(bench.usage)}


def _receive(
    process: subprocess.Popen[bytes], connection: Connection, end: float, look: Callable[[], None]
) -> tuple[bool, Entry]:
    """The next entry that the process sends, after whether it is the last one.

    Raises TimeoutError at ``end``, and EOFError if the process ends before.
    """
    while True:
        exited = process.poll() is not None
        if connection.poll(0 if exited else _LOOK_SECONDS):
            message: tuple[bool, Entry] = connection.recv()
            return message
        look()
        if exited:  # its children may hold the connection open
            raise EOFError
        if time.monotonic() > end:
            raise TimeoutError


def _show(written: Any) -> None:
    """Print what was added to the log."""
    print(written.read().decode(errors="replace"), end="", flush=True)


def _abort(process: subprocess.Popen[bytes]) -> None:
    """End a process that hangs, which first writes where it is to its log."""
    process.send_signal(signal.SIGABRT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_END_SECONDS)


def _place(log: Path) -> str:
    """Where a process was when it ended, by its log; otherwise the last line."""
    text = log.read_text(encoding="utf-8", errors="replace")
    found = _PLACE.findall(text)
    return found[-1] if found else f"an unknown place; its last line: {' '.join(text.splitlines()[-1:])[:300]}"


def _kill_marked(mark: str) -> None:
    """Kill all processes that a section has left, such as its decode processes, ranks and those of Ray."""
    end = time.monotonic() + _END_SECONDS
    while (left := _marked(mark)) and time.monotonic() < end:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_LOOK_SECONDS)


def _marked(mark: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"{_MARK}={mark}\0".encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def _captured_only() -> AbstractContextManager[object]:
    """Let fast paths capture graphs and not compile them, which takes minutes on a CPU."""
    return patch.object(recompilation, "inductor", lambda graph, _: graph.forward)
