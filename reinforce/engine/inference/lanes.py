"""Turns of a worker's models at its accelerator: in one lane, or teachers and captioners in a lane each.

With two lanes, the small kernels of decoding captions run on a stream of their own, beside the large ones of the
teachers. Each lane has one user at a time, so that no model is used by two threads. Who takes both lanes takes that of
the captioners first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from reinforce.engine.inference.turns import Turns
from teachers.device import process_flags
from teachers.device.accelerator import Accelerator


class Lanes:
    """The lanes of an accelerator. Without ``overlap`` there is one."""

    def __init__(self, overlap: bool = False, stream: torch.cuda.Stream | None = None) -> None:
        """``stream`` is that of the captioners' lane; by default it is the current one."""
        self._teachers = Turns()
        self._captioners = Turns() if overlap else self._teachers
        self._stream = stream
        self.two = overlap
        self.overlap = overlap  # whether both lanes may be in use at the same time

    @classmethod
    def of(cls, accelerator: Accelerator) -> Lanes:
        """Two lanes, if the accelerator has streams. What was queued on it before is done then."""
        if (stream := accelerator.side_stream()) is None:
            return cls()
        accelerator.synchronize()  # for the weights of captioners
        return cls(True, stream)

    def next_order(self) -> int:
        """A number above all before, for a shard that begins."""
        return self._teachers.next_order()

    @property
    def waiting(self) -> int:
        """Number of those who wait for a lane."""
        return self._teachers.waiting + (self._captioners.waiting if self.two else 0)

    @contextlib.contextmanager
    def use(self, order: int, captioning: bool = False) -> Iterator[None]:
        """Use the lane of teachers, or that of captioners. The lowest ``order`` of those who wait comes first."""
        if not self.two:
            with self._teachers.take(order):
                yield
            return
        with contextlib.ExitStack() as stack:
            if captioning:
                stack.enter_context(self._captioners.take(order))
            if not captioning or not self.overlap:
                stack.enter_context(self._teachers.take(order))
            stack.enter_context(process_flags.relying())
            if captioning and self._stream is not None:
                stack.enter_context(torch.cuda.stream(self._stream))
            yield

    @contextlib.contextmanager
    def use_all(self, order: int) -> Iterator[None]:
        """Keep all models from the accelerator."""
        with self._captioners.take(order) if self.two else contextlib.nullcontext(), self._teachers.take(order):
            yield

    def end_overlap(self) -> bool:
        """Use the lanes in turns from now on -> whether both were in use at the same time so far."""
        before, self.overlap = self.overlap, False
        return before
