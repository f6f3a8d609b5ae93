"""Decisions of the failure policy, and the deaths of workers that it decides about."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from reinforce.engine.driver.policy.no_fault import MemoryUse
from reinforce.engine.messages.results import WorkerId
from reinforce.engine.messages.task import PendingShard
from schemas import Reason


@dataclass(frozen=True)
class Retry:
    """Lease the shard again at time ``at``; ``attempt`` attempts have failed."""

    shard: PendingShard
    at: float
    attempt: int


@dataclass(frozen=True)
class Quarantine:
    """Quarantine the shard in ``layer``, and lease ``rest``: its layers that do not need that one, or None."""

    shard: PendingShard
    layer: str
    reason: Reason
    detail: str
    rest: PendingShard | None
    attempt: int


@dataclass(frozen=True)
class LeaveShard:
    """Leave the shard for the next run, because the storage has failed for too long."""

    shard: PendingShard
    attempt: int


@dataclass(frozen=True)
class Requeue:
    """Lease the shard again at once."""

    shard: PendingShard


@dataclass(frozen=True)
class RunAlone:
    """Lease the shard, a suspect, to a worker that has no other shard; ``attempt`` attempts have raised."""

    shard: PendingShard
    attempt: int = 0


@dataclass(frozen=True)
class ReplaceWorker:
    """Kill a worker that is at fault; another one is started."""

    worker: WorkerId
    reason: str


@dataclass(frozen=True)
class PauseWorker:
    """Give a worker no lease before time ``until``."""

    worker: WorkerId
    until: float


#: What happens to a shard that was in flight.
Decision: TypeAlias = "Retry | Quarantine | LeaveShard | Requeue | RunAlone"


@dataclass(frozen=True)
class EndedWorker:
    """A worker that has ended, and the shards that were in flight in it; ``alone`` if that was a single suspect."""

    id: WorkerId
    shards: tuple[PendingShard, ...]
    alone: bool
    use: MemoryUse = field(default_factory=MemoryUse)
    neighbours: int = 0  # other workers on its node, if it was killed for its memory


@dataclass(frozen=True)
class Death:
    """A worker that died, or hung and was killed."""

    worker: EndedWorker
    error: str
    deadline: float  # the node counts as alive if it is not known to be lost by then
    hung: bool = False
    cause: frozenset[str] = frozenset()  # the shards that hung; empty if it is not known which
    memory: bool = False  # it was killed because the memory of its node ran out


@dataclass(frozen=True)
class DeathVerdict:
    """Whether a worker died with its node, and what happens to its shards."""

    death: Death
    node_lost: bool
    decisions: tuple[Decision, ...]
