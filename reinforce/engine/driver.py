"""The driver: plans what is missing, leases shards to workers, and sees every one of them to an end.

What it does when something fails:

- a lease that raises is tried again a few times; then the layer whose model raised (or the shard) is quarantined;
- when a worker's process dies, every shard in flight in it is a suspect and runs alone next; only a shard that
  kills its process alone, again and again, is quarantined;
- a worker that is at one image for too long, or gets on with nothing, is ended, and its shards are suspects likewise;
- a node that is lost counts against nobody;
- a worker at which one shard after the other fails, not for a storage's sake, is replaced;
- what is the user's to mend (a fingerprint, missing weights, a full disk) ends the run at once.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import random
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError

from reinforce.cluster import cause_of, is_node_alive
from reinforce.config import Config
from reinforce.dataset.layers import SAMPLES
from reinforce.dataset.manifest import update_manifest
from reinforce.dataset.store import MANIFEST, Store
from reinforce.engine.events import Events
from reinforce.engine.outcome import LayerFailure, ShardFailure, ShardResult
from reinforce.engine.plan import Plan, Work
from reinforce.engine.pool import Pool, Slot
from reinforce.engine.progress import Progress, Snapshot
from reinforce.engine.summary import RunSummary, verdict
from reinforce.engine.worker import SHARDS_IN_FLIGHT, Started
from reinforce.errors import UserError
from schemas import Reason
from teachers.redact import Redactor

_TICK = 0.5
_POLL_SECONDS = 5.0
_MOST_POLLED = 256  # workers asked at a time, in turns, for their counts between shards
_FAILURES_OF_A_WORKER = 3
_FEW_SHARDS = 10  # given up, before a run is stopped for their share
_MAX_FAILED_STARTS = 3
_NODE_VERDICT_SECONDS = 60.0  # Ray takes up to that long to notice that a node is gone


@dataclass(frozen=True)
class Death:
    """A worker that is gone; by ``deadline`` its node counts as standing if it is not known to be lost."""

    worker: Started
    works: list[Work]
    alone: bool
    why: str
    deadline: float
    reason: Reason = Reason.SHARD_CRASHED


class Driver:
    """Runs one plan to its end on the Ray cluster that is initialised."""

    def __init__(self, plan: Plan, store: Store, progress: Progress) -> None:
        self.plan, self.store, self.progress = plan, store, progress
        self.config: Config = plan.config
        self.tell = Redactor(self.config.model_dump(mode="json"))
        self.queue: deque[Work] = deque(plan.work)
        self.suspects: deque[Work] = deque()
        self.delayed: list[tuple[float, int, Work]] = []
        self.deaths: list[Death] = []
        self.tie = itertools.count()
        self.attempts: Counter[str] = Counter()
        self.deaths_alone: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.cleaned: dict[str, Counter[str]] = {}
        self.finished: set[str] = set()
        self.quarantined: set[str] = set()
        self.samples = self.bytes = 0
        self.busy = 0.0
        self.manifest_written = False

    def run(self) -> RunSummary:
        start = time.monotonic()
        self.events = Events(self.store, self.config, self.tell)
        needed = frozenset(name for work in self.plan.work for name in work.layers)
        self.events.add("start", shards=len(self.plan.work), layers=sorted(needed), ray=ray.__version__)
        self.pool = Pool(self.config, self.plan.layers, needed)
        outcome = "stopped"
        try:
            with _stop_requests() as stop:
                self._loop(start, stop)
            outcome = "done"
        except UserError as error:
            outcome = self.tell(str(error))
            raise
        finally:
            summary = self._summary(time.monotonic() - start, outcome)
            self.pool.close()
            with contextlib.nullcontext() if outcome == "done" else contextlib.suppress(UserError):
                self.events.finish(asdict(summary))
        return summary

    # -- the loop

    def _loop(self, start: float, stop: threading.Event) -> None:
        waiting_said = False
        polled: dict[Any, Slot] = {}
        last_poll, polls = time.monotonic(), 0
        while left := self._left():
            if stop.is_set():
                raise KeyboardInterrupt
            self.pool.grow(left)
            self.pool.shrink(left)
            self._judge_deaths()
            self._hand_out()
            refs = [*self.pool.loading, *self.pool.leases, *polled]
            for ref in _ready(refs):
                if ref in polled:
                    self._counted(polled.pop(ref), ref)
                elif ref in self.pool.loading:
                    self._started(ref)
                else:
                    self._ended(ref)
            if time.monotonic() - last_poll > _POLL_SECONDS:
                last_poll = time.monotonic()
                slots = self.pool.started
                step = len(slots) // _MOST_POLLED + 1
                asked, polls = slots[polls % step :: step], polls + 1
                polled = {slot.actor.pulse.options(concurrency_group="control").remote(): slot for slot in asked}
            self._end_hanging()
            waited = time.monotonic() - start
            if not self.manifest_written and waited > 15 and not waiting_said:
                waiting_said = True
                self._log(self.pool.check_feasible() or "waiting for workers to load their models ...")
            if not self.manifest_written and waited > self.config.workers.start_timeout:
                why = self.pool.check_feasible() or "see the workers' logs"
                raise UserError(
                    f"{len(self.pool.started)} of workers.min = {self.config.workers.min} workers have started in "
                    f"{waited:.0f} s (workers.start_timeout): {why}"
                )
            self.progress.show(self._snapshot())
            self.events.flush_when_due()

    def _left(self) -> int:
        """Leases to come and in flight."""
        waiting = len(self.queue) + len(self.suspects) + len(self.delayed)
        return waiting + len(self.pool.leases) + sum(len(death.works) for death in self.deaths)

    def _hand_out(self) -> None:
        """Two shards to every worker; a suspect to a worker that has nothing else."""
        if len(self.pool.started) < self.config.workers.min and not self.manifest_written:
            return
        while self.delayed and self.delayed[0][0] <= time.monotonic():
            self.queue.append(heapq.heappop(self.delayed)[2])
        quiet = [slot for slot in self.pool.started if slot.free == SHARDS_IN_FLIGHT]
        while self.suspects and quiet:
            self.pool.lease(quiet.pop(), self.suspects.popleft(), alone=True)
        draining = sum(slot.draining for slot in self.pool.started)
        for slot in self.pool.started:
            if draining < len(self.suspects) and not slot.draining and slot.free < SHARDS_IN_FLIGHT and not slot.alone:
                slot.draining, draining = True, draining + 1
            elif slot.draining and not self.suspects:
                slot.draining = False
        for _ in range(SHARDS_IN_FLIGHT):
            for slot in self.pool.started:
                if self.queue and slot.free and not slot.draining:
                    self.pool.lease(slot, self.queue.popleft())

    # -- what comes back

    def _started(self, ref: Any) -> None:
        slot = self.pool.loading.pop(ref)
        try:
            started: Started = ray.get(ref)
        except RayTaskError as error:
            cause = cause_of(error)
            if isinstance(cause, UserError):
                raise cause from None
            raise UserError(f"a worker could not load its models: {type(cause).__name__}: {cause}") from error
        except RayError as error:
            self.pool.failed_starts += 1
            self.events.add("worker_failed_to_start", error=str(error)[:500])
            if self.pool.failed_starts >= _MAX_FAILED_STARTS and not self.pool.started:
                raise UserError(
                    f"workers die while they load their models ({str(error).splitlines()[0]}): too little memory, or a "
                    "crash in a library; see the Ray logs."
                ) from error
            self.pool.slots.remove(slot)
            return
        slot.started, slot.since = started, time.monotonic()
        self.events.add("worker_started", node=started.node, pid=started.pid, accelerator=started.accelerator)
        if not self.manifest_written and len(self.pool.started) >= self.config.workers.min:
            old = self.store.read_json(MANIFEST)
            self.store.write_json(update_manifest(old, self.config, self.plan.layers, started.models), MANIFEST)
            self.manifest_written = True

    def _ended(self, ref: Any) -> None:
        slot = self.pool.leases.get(ref)
        if slot is None:  # its worker was found dead through another lease a moment ago
            return
        try:
            result: ShardResult = ray.get(ref)
        except RayTaskError as error:
            self._raised(slot, self.pool.returned(ref), cause_of(error))
        except RayError as error:
            self._died(slot, error)
        else:
            slot.failures = 0
            self._finished(self.pool.returned(ref), result)

    def _finished(self, work: Work, result: ShardResult) -> None:
        self.finished.add(work.shard)
        self.samples += result.samples
        self.bytes += result.bytes
        self.busy += result.busy
        self.refused.update(result.refused)
        for captioner, counts in result.cleaned.items():
            self.cleaned.setdefault(captioner, Counter()).update(counts)
        if result.given_up:
            self._log(f"{work.shard}: {result.given_up}, in quarantine")
            self._count_quarantined(work.shard)
        self.events.add("shard", **asdict(result))

    def _raised(self, slot: Slot, work: Work, error: Exception) -> None:
        """A lease raised: again after a while, and at last into quarantine."""
        if isinstance(error, UserError):
            raise error
        slot.failures += error.of_worker if isinstance(error, ShardFailure) else 1
        if slot.failures >= _FAILURES_OF_A_WORKER:
            self._replace(slot)
        self.attempts[work.shard] += 1
        tries, limit = self.attempts[work.shard], self.config.failures.attempts
        text = str(error) if isinstance(error, ShardFailure) else f"{type(error).__name__}: {error}"
        self.events.add("shard_raised", shard=work.shard, attempt=tries, error=text[:2000])
        self._log(f"{work.shard}: attempt {tries} of {limit} raised {text[:500]}")
        if tries < limit:
            pause = min(60.0, 2.0 ** (tries - 1)) * random.uniform(0.5, 1.0)  # noqa: S311 - jitter, not a secret
            heapq.heappush(self.delayed, (time.monotonic() + pause, next(self.tie), work))
            return
        layer = error.layer if isinstance(error, LayerFailure) else work.layers[0]
        self._give_up(work, layer, Reason.SHARD_FAILED, text)

    def _replace(self, slot: Slot) -> None:
        """End a worker at which everything fails, such as one whose accelerator is in a bad state; others follow."""
        assert slot.started is not None
        self.events.add("worker_replaced", node=slot.started.node, pid=slot.started.pid, failures=slot.failures)
        self._log(f"a worker is replaced: {slot.failures} shards in a row have failed at it")
        self.queue.extendleft(slot.leases.values())
        self.pool.remove(slot)

    def _died(self, slot: Slot, error: RayError) -> None:
        """A worker is gone, with all its leases; whose fault it was may not be known yet."""
        assert slot.started is not None
        works = list(slot.leases.values())
        self.pool.remove(slot)
        # A process that dies is known to be dead at once; a worker out of reach may be on a node that is being lost.
        patience = _NODE_VERDICT_SECONDS if isinstance(error, ActorUnavailableError) else 0.0
        why = str(error).strip().splitlines()[0][:300]
        self.deaths.append(Death(slot.started, works, slot.alone, why, time.monotonic() + patience))

    def _end_hanging(self) -> None:
        """End workers that hang: their threads cannot be, and what they are at may never end."""
        for slot in self.pool.started:
            why = slot.hangs(self.config.failures)
            if why is not None:
                assert slot.started is not None
                works = list(slot.leases.values())
                self.pool.remove(slot)
                self.deaths.append(
                    Death(slot.started, works, slot.alone, why, time.monotonic(), reason=Reason.SHARD_HUNG)
                )

    def _judge_deaths(self) -> None:
        """Send the shards of dead workers on: nobody's fault where the node is lost, else suspects."""
        for death in list(self.deaths):
            lost_node = not is_node_alive(death.worker.node)
            if not lost_node and time.monotonic() < death.deadline:
                continue
            self.deaths.remove(death)
            names = [work.shard for work in death.works]
            event = "worker_hung" if (hung := death.reason is Reason.SHARD_HUNG) else "worker_died"
            self.events.add(event, pid=death.worker.pid, shards=names, node_lost=lost_node, error=death.why)
            why = "its node was lost" if lost_node else death.why
            what = "hung and was ended" if hung else "died"
            self._log(f"a worker {what} ({why}); in flight: {', '.join(names)}")
            for work in death.works:
                if lost_node:
                    self.queue.appendleft(work)
                    continue
                self.deaths_alone[work.shard] += death.alone
                if self.deaths_alone[work.shard] >= self.config.failures.solo_attempts:
                    self._give_up(work, work.layers[0], death.reason, death.why)
                else:
                    self.suspects.append(work)

    def _give_up(self, work: Work, layer: str, reason: Reason, detail: str) -> None:
        """Quarantine a shard in ``layer`` and in what needs it; its other layers get another chance without them."""
        self.store.quarantine(layer, work.shard, [(None, reason, self.tell(detail))])
        self.events.add("shard_quarantined", shard=work.shard, layer=layer, reason=reason.value, detail=detail[:2000])
        self._log(f"{work.shard}: {reason.value} in {layer}, in quarantine")
        self._count_quarantined(work.shard)
        lost = {layer}
        for name in work.layers:
            if not lost.isdisjoint(self.plan.layers[name].needs):
                lost.add(name)
        rest = tuple(name for name in work.layers if name not in lost)
        if rest:
            self.attempts[work.shard] = self.deaths_alone[work.shard] = 0
            self.queue.append(replace(work, layers=rest))
        else:
            self.finished.add(work.shard)

    def _count_quarantined(self, shard: str) -> None:
        """Stop a run that has failed already: what hits so many shards (credentials, a disk) would hit the rest."""
        self.quarantined.add(shard)
        count, share = self.plan.quarantined + len(self.quarantined), self.config.failures.allowed_share
        if count > max(_FEW_SHARDS, share * self.plan.shards):
            raise UserError(
                f"stopped: {count:,} of {self.plan.shards:,} shards are in quarantine, more than "
                f"failures.allowed_share = {share:g}, which looks like one fault of them all. See quarantine/ for the "
                "reasons, mend it and run with --retry-quarantined."
            )

    def _log(self, text: str) -> None:
        self.progress.log(self.tell(text))

    # -- numbers

    def _counted(self, slot: Slot, ref: Any) -> None:
        with contextlib.suppress(RayError):  # its death comes back through its leases
            slot.felt(ray.get(ref))

    def _snapshot(self) -> Snapshot:
        slots = self.pool.started
        now = time.monotonic()
        return Snapshot(
            shards_done=len(self.finished),
            shards=len(self.plan.work),
            samples=max(self.samples, sum(slot.pulse.samples for slot in slots)),
            samples_done=self.samples,
            busy=self.pool.gone_busy + sum(slot.pulse.busy for slot in slots),
            alive=self.pool.gone_alive + sum(now - slot.since for slot in slots),
            workers=len(slots),
            quarantined_shards=len(self.quarantined),
            refused_rows=sum(self.refused.values()),
        )

    def _summary(self, seconds: float, outcome: str) -> RunSummary:
        given_up = self.plan.quarantined + len(self.quarantined)
        status, message = verdict(given_up, self.plan.shards, self.config.failures.allowed_share)
        if outcome != "done":
            status, message = 1, outcome
        elif self.samples == 0 and any(SAMPLES in work.layers for work in self.plan.work):
            status = 1
            message = "no samples: not one image-text pair could be read from the source; see the quarantine"
        alive = self._snapshot().alive or seconds
        return RunSummary(
            self.events.run,
            len(self.finished),
            self.samples,
            round(seconds, 3),
            round(min(1.0, self.busy / alive), 4),
            self.bytes,
            dict(self.refused),
            given_up,
            status,
            message,
            {captioner: dict(counts) for captioner, counts in self.cleaned.items()},
        )


def _ready(refs: list[Any]) -> list[Any]:
    """All that have come back, after a wait for the first."""
    if not refs:
        time.sleep(_TICK)
        return []
    first, others = ray.wait(refs, num_returns=1, timeout=_TICK)
    return [*first, *ray.wait(others, num_returns=len(others), timeout=0)[0]] if first and others else first


@contextlib.contextmanager
def _stop_requests() -> Iterator[threading.Event]:
    """An event that SIGTERM and Ctrl-C set: an exception in the middle of a call into Ray would be lost there."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
