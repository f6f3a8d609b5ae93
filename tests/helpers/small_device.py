"""A device with little memory, on the CPU."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence

import numpy as np
import torch

from teachers.device.accelerator import Accelerator

MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB."


class SmallDevice(Accelerator):
    """A device with memory for ``capacity`` rows, copied ones and those in a forward pass."""

    def __init__(self, capacity: int) -> None:
        super().__init__("cpu")
        self.capacity, self.used, self.copied = capacity, 0, threading.Semaphore(0)
        self._changing = threading.RLock()

    def put_parts(self, parts: Sequence[np.ndarray]) -> torch.Tensor:
        class Block(np.ndarray):
            """Memory of the device, used until no tensor shares it."""

        block = np.concatenate(parts).view(Block)
        with self._changing:
            self.check(len(block))
            self.used += len(block)
        weakref.finalize(block, self.free, len(block))
        self.copied.release()
        return torch.from_numpy(block)

    def check(self, rows: int) -> None:
        if self.used + rows > self.capacity:
            raise torch.cuda.OutOfMemoryError(MESSAGE)

    def free(self, rows: int) -> None:
        with self._changing:
            self.used -= rows
