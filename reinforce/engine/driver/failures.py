"""What happens to shards and workers when something fails, and when a worker counts as hung: pure policy.

No Ray, no storage, and times are arguments. The driver reports what happened and carries out the decisions that are
returned (`faults.py`).

- A lease that raises is retried after a pause, a few times. Then the shard is quarantined in the layer whose model
  raised, or in its first missing layer if no model did. Layers that do not need that one are retried.
- When a worker's process dies, every shard in flight in it becomes a suspect and runs alone next. Only a shard that
  kills its process alone, ``failures.solo_attempts`` times, is quarantined.
- A worker in which a shard makes no progress is killed. That shard is a suspect. The other shard of the worker is
  leased again, and is a suspect only if this happens to it a second time.
- A lost node counts against no shard.
- Ray drains a node after a preemption notice, a SIGTERM to its `ray start --block`, `ray drain-node`, or when an
  autoscaler removes it. Its workers get no further leases, finish those in flight, and are ended, so that Ray can end
  the node before its deadline. A shard that is still in flight when the node ends is leased again; it is no suspect.
- A worker at which three leases in a row fail is replaced. Storage errors do not count, unless the shards pass
  elsewhere (`faults.py`). While they do not count, the worker is paused between its leases. A model that fails at
  more than three workers and passes at none replaces no further worker.
- A storage error, and a worker that is killed for its memory, count against no shard (`faults.py`). Where the memory
  of its device runs out, a worker halves its batches, and the run stops only if a single input does not fit
  (`worker/models.py`).
- The last attempt of a shard that failed at a replaced worker runs alone, in case another shard had broken the
  worker. If it fails there, too, the worker is replaced.
- An error that the user must fix (a fingerprint, missing weights, a full disk) stops the run at once.
- Too many quarantined shards stop the run, and so do workers that die or hang again and again while they load their
  models.

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

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from reinforce.config import Failures
from reinforce.dataset.layers import SAMPLES, Layer
from reinforce.engine.driver.faults import (
    Death,
    DeathVerdict,
    Decision,
    EndedWorker,
    Faults,
    LeaveShard,
    MemoryDeaths,
    Outages,
    PauseWorker,
    Quarantine,
    ReplaceWorker,
    Requeue,
    Retry,
    RunAlone,
)
from reinforce.engine.messages import (
    LayerFailure,
    LoadFailure,
    PendingShard,
    ShardFailure,
    StorageFailure,
    WorkerId,
)
from reinforce.engine.pulse import (
    DECODING,
    PREPARING,
    READING,
    UNLIMITED_STAGES,
    WRITING,
    LeasePulse,
    Pulse,
)
from reinforce.errors import RayEnded, TooManyQuarantined, UserError
from reinforce.processes.attempts import pause_seconds
from schemas import Reason

FACTOR = 20.0
CEILING = 3600.0
MODEL_FLOOR = 300.0
STORAGE_FLOOR = 900.0  # retries of a storage that does not answer take minutes
_STORAGE_STAGES = (READING, DECODING, WRITING, PREPARING)
_DECODE_ATTEMPTS = 2.5  # times failures.sample_seconds; a decode process that hangs is replaced by then
MAX_WORKER_FAILURES = 3  # leases in a row
MAX_MODEL_WORKERS = 3  # a model that fails at more, and passes at none, is itself the cause
MAX_FAILED_STARTS = 3  # in a row; with more workers, two for each
TOLERATED_SHARDS = 10  # quarantined shards that never stop a run
NODE_VERDICT_SECONDS = 60.0  # time that Ray may take to notice a lost node


class FailurePolicy:
    """Counts the failures of a run and decides what happens next.

    ``layers`` are all layers of the run, ``shards`` the number of source shards, ``quarantined_before`` those that
    earlier runs have quarantined, and ``recycle`` the number of shards after which workers are restarted.
    """

    def __init__(
        self,
        settings: Failures,
        layers: Mapping[str, Layer],
        shards: int,
        quarantined_before: int,
        recycle: int | None = None,
    ) -> None:
        self.settings, self.layers, self.shards, self.recycle = settings, layers, shards, recycle
        self.deaths: list[Death] = []  # not decided yet, since the node may be lost
        self.quarantined: set[str] = set()  # shards, by this run
        self._quarantined_before = quarantined_before
        self._attempts: Counter[str] = Counter()
        self._deaths_alone: Counter[str] = Counter()
        self._bystanders: set[str] = set()  # shards in a worker in which another shard hung
        self.consecutive_failures: Counter[WorkerId] = Counter()  # leases since the worker's last success
        self._charged_failures: Counter[WorkerId] = Counter()  # those of them that the worker may be the cause of
        self._failed_models: dict[str, set[WorkerId]] = {}  # by layer: where its model raised, since it last passed
        self.notes: list[str] = []  # messages about workers and nodes, for the log and the summary
        self.faults = Faults(self.notes, self._attempts)
        self.drained: frozenset[str] = frozenset()  # nodes that are or were drained; a drain is never cancelled
        self.memory = MemoryDeaths(settings.solo_attempts)
        self.outages = Outages(settings, self.notes.append)
        self._failed_starts = 0

    @property
    def quarantined_shards(self) -> int:
        """Number of quarantined shards, those of earlier runs included."""
        return self._quarantined_before + len(self.quarantined)

    @property
    def undecided_shards(self) -> int:
        """Number of shards of dead workers whose verdict is not known yet."""
        return sum(len(death.worker.shards) for death in self.deaths)

    def add_notes(self, notes: Iterable[str]) -> None:
        """Add messages of a worker, without repetitions."""
        self.notes.extend(note for note in notes if note not in self.notes)

    def lease_raised(
        self, shard: PendingShard, error: Exception, now: float
    ) -> Retry | RunAlone | Quarantine | LeaveShard:
        """Decide about a lease that raised. Raises a UserError, which only the user can fix."""
        if isinstance(error, UserError):
            raise error
        if isinstance(error, StorageFailure):
            attempt, found = self.outages.record_failure(shard.name, error, now)
            if found == "own" and error.reason is not None:
                return self._quarantine(shard, shard.layers[0], error.reason, str(error), attempt)
            if found == "lasting":
                return LeaveShard(shard, attempt)
            return Retry(shard, now + pause_seconds(attempt), attempt)
        self._attempts[shard.name] += 1
        attempt = self._attempts[shard.name]
        if attempt < self.settings.attempts:
            if self._may_have_broken_worker(shard.name, error):
                return RunAlone(shard, attempt)
            return Retry(shard, now + pause_seconds(attempt), attempt)
        layer = error.layer if isinstance(error, LayerFailure) else shard.layers[0]
        return self._quarantine(shard, layer, Reason.SHARD_FAILED, error_text(error), attempt)

    def lease_returned(
        self, shard: str, worker: WorkerId, quarantined: bool, now: float, workers: int, layers: Iterable[str] = ()
    ) -> list[ReplaceWorker]:
        """Record that a lease returned with ``layers``, where ``workers`` are running. Replace workers that this proves
        to be at fault.

        A ``quarantined`` shard was refused, which proves nothing about workers at which it failed before.
        """
        self.forget_worker(worker)
        self.memory.in_a_row = 0
        if quarantined:
            return []
        self.outages.record_pass(shard, now)
        for layer in layers:
            self._failed_models.pop(layer, None)
        return self.faults.record_success(shard, worker, now, workers)

    def worker_failed(
        self, worker: WorkerId, shard: str, error: Exception, text: str, now: float, workers: int
    ) -> ReplaceWorker | PauseWorker | None:
        """Decide about a worker at which a lease raised ``error``, where ``workers`` are running.

        ``text`` is that of the error, without secrets.
        """
        self.consecutive_failures[worker] += 1
        if isinstance(error, LayerFailure):
            places = self._failed_models.setdefault(error.layer, set())
            places.add(worker)
            if len(places) > MAX_MODEL_WORKERS:
                self.faults.record_place(shard, worker)
                return None
        self._charged_failures[worker] += getattr(error, "worker_at_fault", True)
        if self._may_have_broken_worker(shard, error):
            return ReplaceWorker(worker, f"{shard} failed there for the last time and may have broken it: {text}")
        if replacement := self.faults.record_failure(shard, worker, text, now, workers):
            return replacement
        if (charged := self._charged_failures[worker]) >= MAX_WORKER_FAILURES:
            return ReplaceWorker(worker, f"{charged} leases in a row have failed at it; the last error: {text}")
        if workers > 1 and (failures := self.faults.excess_failures(worker)):
            return PauseWorker(worker, now + pause_seconds(failures))
        return None

    def forget_worker(self, worker: WorkerId) -> None:
        """Reset the failures in a row of a worker, which has succeeded or ended."""
        self.consecutive_failures.pop(worker, None)
        self._charged_failures.pop(worker, None)

    def _may_have_broken_worker(self, shard: str, error: Exception) -> bool:
        """Whether a shard has one attempt left, and failed at a replaced worker that another shard may have broken."""
        last = self._attempts[shard] == self.settings.attempts - 1
        doubtful = not self.faults.unproven.isdisjoint(self.faults.tried(shard))
        return last and doubtful and getattr(error, "worker_at_fault", True)

    def worker_died(
        self, worker: EndedWorker, error: str, now: float, process_dead: bool, memory: bool = False
    ) -> None:
        """Record a death, ``memory`` if it was killed because the memory of its node ran out.

        Unless the process is known to be dead, its node may be about to be reported as lost.
        """
        deadline = now if process_dead else now + NODE_VERDICT_SECONDS
        self.deaths.append(Death(worker, error, deadline, memory=memory))

    def worker_hung(self, worker: EndedWorker, hang: Hang, now: float) -> None:
        self.deaths.append(Death(worker, hang.reason, now, hung=True, cause=hang.shards))

    def judge_deaths(self, now: float, live_nodes: Callable[[], Collection[str]]) -> list[DeathVerdict]:
        """Decide about the shards of dead workers, as soon as it is known whether their node is lost.

        ``live_nodes`` is called at most once, because it is a request to the cluster. A drained node counts as lost.
        """
        if not self.deaths:
            return []
        # What dies on a drained node dies with the node.
        alive, verdicts, undecided = frozenset(live_nodes()) - self.drained, [], []
        for death in self.deaths:
            node_lost = death.worker.id.node not in alive
            if node_lost or now >= death.deadline:
                worker = death.worker
                if node_lost:
                    pass
                elif not death.memory:
                    self.faults.record_death(tuple(shard.name for shard in worker.shards), worker.id, death.error)
                elif note := self.memory.record_death(worker.id, worker.use, self.recycle):
                    self.notes.append(note)
                decisions = tuple(self._judge_shard(shard, death, node_lost) for shard in death.worker.shards)
                verdicts.append(DeathVerdict(death, node_lost, decisions))
            else:
                undecided.append(death)
        self.deaths = undecided
        return verdicts

    def record_drains(self, deadlines: Mapping[str, int], now: float) -> dict[str, float | None]:
        """Record the nodes that Ray drains, with deadlines in ms since 1970, or 0.

        Returns those that are new, with the seconds until Ray expects them to end, None without a deadline.
        """
        new = {node: at for node, at in sorted(deadlines.items()) if node not in self.drained}
        self.drained |= new.keys()
        return {node: max(0.0, at / 1000 - now) if at else None for node, at in new.items()}

    def shard_quarantined(self, name: str, cause: str) -> None:
        """Count a quarantined shard. Raises TooManyQuarantined if too many are: they probably share a cause
        (credentials, a disk) that would fail the rest as well."""
        self.quarantined.add(name)
        count, share = self.quarantined_shards, self.settings.allowed_share
        if count > max(TOLERATED_SHARDS, share * self.shards):
            raise TooManyQuarantined(
                f"stopped: {count:,} of {self.shards:,} shards are quarantined, more than failures.allowed_share = "
                f"{share:g}. They probably share the cause of the last one, {name}: {cause.rstrip('.')}. Fix it and "
                "run with --retry-quarantined."
            )

    def read_failed(self, shard: PendingShard, reason: str, worker: WorkerId, nodes: int, now: float) -> Retry | None:
        """Decide about a shard that could not be read; ``nodes`` is the number of nodes with workers."""
        if reason not in (Reason.SHARD_MISSING.value, Reason.SHARD_UNREADABLE.value) or SAMPLES not in shard.layers:
            return None
        first = self.faults.record_read_failure(shard.name, worker, reason)
        if not first or nodes == 1:
            return None
        self.consecutive_failures[worker] += 1
        return Retry(shard, now + pause_seconds(1), 1)

    def load_raised(self, error: Exception, now: float) -> None:
        """Record that a worker could not load its models. Raises UserError unless shards pass on other nodes."""
        if not isinstance(error, LoadFailure):
            raise UserError(f"a worker could not load its models: {type(error).__name__}: {error}")
        if not self.faults.record_failed_start(error.worker, str(error), now):
            raise error.error

    def load_passed(self) -> None:
        self._failed_starts = 0
        self.faults.failed_starts = 0

    def load_died(self, error: str, node_lost: bool, running: int, workers: int) -> None:
        """Record that a worker died, or its node was lost, while it loaded its models.

        ``running`` workers have loaded theirs; the cluster can hold ``workers``. Raises UserError if too many died.
        """
        self._failed_starts += not node_lost
        if not running and self._failed_starts >= max(MAX_FAILED_STARTS, 2 * workers):
            raise UserError(
                f"workers die while they load their models ({error.splitlines()[0]}). Check the memory of the nodes "
                "and the Ray logs."
            )

    def load_hung(self, worker: WorkerId, limit: str, now: float, running: int) -> None:
        """Record that a worker was killed because it did not load its models within a ``limit``, where others are
        ``running``. Raises UserError after three in a row with none running."""
        self._failed_starts += 1
        error = f"the worker hung while it loaded its models (limit: {limit})"
        self.faults.record_failed_start(worker, error, now)
        if not running and self._failed_starts >= MAX_FAILED_STARTS:
            raise UserError(
                f"workers hang while they load their models: {self._failed_starts} in a row were killed, the last one "
                f"{worker} (limit: {limit}). Check that its node reaches the weights and can use its accelerator; if "
                "loading is only slow, raise workers.start_timeout."
            )

    def _judge_shard(self, shard: PendingShard, death: Death, node_lost: bool) -> Decision:
        if node_lost:
            return Requeue(shard)
        if death.memory:
            worker = death.worker
            if self.memory.is_cause(shard.name, worker.use, worker.alone, worker.neighbours):
                detail = f"alone, in a worker that had just started, it needs more memory than there is: {death.error}"
                return self._quarantine(shard, shard.layers[0], Reason.SHARD_CRASHED, detail, 0)
            return RunAlone(shard) if worker.alone or worker.use.shards == 0 else Requeue(shard)
        if death.cause and shard.name not in death.cause and shard.name not in self._bystanders:
            self._bystanders.add(shard.name)
            return Requeue(shard)
        self._deaths_alone[shard.name] += death.worker.alone
        deaths = self._deaths_alone[shard.name]
        if deaths < self.settings.solo_attempts:
            return RunAlone(shard)
        reason, detail = Reason.SHARD_HUNG, death.error
        if not death.hung:
            reason = Reason.SHARD_CRASHED
            detail = f"its worker died each time that it ran this shard alone, {deaths} times: {death.error}"
        return self._quarantine(shard, shard.layers[0], reason, detail, deaths)

    def _quarantine(self, shard: PendingShard, layer: str, reason: Reason, detail: str, attempt: int) -> Quarantine:
        lost = {layer}
        for name in shard.layers:  # each after the layers it needs
            if not lost.isdisjoint(self.layers[name].needs):
                lost.add(name)
        rest = tuple(name for name in shard.layers if name not in lost)
        self._attempts[shard.name] = self._deaths_alone[shard.name] = 0
        self.faults.forget_shard(shard.name)
        return Quarantine(shard, layer, reason, detail, replace(shard, layers=rest) if rest else None, attempt)


def ray_ended(what: str, finished: int, remaining: int) -> RayEnded:
    """The error for a run whose driver finds that a process of Ray has ended."""
    return RayEnded(
        f"{what} was killed, perhaps for lack of memory, or crashed. Finished shards are kept ({finished:,}); "
        f"{remaining:,} are left. Run the same command again to resume."
    )


def error_text(error: Exception) -> str:
    """The text of an error that a lease raised."""
    return str(error) if isinstance(error, ShardFailure) else f"{type(error).__name__}: {error}"


@dataclass(frozen=True)
class Hang:
    """Reason why a worker counts as hung, with the ``shards`` that are the cause and their ``stages``; empty if the
    cause is not known."""

    reason: str
    shards: frozenset[str] = frozenset()
    stages: frozenset[str] = frozenset()


class StallLimits:
    """The longest time that a step of a lease may take, by its stage."""

    def __init__(self, settings: Failures) -> None:
        self._explicit = settings.stall_seconds
        self._decoding = max(STORAGE_FLOOR, _DECODE_ATTEMPTS * settings.sample_seconds)
        self._slowest: dict[str, float] = {}
        self.least = MODEL_FLOOR if self._explicit is None else self._explicit
        self.hung: set[str] = set()  # stages in which a lease was over the limit; they do not get an hour again

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
            return STORAGE_FLOOR if stage in self.hung else floor if stage in _STORAGE_STAGES else CEILING
        # A step that once took longer than the ceiling must be able to pass again.
        return max(floor, min(FACTOR * slowest, CEILING), 3.0 * slowest)

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
        self._start_timeout = start_timeout
        self.slowest = 0.0  # of the loads that have passed

    @property
    def seconds(self) -> float:
        return max(self._start_timeout, 3.0 * self.slowest)

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
    if not stuck:
        return None
    reasons = []
    for lease in stuck:
        image = lease.stage == DECODING and pulse.key is not None
        decoding = f"; longest in a decode process: key {pulse.key!r}" if image else ""
        reasons.append(
            f"{lease.shard} has made no progress for {lease.seconds:.0f} s in {_where(lease)}{decoding} "
            f"(limit: {limits.origin(lease.stage)})"
        )
    return Hang("; ".join(reasons), frozenset(one.shard for one in stuck), frozenset(one.stage for one in stuck))


def find_silence(seconds: float, pulse: Pulse, limits: StallLimits) -> Hang | None:
    """The hang of a worker whose last answer was ``pulse`` and that has not answered for ``seconds`` since, or None.

    Its limit is that of the stage with the largest one. Which of its shards hangs is not known.
    """
    stages = [lease.stage for lease in pulse.leases if lease.stage not in UNLIMITED_STAGES]
    slowest = max(stages, key=limits.seconds, default="")
    if seconds <= limits.seconds(slowest):
        return None
    seen = "; ".join(f"{one.shard} in {_where(one)}" for one in pulse.leases)
    at = f"; at its last answer it was at {seen}" if seen else ""
    reason = f"the worker has not answered for {seconds:.0f} s, as if something in it holds the interpreter lock{at}"
    return Hang(f"{reason} (limit: {limits.origin(slowest)})", stages=frozenset([slowest]))


def _where(lease: LeasePulse) -> str:
    where = lease.stage if lease.stage in (*UNLIMITED_STAGES, *_STORAGE_STAGES) else f"layer {lease.stage}"
    return f"{where} ({lease.what})" if lease.what else where
