"""Checkpoints written while the training run continues.

A step waits for a copy of the state in the host's memory; a thread makes the file of it and publishes that. One
checkpoint is in work at a time, so host memory holds the state once more, in buffers that are used again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from reinforce.training.saving.checkpoint import Checkpoints, Progress
from reinforce.training.stop import Stopped

_LOG = logging.getLogger(__name__)


class CheckpointWriter:
    """Saves checkpoints in a thread. Leaving the block waits for the last one, and raises its error."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self._copies: dict[str, torch.Tensor] = {}
        self._pins = True
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def save(self, progress: Progress, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy the tensors and begin to write them, after the checkpoint before. Raises the error of that one."""
        self.wait()
        self._copy(tensors)
        self._writing = self._thread.submit(self.checkpoints.save, progress, self._copies)

    @property
    def failed(self) -> bool:
        """Whether the last checkpoint could not be written; does not wait."""
        writing = self._writing
        return writing is not None and writing.done() and writing.exception() is not None

    def wait(self) -> None:
        """Wait until the last checkpoint is written. Raises its error, once."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _copy(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Contiguous copies on the CPU; tied weights, which share memory, are stored twice."""
        copies = {}
        for name, tensor in tensors.items():
            copy = self._copies.get(name)
            if copy is None or (copy.shape, copy.dtype) != (tensor.shape, tensor.dtype):
                copy = self._buffer(tensor)
            copies[name] = copy.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()
        self._copies = copies

    def _buffer(self, tensor: torch.Tensor) -> torch.Tensor:
        """Host memory for a copy of a tensor: for one on CUDA pinned, unless the machine has refused that before."""
        if tensor.is_cuda and self._pins:
            try:
                return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            except RuntimeError as error:
                self._pins = False
                first = str(error).partition("\n")[0]
                _LOG.warning("checkpoints are copied to memory that is not pinned, which is slower: %s", first)
        return torch.empty(tensor.shape, dtype=tensor.dtype)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        writing = self._writing
        self._thread.shutdown()
        if writing is not None and (kind is None or issubclass(kind, Stopped)):
            writing.result()
