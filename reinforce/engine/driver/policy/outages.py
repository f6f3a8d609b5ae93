"""Storages that fail: pure policy.

- A storage error counts against no shard. The shard is tried again until ``failures.outage_seconds`` have passed since
  its first; then it is left for the next run, and the run ends with one error when the others are finished.
- While storage errors come from several shards and none passes, the run leases nothing for pauses that double up to a
  minute. Whoever fails takes fresh credentials.
- A file that does not exist is believed after ``failures.attempts``, and one that may not be read if another shard has
  passed since it was first refused: then the storage and the credentials work, and the shard is quarantined.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from reinforce.config import Failures
from reinforce.engine.messages.results import StorageFailure
from reinforce.errors import StorageError
from reinforce.processes.attempts import pause_seconds
from reinforce.terminal import plural


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
