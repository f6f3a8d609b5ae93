"""A process that calls functions for its parent. It has one copy of a function, with whatever state that keeps there.

It is started with ``python -c`` and the descriptor of a socket, so that the program of the parent is not run again.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from multiprocessing.pool import ExceptionWithTraceback  # type: ignore[attr-defined]
from typing import Any

from reinforce.processes.signals import describe_exit, kill_with_parent

#: What follows ``python -c``; modules are found where the parent finds them.
_COMMAND = (
    "import importlib, json, sys; path, module, *arguments = json.loads(sys.argv[1]); sys.path[:] = path; "
    "importlib.import_module(module).serve(*arguments)"
)


def start_process(
    module: str, *arguments: float, variables: Mapping[str, str], output: int | None = None
) -> tuple[subprocess.Popen[bytes], Connection]:
    """Start a process that runs ``serve`` of a module with the descriptor of a connection and the ``arguments``."""
    ours, theirs = socket.socketpair()
    with theirs:
        command = json.dumps([sys.path, module, theirs.fileno(), *arguments])
        # Isolated mode: the path is the parent's. The processes are the threads of the arithmetic.
        process = subprocess.Popen(  # noqa: S603 - this project's code
            [sys.executable, "-I", "-c", _COMMAND, command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=[theirs.fileno()],
            env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        )
    return process, Connection(ours.detach())


class ProcessEnded(Exception):
    """The process ended before the function returned; the message is how."""


class WorkerProcess:
    """A process that is started, as its parent sees it. One thread at a time may use it, apart from ``kill``."""

    def __init__(self) -> None:
        self._process, self._connection = start_process(__name__, os.getpid(), variables={})
        self._function: Callable[[Any], Any] | None = None

    def call(self, function: Callable[[Any], Any], item: Any) -> Any:
        """Return ``function(item)``. The function is sent unless it is that of the call before.

        Raises ProcessEnded, and what the function raises.
        """
        try:
            self._connection.send((None if function is self._function else function, item))
            self._function = function
            result, error = self._connection.recv()
        except (EOFError, OSError):
            self._process.kill()
            raise ProcessEnded(f"its process ended with {describe_exit(self._process.wait())}") from None
        if error is not None:
            raise error
        return result

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def serve(descriptor: int, parent: int) -> None:
    """Answer calls until the parent is gone."""
    kill_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    connection = Connection(descriptor)
    function: Callable[[Any], Any] | None = None
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            message = connection.recv_bytes()
            try:
                sent, item = pickle.loads(message)  # noqa: S301 - from the parent
                function = function if sent is None else sent
                assert function is not None
                answer = pickle.dumps((function(item), None))
            except Exception as error:
                answer = _pickled_error(error)
            connection.send_bytes(answer)


def _pickled_error(error: Exception) -> bytes:
    """The error with its traceback as cause; only its text if it cannot be sent."""
    try:
        answer = pickle.dumps((None, ExceptionWithTraceback(error, error.__traceback__)))
        pickle.loads(answer)  # noqa: S301 - of the line above
        return answer
    except Exception:
        return pickle.dumps((None, RuntimeError(f"{type(error).__name__}: {error}")))
