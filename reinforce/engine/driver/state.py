"""What the driver shares with its parts."""

from __future__ import annotations

from dataclasses import dataclass

from reinforce.config import Config
from reinforce.dataset.files.store import Store
from reinforce.engine.driver.policy.failures import FailurePolicy
from reinforce.engine.driver.pool import Pool
from reinforce.engine.driver.shard_queue import ShardQueue
from reinforce.engine.plan.plan import Plan
from reinforce.engine.record.events import Events
from reinforce.engine.record.progress import Progress, Snapshot
from reinforce.engine.record.summary import RunTotals
from teachers.redact import Redactor


@dataclass(frozen=True)
class RunState:
    """The state of a run. ``config`` is that of the plan with the workers fitted to the cluster."""

    plan: Plan
    config: Config
    store: Store
    queue: ShardQueue
    pool: Pool
    policy: FailurePolicy
    totals: RunTotals
    events: Events
    progress: Progress
    redact: Redactor

    def log(self, text: str) -> None:
        """Print a line for the user, without secrets."""
        self.progress.log(self.redact(text))

    def snapshot(self, now: float) -> Snapshot:
        """The totals at time ``now``."""
        return Snapshot(
            shards_done=len(self.totals.finished),
            shards=len(self.plan.pending),
            samples=max(self.totals.samples, self.pool.samples),
            samples_done=self.totals.samples,
            busy=self.pool.busy,
            alive=self.pool.alive(now),
            workers=self.pool.started_count,
            quarantined_shards=len(self.policy.quarantined),
            refused_rows=sum(self.totals.refused.values()),
        )
