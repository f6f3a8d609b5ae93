"""Expressions of an untrusted view, computed with limits of time and memory.

A view states its rules as SQL, and a short expression can ask for any memory and time, some of it while it is parsed.
So a separate process parses and computes it, and is killed above the limits. Messages are JSON, and then bytes.
"""

from __future__ import annotations

import contextlib
import json
import resource
import subprocess
import threading
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from reinforce.errors import UserError
from reinforce.parallel.worker_process import start_process
from reinforce.selection.expressions import Expression, check, connect, evaluate, join_rows, numbers

SECONDS = 20.0  # that the expressions of a view may take together
MEMORY = 2**30  # bytes that the process may take after its start
_START_SECONDS = 120.0
_STARTS = 3
_HEAD_BYTES = 2**20  # of a reply in JSON


class LimitError(UserError):
    """An expression takes more time or memory than it may."""


class LimitedExpressions(contextlib.AbstractContextManager["LimitedExpressions"]):
    """Expressions over a dataset with this manifest. A context manager, which ends the process."""

    def __init__(self, manifest: Mapping[str, Any]) -> None:
        self._manifest, self._left, self._starts = manifest, SECONDS, 0
        self._started: tuple[subprocess.Popen[bytes], Connection] | None = None

    def __exit__(self, *_: object) -> None:
        self._kill()

    def check(self, text: str, where: str) -> Expression:
        """The expression of a number. Raises UserError if it is none, LimitError above the limits."""
        reply, _ = self._ask({"text": text, "where": where, "manifest": dict(self._manifest)})
        return Expression(text, tuple(tuple(map(str, path)) for path in reply["columns"]))

    def values(self, expression: Expression, tables: Mapping[str, pa.Table]) -> npt.NDArray[np.float64]:
        """The numbers of a row group [rows], as ``expressions.numbers``. Raises as ``check``."""
        rows = join_rows([expression], tables)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, rows.schema) as writer:
            writer.write_table(rows)
        _, content = self._ask({"text": expression.text}, sink.getvalue().to_pybytes(), 8 * len(rows))
        return np.frombuffer(content, np.float64)

    def _ask(self, request: Mapping[str, Any], content: bytes = b"", answer: int = 0) -> tuple[dict[str, Any], bytes]:
        """Send a request -> the reply, and ``answer`` bytes if it is not an error."""
        process, connection = self._start()
        end = time.monotonic() + self._left
        timer = threading.Timer(self._left, process.kill)
        timer.start()
        try:
            connection.send_bytes(json.dumps(request).encode())
            connection.send_bytes(content)
            reply = json.loads(connection.recv_bytes(_HEAD_BYTES))
            if "error" in reply:
                raise UserError(str(reply["error"]))
            values = connection.recv_bytes(answer)
            if len(values) < answer:
                raise EOFError
            return reply, values
        except (EOFError, OSError, ValueError):
            self._kill()
            limit = f"{SECONDS:g} s" if time.monotonic() >= end else f"{MEMORY / 2**30:g} GiB of memory"
            raise LimitError(f"{str(request['text'])[:200]!r} needs more than {limit}, and is not computed") from None
        finally:
            timer.cancel()
            self._left = max(0.0, end - time.monotonic())

    def _start(self) -> tuple[subprocess.Popen[bytes], Connection]:
        """The process and the connection to it, started if none runs."""
        if self._started is None:
            if self._starts == _STARTS or not self._left:
                raise LimitError("other expressions of the view have reached the limits")
            self._starts += 1
            few = {"MALLOC_ARENA_MAX": "2"}
            self._started = start_process(__name__, SECONDS, MEMORY, variables=few, output=subprocess.DEVNULL)
            _, connection = self._started
            try:
                if not connection.poll(_START_SECONDS):
                    raise TimeoutError
                connection.recv_bytes(0)
            except (EOFError, OSError) as error:
                self._kill()
                raise UserError("the process that computes expressions does not start") from error
        return self._started

    def _kill(self) -> None:
        if self._started is not None:
            process, connection = self._started
            process.kill()
            process.wait()
            connection.close()
            self._started = None


def serve(descriptor: int, seconds: float, memory: int) -> None:
    """Answer requests until the parent is gone, in a process that has these limits."""
    database = None
    with contextlib.suppress(UserError), connect() as first:  # without duckdb, checking reports it
        evaluate(first, ["number + 1"], pa.table({"number": [1]}))  # reserves what duckdb and Arrow need in any case
    _limit(seconds, memory)
    connection = Connection(descriptor)
    connection.send_bytes(b"")
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            request, content = json.loads(connection.recv_bytes()), connection.recv_bytes()
            reply: dict[str, Any] = {}
            values = b""
            try:
                if "manifest" in request:
                    found = check(request["text"], request["manifest"], request["where"], "number")
                    reply = {"columns": found.columns}
                else:
                    database = database or connect()
                    rows = pa.ipc.open_stream(content).read_all()
                    values = numbers(evaluate(database, [request["text"]], rows)[0], request["text"]).tobytes()
            except UserError as error:
                database = None  # it may have an unfinished result
                reply = {"error": str(error)[:2000]}
            connection.send_bytes(json.dumps(reply).encode())
            if "error" not in reply:
                connection.send_bytes(values)


def _limit(seconds: float, memory: int) -> None:
    """Let the kernel end this process above the limits, also if its parent does not."""
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 60, int(seconds) + 60))
    with contextlib.suppress(OSError, ValueError):  # only Linux has the file
        with open("/proc/self/statm", "rb") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + memory, now + memory))
