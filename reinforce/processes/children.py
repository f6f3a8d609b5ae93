"""Child processes: how they start, how they end, also with their parent, and memory that both share."""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for_any
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
import numpy.typing as npt

#: What follows ``python -c``, so that the program of the parent is not run again; modules are found where the parent
#: finds them.
_COMMAND = (
    "import importlib, json, sys; path, module, *arguments = json.loads(sys.argv[1]); sys.path[:] = path; "
    "importlib.import_module(module).serve(*arguments)"
)
_PR_SET_PDEATHSIG = 1


class ProcessEnded(Exception):
    """A child process has ended; the message is how."""


def start_process(
    module: str,
    *arguments: float,
    variables: Mapping[str, str] | None = None,
    output: int | None = None,
    descriptors: Sequence[int] = (),
) -> tuple[subprocess.Popen[bytes], Connection]:
    """Start a process that runs ``serve`` of a module with the descriptor of a connection and the ``arguments``.

    It has the open ``descriptors`` of this process, and environment ``variables`` besides those of this process.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        command = json.dumps([sys.path, module, theirs.fileno(), *arguments])
        # Isolated mode: the path is the parent's. The processes are the threads of the arithmetic.
        process = subprocess.Popen(  # noqa: S603 - this project's code
            [sys.executable, "-I", "-c", _COMMAND, command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=[theirs.fileno(), *descriptors],
            env={**os.environ, "OMP_NUM_THREADS": "1", **(variables or {})},
        )
    return process, Connection(ours.detach())


def connect_to_parent(descriptor: int, parent: int) -> Connection:
    """The connection of a child process to its ``parent``, with which it ends. Ctrl-C is left to the parent."""
    kill_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it reaches the whole process group
    return Connection(descriptor)


def kill_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent dies, even inside a function that hangs (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(0)


def exit_with_parent() -> None:
    """Exit this process of ``multiprocessing`` when its parent has ended, also by a kill, which pools do not notice."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def wait() -> None:
        wait_for_any([sentinel])
        os._exit(1)

    threading.Thread(target=wait, name="exit-with-parent", daemon=True).start()


def describe_exit(status: int) -> str:
    """How a process ended, by its exit status as of ``subprocess``."""
    if status >= 0:
        return f"exit status {status}"
    with contextlib.suppress(ValueError):
        return f"signal {signal.Signals(-status).name}"
    return f"signal {-status}"


class SharedMemory:
    """Memory without a name: the limit of /dev/shm does not apply, and the last process that exits frees it.

    Pages take memory once they are written. With ``descriptor`` the memory is another process's.
    """

    def __init__(self, size: int = 0, descriptor: int | None = None) -> None:
        if descriptor is None:
            if hasattr(os, "memfd_create"):
                descriptor = os.memfd_create("reinforce", os.MFD_CLOEXEC)
            else:
                with tempfile.TemporaryFile() as file:
                    descriptor = os.dup(file.fileno())
        self.descriptor = descriptor
        if size:
            os.ftruncate(self.descriptor, size)

    @property
    def size(self) -> int:
        return os.fstat(self.descriptor).st_size

    def resize(self, size: int) -> None:
        """Change the size in bytes; arrays made before keep the old one."""
        os.ftruncate(self.descriptor, size)

    def array(self) -> npt.NDArray[np.uint8]:
        """All bytes as a writable array, which keeps the mapping alive."""
        if not self.size:
            return np.empty(0, np.uint8)
        return np.frombuffer(mmap.mmap(self.descriptor, self.size), np.uint8)

    def write(self, data: bytes) -> None:
        """Write ``data`` at the start; the memory grows to hold it."""
        view, start = memoryview(data), 0
        while start < len(data):
            start += os.pwrite(self.descriptor, view[start:], start)

    def read(self, length: int) -> bytes:
        data = os.pread(self.descriptor, length, 0)
        if len(data) < length:
            raise ValueError(f"shared memory has {len(data)} bytes, expected {length}")
        return data

    def close(self) -> None:
        """Close the descriptor; arrays stay valid. Also done when nothing refers to this object any more."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def __del__(self) -> None:
        with contextlib.suppress(OSError):
            self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Send the descriptor to a process that is being started by multiprocessing; nothing else can receive it."""
        return _received, (DupFd(self.descriptor),)


def _received(handle: Any) -> SharedMemory:
    return SharedMemory(descriptor=handle.detach())
