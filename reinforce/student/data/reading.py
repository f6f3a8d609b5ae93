"""How many loader processes a rank has, and in how many streams the data is read: what a config leaves open."""

from __future__ import annotations

from typing import Protocol

from reinforce.training.task import Reading


class Streams(Protocol):
    """How a config reads in streams; see ``data`` of a student's config."""

    @property
    def window(self) -> int: ...
    @property
    def streams(self) -> int | None: ...
    @property
    def workers(self) -> int | None: ...
    @property
    def prefetch(self) -> int: ...


def plan_reading(data: Streams, ranks: int, batch: int, start: int, loaders: int, recorded: int | None) -> Reading:
    """Choose loader processes and streams for ranks with ``batch`` samples per step each.

    Set values of ``data.workers`` and ``data.streams`` are used unchanged. Otherwise ``loaders`` suits the machine,
    and a stream is read by one process. The order of samples depends on the streams: a training that resumes at
    step ``start`` keeps those that its checkpoint ``recorded``. A checkpoint without a record was written when the
    default was one process.
    """
    if data.workers is not None:
        workers, parts = data.workers, ranks * max(1, data.workers)
        streams = data.streams or (recorded if recorded and recorded % parts == 0 else parts)
    else:
        wanted = min(batch, loaders)
        streams = data.streams or recorded or ranks * (1 if start else wanted)
        workers = _largest_divisor(streams // ranks, wanted) if streams % ranks == 0 else wanted
        if data.streams is None and streams % ranks:
            streams = ranks * workers
    return Reading(workers, _describe(workers), streams, _note(data, ranks, workers, streams, start, recorded))


def _largest_divisor(number: int, most: int) -> int:
    """The largest divisor of a number that is at most ``most``."""
    return next(n for n in range(min(number, most), 0, -1) if number % n == 0)


def _describe(workers: int) -> str:
    return f"{workers} loader process{'es' * (workers > 1)}" if workers else "no loader process"


def _note(data: Streams, ranks: int, workers: int, streams: int, start: int, recorded: int | None) -> str | None:
    """Why the order of samples may not be the one before, or None if it is."""
    if start and recorded and recorded != streams:
        return (
            f"the order of samples changes at this step: the checkpoint's {recorded} streams cannot be shared by "
            f"{ranks} x {max(1, workers)} loader processes. To continue exactly, set train.compute.ranks x "
            f"data.workers to a divisor of {recorded}."
        )
    if start and recorded is None and data.streams is None and data.workers is None:
        return (
            f"the checkpoint does not record its streams, so the data is read in {streams}, the default when it was "
            "written: one loader process per rank. If data.workers was set before, set it again."
        )
    return None
