"""Which failures a shard is not the cause of: pure policy, the counts behind it, and the decisions.

A worker that is killed for its memory, and a storage that fails, count against no shard:

- A worker that leaks memory fails at any shard. Only a shard that kills a new worker alone is quarantined, after
  ``ALONE`` times. If other workers share the memory of the node, such a death counts a third.
- If many workers die and no shard is finished in between, the run ends with one error.
- After a storage error a shard is tried again until ``failures.outage_seconds`` have passed since its first; then it is
  left for the next run, and the run ends with one error when the others are finished.
- While storage errors come from several shards and none passes, the run leases nothing for pauses that double up to a
  minute. Whoever fails takes fresh credentials.
- A file that does not exist is believed after ``failures.attempts``, and one that may not be read if another shard has
  passed since it was first refused: then the storage and the credentials work, and the shard is quarantined.

A shard that fails at one worker and passes at another was not the cause. The first worker was, or its node (a full
disk, a bad accelerator, a missing mount):

- A shard that failed is tried elsewhere: on another node where there is one, else at another worker.
- A worker is replaced when two shards that failed at it have passed elsewhere, or when three different shards in a
  row failed at it while others passed. A shard that fails on two nodes, or at three workers, is itself the cause.
- Failures at a replaced worker do not count as attempts of its shards, once one of them has passed elsewhere. A shard
  that has failed at three workers keeps its attempts, so every shard passes or is quarantined.
- A node gets no new workers for ten minutes when, within an hour, two of its workers were replaced or died and their
  shards passed on other nodes. The time doubles with each further worker. A node where models cannot be loaded, while
  workers of other nodes finish shards, gets no new workers at once.
- A shard that cannot be read from one node may be readable from another (a mount, credentials), so it is tried there.
- If half of the workers fail, the cause is something else, such as a storage. Few workers are replaced at a time.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from reinforce.config import Failures
from reinforce.engine.messages import PendingShard, StorageFailure, WorkerId
from reinforce.errors import StorageError, UserError
from reinforce.processes.attempts import pause_seconds
from reinforce.terminal import plural
from schemas import Reason

ALONE = 3
MAX_IN_A_ROW = 10  # deaths without a finished shard, or twice as many as there are workers
FIRST_NOTE = 3  # deaths
_LEAK_SHARE = 0.02  # growth per shard, of the memory at the start, that counts as a leak
PROVEN = 2  # shards that failed at a worker and passed elsewhere
IN_A_ROW = 3  # shards that failed at a worker since its last success
NODE_FAULTS = 2  # within an hour
MAX_FAILED_STARTS = 10  # in a row, on all nodes together
AVOID_SECONDS = 600.0  # the first time
_HOUR = 3600.0
_REPLACED_SHARE = 0.02  # of the workers, per minute
_OWN_NODES, _OWN_WORKERS = 2, 3  # a shard that fails at so many is the cause


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of a worker's process when its models were loaded and when last measured, and the shards it finished."""

    first: int = 0
    last: int = 0
    shards: int = 0


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


class MemoryDeaths:
    """Counts the workers that were killed for their memory."""

    def __init__(self, solo_attempts: int) -> None:
        self._limit = max(ALONE, solo_attempts)
        self._alone: Counter[str] = Counter()  # thirds of deaths, by shard
        self.in_a_row = 0  # since a lease returned
        self.deaths = 0
        self.note: str | None = None  # the last one

    def record_death(self, worker: WorkerId, use: MemoryUse, recycle: int | None) -> str | None:
        """Record a death. Return a message after three, and then whenever their number has doubled, else None."""
        self.deaths += 1
        self.in_a_row += 1
        which = f"{plural(self.deaths, 'worker')} killed because the memory of a node ran out, which counts against no "
        which += f"shard. The last one is {worker}"
        growth = (use.last - use.first) / max(1, use.shards)
        if use.shards and growth > _LEAK_SHARE * use.first:
            lasted = max(1, use.shards // 2)
            fix = f"restart workers before that by workers.recycle: {min(lasted, recycle - 1) if recycle else lasted}"
            self.note = (
                f"{which}: it grew by {_megabytes(growth)} per shard, from {_megabytes(use.first)} with its models "
                f"loaded to {_megabytes(use.last)} after {use.shards} shards. Its models or their libraries keep "
                f"memory. Correct them, or {fix}"
            )
        else:
            size = f", with {_megabytes(use.last)} after {use.shards} shards" if use.last else ""
            self.note = f"{which}{size}. Lower workers.batch, or give each worker more of its node by workers.cpus"
        doublings, rest = divmod(self.deaths, FIRST_NOTE)
        return self.note if rest == 0 and doublings & (doublings - 1) == 0 else None

    def is_cause(self, shard: str, use: MemoryUse, alone: bool, neighbours: int) -> bool:
        """Whether a shard that was in flight needs more memory than there is; ``neighbours`` counts other workers of
        its node."""
        if alone and use.shards == 0:
            self._alone[shard] += 1 if neighbours else 3
        return self._alone[shard] >= 3 * self._limit

    def check(self, workers: int) -> None:
        """Raise the UserError that ends the run if no shard can be finished, where ``workers`` are running."""
        if self.in_a_row >= max(MAX_IN_A_ROW, 2 * workers):
            raise UserError(f"no shard can be finished: {self.note}")


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.0f} MB"


