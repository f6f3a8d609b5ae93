"""State that the parts of the driver share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from reinforce.cluster import live_resources
from reinforce.dataset.files.store import Store
from reinforce.engine.driver.policy.failures import FailurePolicy
from reinforce.engine.driver.shard_queue import ShardQueue
from reinforce.engine.driver.worker_pool import Slot, WorkerPool
from reinforce.engine.plan.plan import Plan
from reinforce.engine.record.events import Events
from reinforce.engine.record.progress import Progress, Snapshot
from reinforce.engine.record.summary import RunTotals
from teachers.redact import Redactor


class RunState:
    """The state of a run. ``config`` is that of the plan with the workers fitted to the cluster, and ``needed`` are the
    layers that some shard lacks."""

    def __init__(self, plan: Plan, store: Store, progress: Progress) -> None:
        self.plan, self.store, self.progress = plan, store, progress
        self.needed = frozenset(name for shard in plan.pending for name in shard.layers)
        models = any(plan.layers[name].loads_model for name in self.needed)
        workers = plan.config.workers.fitted_to(live_resources(), models)
        self.config = plan.config.model_copy(update={"workers": workers})
        self.redact = Redactor(self.config.model_dump(mode="json"))
        self.queue, self.totals = ShardQueue(plan.pending), RunTotals()
        self.policy = FailurePolicy(self.config.failures, plan.layers, plan.shards, plan.quarantined, workers.recycle)
        self.events = Events(store, self.config, self.redact)
        self.pool = WorkerPool(self.config, plan.layers, self.needed)
        self.silent: Sequence[Slot] = ()  # workers with leases that have not answered for some seconds

    def log(self, text: str) -> None:
        """Print a line for the user, without secrets."""
        self.progress.log(self.redact(text))

    def snapshot(self, now: float) -> Snapshot:
        return Snapshot(
            shards_done=len(self.totals.finished),
            shards=len(self.plan.pending),
            samples=max(self.totals.samples, self.pool.samples),
            samples_done=self.totals.samples,
            busy=self.pool.busy,
            alive=self.pool.alive(now),
            workers=len(self.pool.started),
            quarantined_shards=len(self.policy.quarantined),
            refused_rows=sum(self.totals.refused.values()),
            silent=self._silent_hosts(),
            starting=len(self.pool.loading),
        )

    def _silent_hosts(self) -> Counter[str]:
        """The number of shards that wait for a host which does not answer, and may be lost, by its name."""
        shards = Counter[str]()
        for slot in self.silent:
            if slot in self.pool.started:
                shards[slot.id.place] += len(slot.leases)
        for death in self.policy.deaths:  # not known to be lost yet
            shards[death.worker.id.place] += len(death.worker.shards)
        return shards
