"""When a worker counts as hung: pure policy.

A worker measures for how long each of its leases has been in its current step, and reports that in its pulse. So the
result does not depend on how often it is asked. The limit of a step follows from the steps that all workers have
finished: ``FACTOR`` times the slowest of that stage, within bounds. ``failures.stall_seconds`` sets one limit for all
stages instead.

- A worker in which a lease is over its limit has hung. Its other lease is not the cause.
- A worker that has not answered a request for longer than the limit of its leases has hung as a whole.
- Before any batch of a layer has ended, the limit is an hour; after a hang in it, 15 minutes.
- A worker that loads its models for longer than ``workers.start_timeout``, or three times the slowest load that has
  passed, has hung.
- A lease that waits for the accelerator never counts, since the other lease of its worker uses it. Nor does one that
  waits for a server, since its captioner bounds the time of a request.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from reinforce.config import Failures
from reinforce.engine.messages.pulse import DECODING, PREPARING, READING, UNLIMITED_STAGES, WRITING, LeasePulse, Pulse

FACTOR = 20.0
CEILING = 3600.0
MODEL_FLOOR = 300.0
STORAGE_FLOOR = 900.0  # retries of a storage that does not answer take minutes
_STORAGE_STAGES = (READING, DECODING, WRITING, PREPARING)
_DECODE_ATTEMPTS = 2.5  # times failures.sample_seconds; a decode process that hangs is replaced by then


@dataclass(frozen=True)
class Hang:
    """Reason why a worker counts as hung, with the ``shards`` that are the cause and their ``stages``; empty if the
    cause is not known."""

    reason: str
    shards: frozenset[str] = frozenset()
    stages: frozenset[str] = frozenset()

    @classmethod
    def of(cls, reason: str, leases: Collection[LeasePulse]) -> Hang:
        return cls(reason, frozenset(one.shard for one in leases), frozenset(one.stage for one in leases))


class StallLimits:
    """The longest time that a step of a lease may take, by its stage."""

    def __init__(self, settings: Failures) -> None:
        self._explicit = settings.stall_seconds
        self._decoding = max(STORAGE_FLOOR, _DECODE_ATTEMPTS * settings.sample_seconds)
        self._slowest: dict[str, float] = {}
        self._hung: set[str] = set()  # stages in which a lease was over the limit

    def record_hang(self, hang: Hang) -> None:
        """Record a hang, so that its stages do not get an hour again."""
        self._hung |= hang.stages

    def record(self, slowest: Mapping[str, float]) -> None:
        """Record the slowest finished steps of a worker."""
        for stage, seconds in slowest.items():
            if seconds > self._slowest.get(stage, 0.0):
                self._slowest[stage] = seconds

    def seconds(self, stage: str) -> float:
        if self._explicit is not None:
            return self._explicit
        floor = self._decoding if stage == DECODING else STORAGE_FLOOR if stage in _STORAGE_STAGES else MODEL_FLOOR
        slowest = self._slowest.get(stage)
        if slowest is None:
            return STORAGE_FLOOR if stage in self._hung else floor if stage in _STORAGE_STAGES else CEILING
        # A step that once took longer than the ceiling must be able to pass again.
        return max(floor, min(FACTOR * slowest, CEILING), 3.0 * slowest)

    @property
    def least(self) -> float:
        return MODEL_FLOOR if self._explicit is None else self._explicit

    def origin(self, stage: str) -> str:
        """The limit of a stage and what it follows from, for messages."""
        if self._explicit is not None:
            return f"failures.stall_seconds = {self._explicit:g}"
        slowest = self._slowest.get(stage)
        seen = "no such step has ended yet" if slowest is None else f"the slowest such step so far took {slowest:.3g} s"
        return f"{self.seconds(stage):.0f} s, because {seen}; failures.stall_seconds sets another limit"


class LoadLimit:
    """The longest time that a worker may load its models."""

    def __init__(self, start_timeout: float) -> None:
        self._start_timeout, self._slowest = start_timeout, 0.0

    def record(self, seconds: float) -> None:
        """Record a load that has passed."""
        self._slowest = max(self._slowest, seconds)

    @property
    def seconds(self) -> float:
        return max(self._start_timeout, 3.0 * self._slowest)

    @property
    def origin(self) -> str:
        """The limit and what it follows from, for messages."""
        if self.seconds == self._start_timeout:
            return f"{self.seconds:g} s, workers.start_timeout"
        return f"{self.seconds:.0f} s, three times the slowest load that has passed"


def find_hang(pulse: Pulse, shards: Collection[str], limits: StallLimits) -> Hang | None:
    """The hang of a worker with leases of ``shards``, or None."""
    limited = [lease for lease in pulse.leases if lease.shard in shards and lease.stage not in UNLIMITED_STAGES]
    stuck = [lease for lease in limited if lease.seconds > limits.seconds(lease.stage)]
    return Hang.of("; ".join(_describe(lease, pulse.key, limits) for lease in stuck), stuck) if stuck else None


def _describe(lease: LeasePulse, key: str | None, limits: StallLimits) -> str:
    decoding = f"; longest in a decode process: key {key!r}" if lease.stage == DECODING and key is not None else ""
    return (
        f"{lease.shard} has made no progress for {lease.seconds:.0f} s in {_where(lease)}{decoding} "
        f"(limit: {limits.origin(lease.stage)})"
    )


def _where(lease: LeasePulse) -> str:
    where = lease.stage if lease.stage in (*UNLIMITED_STAGES, *_STORAGE_STAGES) else f"layer {lease.stage}"
    return f"{where} ({lease.what})" if lease.what else where


def silence_limit(pulse: Pulse, limits: StallLimits) -> float:
    """Seconds for which a worker may leave a request unanswered, by its last answer."""
    return limits.seconds(_slowest_stage(pulse, limits))


def find_silence(seconds: float, pulse: Pulse, board: tuple[LeasePulse, ...], limits: StallLimits) -> Hang:
    """The hang of a worker that has not answered for ``seconds``. ``board`` has its leases, read by another process; if
    it is empty, the message names those of the last answer."""
    leases = board or pulse.leases
    seen = "; ".join(f"{one.shard} in {_where(one)}" for one in leases)
    at = f"; {'it is' if board else 'at its last answer it was'} at {seen}" if seen else ""
    running = [one for one in board if one.stage not in (*UNLIMITED_STAGES, *_STORAGE_STAGES)]
    return Hang.of(
        f"the worker has not answered for {seconds:.0f} s, as if something in it holds the interpreter lock{at} "
        f"(limit: {limits.origin(_slowest_stage(pulse, limits))})",
        running if len(running) == 1 else (),
    )


def _slowest_stage(pulse: Pulse, limits: StallLimits) -> str:
    """The stage of a worker's leases with the largest limit."""
    stages = [lease.stage for lease in pulse.leases if lease.stage not in UNLIMITED_STAGES]
    return max(stages, key=limits.seconds, default="")