@dataclass
class _Failing:
    """When a shard failed first, and how often it has."""

    first: float
    count: int = 0


@dataclass
class Outages:
    """Counts the storage errors of a run. ``note`` receives a line when the run begins to wait."""

    settings: Failures
    note: Callable[[str], None]
    held_until: float = 0.0  # nothing is leased before
    left: dict[str, str] = field(default_factory=dict)  # shards that are left for the next run, with their last error
    _failing: dict[str, _Failing] = field(default_factory=dict)  # by shard
    _since_pass: set[str] = field(default_factory=set)  # shards that failed since one passed
    _passed: float = -1.0  # when a shard last passed
    _rounds: int = 0
    _noted: bool = False

    def record_pass(self, shard: str, now: float) -> None:
        self._failing.pop(shard, None)
        self._since_pass.clear()
        self._passed, self._rounds, self.held_until = now, 0, now

    def record_failure(
        self, shard: str, error: StorageFailure, now: float
    ) -> tuple[int, Literal["transient", "own", "lasting"]]:
        """Record a storage error of a shard -> how many it has had, and what they are.

        ``own``: the shard is the cause, and not the storage or the credentials. ``lasting``: it has failed for too
        long, and is left for the next run.
        """
        failing = self._failing.setdefault(shard, _Failing(now))
        failing.count += 1
        self._since_pass.add(shard)
        if now >= self.held_until and len(self._since_pass) > 1:
            self._rounds += 1
            self.held_until = now + pause_seconds(self._rounds)
        known = error.missing or self._passed > failing.first
        if error.reason is not None and failing.count >= self.settings.attempts and known:
            del self._failing[shard]
            self._since_pass.discard(shard)
            return failing.count, "own"
        seconds = self.settings.outage_seconds
        if self._rounds > 1 and not self._noted:
            self._noted = True
            self.note(
                f"the storage fails, which counts against no shard; the run waits for up to {seconds:g} s: {error}"
            )
        if failing.count < 2 or now - failing.first < seconds:
            return failing.count, "transient"
        self.left[shard] = str(error)
        return failing.count, "lasting"

    def check(self) -> None:
        """Raise the StorageError that ends a run which has left shards."""
        if not self.left:
            return
        shard, text = next(reversed(self.left.items()))
        shards = f"{plural(len(self.left), 'shard')}"
        raise StorageError(
            f"{text.rstrip('.')}. So the storage failed for {shards}, such as {shard}, for "
            f"{self.settings.outage_seconds:g} s (failures.outage_seconds). None is quarantined for that."
        )


