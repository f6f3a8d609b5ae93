"""Expressions of an untrusted view, computed with limits of time and memory.

A view states its rules as SQL, and a short expression can ask for any memory and time, some of it while it is parsed.
So a separate process parses and computes it, and is killed above the limits. Messages are a line of JSON and bytes.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from reinforce.errors import UserError
from reinforce.selection.expressions import Expression, check, compute, connect, join_rows, numbers

SECONDS = 20.0  # that the expressions of a view may take together
MEMORY = 2**30  # bytes that the process may take after its start
_START_SECONDS = 120.0
_STARTS = 3
_HEAD_BYTES = 2**20  # of a line of JSON
_COMMAND = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from reinforce.selection import limited; "
    "limited.serve(float(sys.argv[2]), int(sys.argv[3]))"
)


class LimitError(UserError):
    """An expression takes more time or memory than it may."""


class LimitedExpressions:
    """Expressions over a dataset with this manifest. A context manager, which ends the process."""

    def __init__(self, manifest: Mapping[str, Any]) -> None:
        self._manifest, self._left, self._starts = manifest, SECONDS, 0
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> LimitedExpressions:
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()

    def check(self, text: str, where: str) -> Expression:
        """The expression of a number. Raises UserError if it is none, LimitError above the limits."""
        reply, _ = self._ask({"text": text, "where": where, "manifest": dict(self._manifest)}, b"", 0)
        return Expression(text, tuple(tuple(map(str, path)) for path in reply["columns"]))

    def values(self, expression: Expression, tables: Mapping[str, pa.Table]) -> npt.NDArray[np.float64]:
        """The numbers of a row group [rows], as ``expressions.numbers``. Raises as ``check``."""
        rows = join_rows([expression], tables)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, rows.schema) as writer:
            writer.write_table(rows)
        _, content = self._ask({"text": expression.text}, sink.getvalue().to_pybytes(), 8 * len(rows))
        return np.frombuffer(content, np.float64)

    def _ask(self, request: Mapping[str, Any], content: bytes, answer: int) -> tuple[dict[str, Any], bytes]:
        """Send a request -> the reply, and ``answer`` bytes if it is not an error."""
        process = self._started()
        assert process.stdin is not None
        end = time.monotonic() + self._left
        try:
            _send(process.stdin, request, content)
            reply = json.loads(self._read(process, end, None))
            if "error" in reply:
                raise UserError(str(reply["error"]))
            return reply, self._read(process, end, answer)
        except (EOFError, BrokenPipeError, TimeoutError, ValueError) as error:
            self._kill()
            limit = f"{SECONDS:g} s" if isinstance(error, TimeoutError) else f"{MEMORY / 2**30:g} GiB of memory"
            raise LimitError(f"{str(request['text'])[:200]!r} needs more than {limit}, and is not computed") from None
        finally:
            self._left = max(0.0, end - time.monotonic())

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            if self._starts == _STARTS or not self._left:
                raise LimitError("other expressions of the view have reached the limits")
            self._starts += 1
            arguments = [json.dumps(sys.path), str(SECONDS), str(MEMORY)]
            self._process = subprocess.Popen(  # noqa: S603 - this project's code
                [sys.executable, "-I", "-c", _COMMAND, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"},
            )
            try:
                self._read(self._process, time.monotonic() + _START_SECONDS, None)
            except (EOFError, TimeoutError) as error:
                self._kill()
                raise UserError("the process that computes expressions does not start") from error
        return self._process

    @staticmethod
    def _read(process: subprocess.Popen[bytes], end: float, count: int | None) -> bytes:
        """Read so many bytes of a reply, or its line. Raises EOFError, TimeoutError, and ValueError for a long line."""
        assert process.stdout is not None
        found, poll = bytearray(), select.poll()
        descriptor = process.stdout.fileno()
        poll.register(descriptor, select.POLLIN)
        while (len(found) < count) if count is not None else not found.endswith(b"\n"):
            left = end - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                raise TimeoutError
            part = os.read(descriptor, 1 if count is None else count - len(found))
            if not part:
                raise EOFError
            found += part
            if count is None and len(found) > _HEAD_BYTES:
                raise ValueError("a long line")
        return bytes(found)

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(OSError):
                    assert pipe is not None
                    pipe.close()
            self._process = None


def _send(file: IO[bytes], head: Mapping[str, Any], content: bytes) -> None:
    file.write(json.dumps({**head, "bytes": len(content)}).encode() + b"\n" + content)
    file.flush()


def serve(seconds: float, memory: int) -> None:
    """Answer the requests at the standard input until it ends, in a process that has these limits."""
    database = None
    with contextlib.suppress(UserError), connect() as first:  # without duckdb, checking reports it
        compute(first, ["number + 1"], pa.table({"number": [1]}))  # reserves what duckdb and Arrow need in any case
    _limit(seconds, memory)
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    _send(sink, {}, b"")
    while line := source.readline():
        request = json.loads(line)
        content = source.read(request["bytes"])
        try:
            if "manifest" in request:
                found = check(request["text"], request["manifest"], request["where"], "number")
                _send(sink, {"columns": found.columns}, b"")
            else:
                database = database or connect()
                rows = pa.ipc.open_stream(content).read_all()
                _send(sink, {}, numbers(compute(database, [request["text"]], rows)[0]).tobytes())
        except UserError as error:
            database = None  # it may have an unfinished result
            _send(sink, {"error": str(error)[:2000]}, b"")


def _limit(seconds: float, memory: int) -> None:
    """Let the kernel end this process above the limits, also if its parent does not."""
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 60, int(seconds) + 60))
    with contextlib.suppress(OSError, ValueError):  # only Linux has the file
        with open("/proc/self/statm", "rb") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + memory, now + memory))
