"""A decode process: receives chunks of encoded images, writes their pixels into shared memory, returns the records.

``main`` is the process, and ``ProcessHandle`` what its parent has of it. It is started with ``python -c`` and the
descriptors of its socket and of its shared memory, so that it imports only what decoding needs, in any program.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import pickle
import select
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from multiprocessing.connection import Connection
from socket import socketpair
from typing import Any, TypeAlias

import numpy as np

from reinforce.engine.decode.cells import PixelCells
from reinforce.engine.decode.row import DecodeSpec, Outcome, Row, decode_row
from reinforce.images import policy as image
from reinforce.processes.shared_memory import SharedMemory
from reinforce.processes.signals import describe_exit, kill_with_parent

_READY = b"ready"
#: What follows ``python -c``; the module is found where the parent finds it.
_COMMAND = (
    "import json, sys; arguments = json.loads(sys.argv[1]); sys.path[:] = arguments.pop('path'); "
    "from reinforce.engine.decode import process; process.main(**arguments)"
)
_KEPT_SPECS = 8
#: Chunks that a process has at a time: it begins the second without waiting for its parent.
DEPTH = 2
_START_SECONDS = 120.0
_KEPT_BYTES = 8 * 2**20  # of a message's memory; it grows with large images
#: What a process receives: the numbers of a chunk and of its lease, the pickled DecodeSpec of the lease, which is None
#: if the process has received it before, and the rows to be decoded.
_Message: TypeAlias = "tuple[int, int, bytes | None, Sequence[Row]]"


class StatusBoard:
    """Current work of each process, in shared memory: the chunk, the number of its row among those sent, and since
    when.

    The parent reads it when a process has died or takes too long.
    """

    ENTRY_BYTES = 3 * 8

    def __init__(self, memory: SharedMemory) -> None:
        self._entries = memory.array().view(np.float64).reshape(-1, 3)

    def set(self, process: int, chunk: int, row: int) -> None:
        self._entries[process] = (chunk, row, time.monotonic())

    def clear(self, process: int) -> None:
        self._entries[process] = (0, 0, 0)

    def get(self, process: int) -> tuple[int, int, float] | None:
        """Chunk, row and seconds of a process, or None if it is idle."""
        chunk, row, began = self._entries[process].tolist()
        return (int(chunk), int(row), time.monotonic() - began) if chunk else None


def main(number: int, parent: int, socket: int, status: int, pixels: int, messages: Sequence[int]) -> None:
    """Work until the parent is gone. ``number`` is the process's entry on the board; the rest are descriptors."""
    kill_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent decides
    warnings.filterwarnings("ignore", module="PIL")  # one line per image with odd metadata; refusals are recorded
    image.large_image_lock = _FileLock(pixels)
    board = StatusBoard(SharedMemory(descriptor=status))
    inbox = [SharedMemory(descriptor=descriptor) for descriptor in messages]
    leases = _CellLeases(SharedMemory(descriptor=pixels))
    connection = Connection(socket)
    gc.freeze()  # garbage collections skip all imported modules
    try:
        connection.send_bytes(_READY)
        while True:
            slot, length = np.frombuffer(connection.recv_bytes(), np.int64).tolist()
            message: _Message = pickle.loads(inbox[slot].read(length))  # noqa: S301 - from the parent
            chunk, lease, pickled, rows = message
            spec, cells = leases.get(lease, pickled)
            outcomes = []
            for row_number, row in enumerate(rows):
                board.set(number, chunk, row_number)
                outcomes.append(decode_row(spec, cells, row))
            board.clear(number)
            connection.send_bytes(pickle.dumps(outcomes, pickle.HIGHEST_PROTOCOL))
    except (EOFError, OSError):  # the parent is gone
        sys.exit(0)


class _CellLeases:
    """The specs of recent leases, and their cells in the pixel memory."""

    def __init__(self, memory: SharedMemory) -> None:
        self._memory = memory
        self._pixels = memory.array()
        self._known: dict[int, tuple[DecodeSpec, PixelCells]] = {}

    def get(self, lease: int, pickled: bytes | None) -> tuple[DecodeSpec, PixelCells]:
        if pickled is not None:
            spec: DecodeSpec = pickle.loads(pickled)  # noqa: S301 - from the parent
            if spec.stop > len(self._pixels):
                self._pixels = self._memory.array()
            self._known[lease] = spec, spec.layout.cells(self._pixels[spec.start : spec.stop])
            for old in list(self._known)[:-_KEPT_SPECS]:
                del self._known[old]
        return self._known[lease]


class _FileLock:
    """A lock of all processes that have the descriptor. The kernel releases it when its holder dies."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __enter__(self) -> None:
        fcntl.lockf(self._descriptor, fcntl.LOCK_EX, 1)

    def __exit__(self, *_: Any) -> None:
        fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1)


class ProcessDied(Exception):
    """The process is gone; the message is how it ended."""


class ProcessHandle:
    """A running decode process. ``number`` is its entry on the board in ``status``.

    Raises ProcessDied if it does not start. Threads may share a handle only for ``kill``.
    """

    def __init__(self, number: int, status: SharedMemory, pixels: SharedMemory) -> None:
        self._messages = [SharedMemory() for _ in range(DEPTH)]
        self._sent = 0
        ours, theirs = socketpair()
        descriptors = [theirs.fileno(), status.descriptor, pixels.descriptor]
        descriptors += [memory.descriptor for memory in self._messages]
        arguments = {
            "path": sys.path,
            "number": number,
            "parent": os.getpid(),
            "socket": descriptors[0],
            "status": descriptors[1],
            "pixels": descriptors[2],
            "messages": descriptors[3:],
        }
        with theirs:
            # Isolated mode: the path is the parent's. One process decodes with one thread.
            self._process = subprocess.Popen(  # noqa: S603 - this project's code
                [sys.executable, "-I", "-c", _COMMAND, json.dumps(arguments)],
                stdin=subprocess.DEVNULL,
                pass_fds=descriptors,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        self._connection = Connection(ours.detach())
        self._poll = select.poll()
        self._poll.register(self._connection.fileno(), select.POLLIN)
        if not self._poll.poll(_START_SECONDS * 1000):
            self.kill()
        if self._receive() != _READY:
            raise ProcessDied("it sent something unexpected at its start")

    def send(self, message: _Message) -> None:
        """Send a message; at most ``DEPTH`` may be without outcomes. ``receive`` reports a process that has died."""
        pickled = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        slot = self._sent % DEPTH
        self._sent += 1
        memory = self._messages[slot]
        if memory.size > max(_KEPT_BYTES, len(pickled)):
            memory.resize(0)
        memory.write(pickled)
        with contextlib.suppress(OSError):
            self._connection.send_bytes(np.array([slot, len(pickled)], np.int64).tobytes())

    def receive(self, seconds: float) -> list[Outcome] | None:
        """The outcomes of the oldest chunk, or None if there are none after ``seconds``. Raises ProcessDied."""
        if not self._poll.poll(seconds * 1000):
            return None
        outcomes: list[Outcome] = pickle.loads(self._receive())  # noqa: S301 - from this project's process
        return outcomes

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        """Kill the process and release what it used."""
        self.kill()
        self._process.wait()
        self._connection.close()
        for memory in self._messages:
            memory.close()

    def _receive(self) -> bytes:
        try:
            return self._connection.recv_bytes()
        except (EOFError, OSError):
            self.kill()
            status = self._process.wait()
            self.close()
            raise ProcessDied(describe_exit(status)) from None