class Faults:
    """Counts where shards failed and where they passed.

    ``notes`` receives a message when a node is avoided. ``attempts`` of shards are lowered by failures that do not
    count any more.
    """

    def __init__(self, notes: list[str], attempts: Counter[str]) -> None:
        self._notes, self._attempts = notes, attempts
        self._failed: dict[str, Counter[WorkerId]] = {}  # by shard
        self._row: dict[WorkerId, dict[str, float]] = {}  # shards since the last success, with the time
        self._unread: dict[WorkerId, set[str]] = {}  # shards that could not be read, since the last success
        self._proven: dict[WorkerId, set[str]] = {}
        self.failed_starts = 0  # in a row
        self._errors: dict[WorkerId, str] = {}
        self._died: set[WorkerId] = set()
        self.unproven: set[WorkerId] = set()  # replaced, and none of their shards has passed elsewhere
        self._passes: deque[tuple[float, WorkerId]] = deque(maxlen=2)  # the last successes, of different workers
        self._replaced: deque[float] = deque(maxlen=1000)
        self._node_faults: dict[str, list[float]] = {}
        self._avoided: dict[str, float] = {}  # until when

    def tried(self, shard: str) -> frozenset[WorkerId]:
        """The workers at which a shard has failed."""
        return frozenset(self._failed.get(shard, ()))

    def record_place(self, shard: str, worker: WorkerId) -> Counter[WorkerId]:
        """Record where a shard failed. Return all its failures by worker."""
        places = self._failed.setdefault(shard, Counter())
        places[worker] += 1
        return places

    def record_failure(
        self, shard: str, worker: WorkerId, error: str, now: float, workers: int
    ) -> ReplaceWorker | None:
        """Record that a lease raised, where ``workers`` are running. Replace its worker if that is at fault."""
        places = self.record_place(shard, worker)
        self._errors[worker] = error
        row = self._row.setdefault(worker, {})
        row.setdefault(shard, now)
        if len({place.node for place in places}) >= _OWN_NODES or len(places) >= _OWN_WORKERS:
            for place in places:
                self._row.get(place, {}).pop(shard, None)
        # A success of the worker itself empties its row.
        elsewhere = any(passed > min(row.values(), default=now) for passed, _ in self._passes)
        if len(row) >= IN_A_ROW and elsewhere:
            what = f"{len(row)} shards in a row failed there while shards passed elsewhere"
            return self._replacement(worker, what, now, workers)
        return None

    def record_read_failure(self, shard: str, worker: WorkerId, error: str) -> bool:
        """Record that a shard could not be read. Return whether this is its first failure."""
        places = self.record_place(shard, worker)
        self._errors[worker] = error
        self._unread.setdefault(worker, set()).add(shard)
        return places.total() == 1

    def forget_shard(self, shard: str) -> None:
        """Forget where a shard failed, because one of its layers was the cause and is left out from now on."""
        for place in self._failed.pop(shard, ()):
            self._row.get(place, {}).pop(shard, None)

    def record_failed_start(self, worker: WorkerId, error: str, now: float) -> bool:
        """Record that models could not be loaded. Return whether only the node of the worker is at fault."""
        self.failed_starts += 1
        if self.failed_starts > MAX_FAILED_STARTS or not any(other.node != worker.node for _, other in self._passes):
            return False
        self._avoid(worker, self.failed_starts - 1, now, "models cannot be loaded there", error)
        return True

    def record_death(self, shards: tuple[str, ...], worker: WorkerId, error: str) -> None:
        """Record that a worker died, or hung, with ``shards`` in flight."""
        self._died.add(worker)
        self._errors[worker] = error
        for shard in shards:
            self.record_place(shard, worker)

    def record_success(self, shard: str, worker: WorkerId, now: float, workers: int) -> list[ReplaceWorker]:
        """Record that a lease returned. Return the workers that this proves to be at fault."""
        if self._passes and self._passes[-1][1] == worker:
            self._passes.pop()
        self._passes.append((now, worker))
        self._row.pop(worker, None)
        self._proven.pop(worker, None)
        self._unread.pop(worker, None)
        found = []
        for place in self._failed.pop(shard, ()):
            if place == worker:
                continue
            if place in self.unproven:
                self.unproven.discard(place)
                self._give_back(place)
            if place in self._died and place.node != worker.node:
                self._died.discard(place)
                self._count_node_fault(place, now)
            elif shard in self._row.get(place, ()) or shard in self._unread.get(place, ()):
                proven = self._proven.setdefault(place, set())
                proven.add(shard)
                what = f"{len(proven)} shards that failed there passed elsewhere"
                if len(proven) >= PROVEN and (decision := self._replacement(place, what, now, workers)):
                    found.append(decision)
        return found

    def record_replacement(self, worker: WorkerId, now: float) -> None:
        """Record that a worker at fault was replaced. What failed at it does not count as an attempt, once one of its
        shards has passed elsewhere."""
        self._replaced.append(now)
        for counts in (self._row, self._unread):
            counts.pop(worker, None)
        if self._proven.pop(worker, None):
            self._give_back(worker)
            self._count_node_fault(worker, now)
        else:
            self.unproven.add(worker)
            self._died.add(worker)  # if one of its shards passes on another node, its own node is at fault

    def _give_back(self, worker: WorkerId) -> None:
        """Do not count failures at a worker as attempts of its shards, but for those that may be the cause."""
        for shard, places in self._failed.items():
            if worker in places and len(places) < _OWN_WORKERS:
                self._attempts[shard] = max(0, self._attempts[shard] - places[worker])

    def avoided(self, now: float) -> frozenset[str]:
        """The nodes that get no new workers now."""
        return frozenset(node for node, until in self._avoided.items() if now < until)

    def excess_failures(self, worker: WorkerId) -> int:
        """Consecutive failures at a worker beyond the ``IN_A_ROW - 1`` that are normal."""
        return max(0, len(self._row.get(worker, ())) - IN_A_ROW + 1)

    def _replacement(self, worker: WorkerId, what: str, now: float, workers: int) -> ReplaceWorker | None:
        failing = sum(len(row) >= PROVEN for row in self._row.values())
        recent = sum(now - at < 60.0 for at in self._replaced)
        if failing > max(1, workers // 2) or recent >= max(NODE_FAULTS, _REPLACED_SHARE * workers):
            return None
        return ReplaceWorker(worker, f"{what}; the last error: {self._errors[worker]}")

    def _count_node_fault(self, worker: WorkerId, now: float) -> None:
        faults = [at for at in self._node_faults.get(worker.node, []) if now - at < _HOUR] + [now]
        self._node_faults[worker.node] = faults
        if len(faults) < NODE_FAULTS:
            return
        what = f"what failed at {len(faults)} of its workers passed elsewhere"
        self._avoid(worker, len(faults) - NODE_FAULTS, now, what, self._errors.get(worker, "none"))

    def _avoid(self, worker: WorkerId, doublings: int, now: float, what: str, error: str) -> None:
        """Start no workers on the node of a worker for a time, and say why."""
        seconds = min(_HOUR, AVOID_SECONDS * 2.0**doublings)
        self._avoided[worker.node] = now + seconds
        self._notes.append(
            f"node {worker.place} gets no new workers for {seconds / 60:.0f} minutes, because {what}. Check its disks, "
            f"TMPDIR, mounts and accelerators. The last error: {error}"
        )
