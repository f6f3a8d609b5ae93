"""Workers that are killed for their memory: pure policy.

- Such a death counts against no shard, since a worker that leaks memory fails at any shard.
- Only a shard that kills a new worker alone is quarantined, after ``ALONE`` times. If other workers share the memory of
  the node, such a death counts a third.
- If many workers die and no shard is finished in between, the run ends with one error.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from reinforce.engine.messages.results import WorkerId
from reinforce.errors import UserError
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
