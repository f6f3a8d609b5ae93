"""One decode process as its parent sees it: starts it, sends it chunks, receives their outcomes."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import select
import socket
import subprocess
import sys
from multiprocessing.connection import Connection

import numpy as np

from reinforce.engine.decode.process import COMMAND, READY, Message
from reinforce.engine.decode.row import Outcome
from reinforce.processes.shared_memory import SharedMemory
from reinforce.processes.signals import describe_exit

#: Chunks that a process has at a time: it begins the second without waiting for its parent.
DEPTH = 2
_START_SECONDS = 120.0
_KEPT_BYTES = 8 * 2**20  # of a message's memory; it grows with large images


class ProcessDied(Exception):
    """The process is gone; the message is how it ended."""


class ProcessHandle:
    """A running decode process. ``number`` is its entry on the board in ``status``.

    Raises ProcessDied if it does not start. Threads may share a handle only for ``kill``.
    """

    def __init__(self, number: int, status: SharedMemory, pixels: SharedMemory) -> None:
        self._messages = [SharedMemory() for _ in range(DEPTH)]
        self._sent = 0
        ours, theirs = socket.socketpair()
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
                [sys.executable, "-I", "-c", COMMAND, json.dumps(arguments)],
                stdin=subprocess.DEVNULL,
                pass_fds=descriptors,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        self._connection = Connection(ours.detach())
        self._poll = select.poll()
        self._poll.register(self._connection.fileno(), select.POLLIN)
        if not self._poll.poll(_START_SECONDS * 1000):
            self.kill()
        if self._receive() != READY:
            raise ProcessDied("it sent something unexpected at its start")

    def send(self, message: Message) -> None:
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
