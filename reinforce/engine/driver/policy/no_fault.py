"""Workers that are killed for their memory, and storages that fail: pure policy. Neither counts against a shard.

- A worker that leaks memory fails at any shard. Only a shard that kills a new worker alone is quarantined, after
  ``ALONE`` times. If other workers share the memory of the node, such a death counts a third.
- If many workers die and no shard is finished in between, the run ends with one error.
- After a storage error a shard is tried again until ``failures.outage_seconds`` have passed since its first; then it is
  left for the next run, and the run ends with one error when the others are finished.
- While storage errors come from several shards and none passes, the run leases nothing for pauses that double up to a
  minute. Whoever fails takes fresh credentials.
- A file that does not exist is believed after ``failures.attempts``, and one that may not be read if another shard has
  passed since it was first refused: then the storage and the credentials work, and the shard is quarantined.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from reinforce.config import Failures
from reinforce.engine.messages.results import StorageFailure, WorkerId
from reinforce.errors import StorageError, UserError
from reinforce.processes.attempts import pause_seconds
from reinforce.terminal import plural

ALONE = 3
MAX_IN_A_ROW = 10  # deaths without a finished shard, or twice as many as there are workers
FIRST_NOTE = 3  # deaths
_LEAK_SHARE = 0.02  # growth per shard, of the memory at the start, that counts as a leak


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of a worker's process when its models were loaded and when last measured, and the shards it finished."""

    first: int = 0
    last: int = 0
    shards: int = 0


class MemoryDeaths:
    """Counts the workers that were killed for their memory."""

    def __init__(self, solo_attempts: int) -> None:
        self._limit = max(ALONE, solo_attempts)
        self._alone: Counter[str] = Counter()  # thirds of deaths, by shard
        self._in_a_row = 0
        self.deaths = 0
        self.note: str | None = None  # the last one

    def record_success(self) -> None:
        self._in_a_row = 0

    def record_death(self, worker: WorkerId, use: MemoryUse, recycle: int | None) -> str | None:
        """Record a death. Return a message after three, and then whenever their number has doubled, else None."""
        self.deaths += 1
        self._in_a_row += 1
        self.note = _describe(self.deaths, worker, use, recycle)
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
        if self._in_a_row >= max(MAX_IN_A_ROW, 2 * workers):
            raise UserError(f"no shard can be finished: {self.note}")


def _describe(deaths: int, worker: WorkerId, use: MemoryUse, recycle: int | None) -> str:
    which = f"{plural(deaths, 'worker')} killed because the memory of a node ran out, which counts against no "
    which += f"shard. The last one is {worker}"
    growth = (use.last - use.first) / max(1, use.shards)
    if use.shards and growth > _LEAK_SHARE * use.first:
        lasted = max(1, use.shards // 2)
        fix = f"restart workers before that by workers.recycle: {min(lasted, recycle - 1) if recycle else lasted}"
        return (
            f"{which}: it grew by {_megabytes(growth)} per shard, from {_megabytes(use.first)} with its models "
            f"loaded to {_megabytes(use.last)} after {use.shards} shards. Its models or their libraries keep memory. "
            f"Correct them, or {fix}"
        )
    size = f", with {_megabytes(use.last)} after {use.shards} shards" if use.last else ""
    return f"{which}{size}. Lower workers.batch, or give each worker more of its node by workers.cpus"


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

    def record_failure(self, shard: str, now: float) -> int:
        """Record a storage error of a shard -> how many it has had."""
        failing = self._failing.setdefault(shard, _Failing(now))
        failing.count += 1
        self._since_pass.add(shard)
        if now >= self.held_until and len(self._since_pass) > 1:
            self._rounds += 1
            self.held_until = now + pause_seconds(self._rounds)
        return failing.count

    def is_own(self, shard: str, error: StorageFailure) -> bool:
        """Whether a shard is the cause of its storage errors, and not the storage or the credentials."""
        failing = self._failing[shard]
        known = error.missing or self._passed > failing.first
        return error.reason is not None and failing.count >= self.settings.attempts and known

    def is_over(self, shard: str, error: str, now: float) -> bool:
        """Whether a shard has failed for too long, and is left for the next run."""
        if self._rounds > 1 and not self._noted:
            self._noted = True
            seconds = self.settings.outage_seconds
            self.note(
                f"the storage fails, which counts against no shard; the run waits for up to {seconds:g} s: {error}"
            )
        failing = self._failing[shard]
        if failing.count < 2 or now - failing.first < self.settings.outage_seconds:
            return False
        self.left[shard] = error
        return True

    def forget(self, shard: str) -> None:
        """Forget the errors of a shard that is quarantined."""
        self._failing.pop(shard, None)
        self._since_pass.discard(shard)

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
