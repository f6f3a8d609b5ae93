"""Memory that a process shares with its children by file descriptor."""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
import numpy.typing as npt


class SharedMemory:
    """Memory without a name: the limit of /dev/shm does not apply, and the last process that exits frees it.

    Pages take memory once they are written. With ``descriptor`` the memory is another process's.
    """

    def __init__(self, size: int = 0, descriptor: int | None = None) -> None:
        self.descriptor = _anonymous_file() if descriptor is None else descriptor
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


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("reinforce", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
