"""Policy: which failures are caused by a worker or its node, and not by a shard. Pure.

A shard that fails at one worker and passes at another was not the cause. The first worker was, or its node (a full
disk, a bad accelerator, a missing mount).

- A shard that failed is tried elsewhere: on another node where there is one, else at another worker.
- A worker is replaced when two shards that failed at it have passed elsewhere, or when three different shards in a row
  failed at it while others passed. A shard that fails on two nodes, or at three workers, is itself the cause.
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

from reinforce.engine.driver.policy.decisions import ReplaceWorker
from reinforce.engine.messages.results import WorkerId

PROVEN = 2  # shards that failed at a worker and passed elsewhere
IN_A_ROW = 3  # shards that failed at a worker since its last success
NODE_FAULTS = 2  # within an hour
MAX_FAILED_STARTS = 10  # in a row, on all nodes together
AVOID_SECONDS = 600.0  # the first time
_HOUR = 3600.0
_REPLACED_SHARE = 0.02  # of the workers, per minute
_OWN_NODES, _OWN_WORKERS = 2, 3  # a shard that fails at so many is the cause


class Faults:
    """Counts where shards failed and where they passed. ``notes`` receives a message when a node is avoided."""

    def __init__(self, notes: list[str]) -> None:
        self._notes = notes
        self._failed: dict[str, Counter[WorkerId]] = {}  # by shard
        self._row: dict[WorkerId, dict[str, float]] = {}  # shards since the last success, with the time
        self._unread: dict[WorkerId, set[str]] = {}  # shards that could not be read, since the last success
        self._proven: dict[WorkerId, set[str]] = {}
        self._failed_starts = 0  # in a row
        self._errors: dict[WorkerId, str] = {}
        self._died: set[WorkerId] = set()
        self._unproven: set[WorkerId] = set()  # replaced, and none of their shards has passed elsewhere
        self._passes: deque[tuple[float, WorkerId]] = deque(maxlen=2)  # the last successes, of different workers
        self._given_back: Counter[str] = Counter()
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

    def is_doubtful(self, shard: str) -> bool:
        """Whether a shard failed at a replaced worker that another shard may have broken."""
        return not self._unproven.isdisjoint(self._failed.get(shard, ()))

    def forget_shard(self, shard: str) -> None:
        """Forget where a shard failed, because one of its layers was the cause and is left out from now on."""
        for place in self._failed.pop(shard, ()):
            self._row.get(place, {}).pop(shard, None)

    def record_start(self) -> None:
        self._failed_starts = 0

    def record_failed_start(self, worker: WorkerId, error: str, now: float) -> bool:
        """Record that models could not be loaded. Return whether only the node of the worker is at fault."""
        self._failed_starts += 1
        if self._failed_starts > MAX_FAILED_STARTS or not any(other.node != worker.node for _, other in self._passes):
            return False
        seconds = self._avoid(worker.node, AVOID_SECONDS * 2.0 ** (self._failed_starts - 1), now)
        self._notes.append(_avoidance(worker, seconds, "models cannot be loaded there", error))
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
            if place in self._unproven:
                self._unproven.discard(place)
                self._given_back.update(self._failures_at(place))
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
        self._replaced.append(now)
        for counts in (self._row, self._unread):
            counts.pop(worker, None)
        if self._proven.pop(worker, None):
            self._given_back.update(self._failures_at(worker))
            self._count_node_fault(worker, now)
        else:
            self._unproven.add(worker)
            self._died.add(worker)  # if one of its shards passes on another node, its own node is at fault

    def take_attempts_back(self) -> Counter[str]:
        """Failures by shard that do not count as attempts any more, once."""
        given_back, self._given_back = self._given_back, Counter()
        return given_back

    def _failures_at(self, worker: WorkerId) -> dict[str, int]:
        """Failures at a worker by shard, of shards that may not be the cause themselves."""
        found = self._failed.items()
        return {shard: places[worker] for shard, places in found if worker in places and len(places) < _OWN_WORKERS}

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
        seconds = self._avoid(worker.node, AVOID_SECONDS * 2.0 ** (len(faults) - NODE_FAULTS), now)
        what = f"what failed at {len(faults)} of its workers passed elsewhere"
        self._notes.append(_avoidance(worker, seconds, what, self._errors.get(worker, "none")))

    def _avoid(self, node: str, seconds: float, now: float) -> float:
        seconds = min(_HOUR, seconds)
        self._avoided[node] = now + seconds
        return seconds


def _avoidance(worker: WorkerId, seconds: float, what: str, error: str) -> str:
    return (
        f"node {worker.place} gets no new workers for {seconds / 60:.0f} minutes, because {what}. Check its disks, "
        f"TMPDIR, mounts and accelerators. The last error: {error}"
    )
