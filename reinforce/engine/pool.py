"""The pool of worker actors: asks the cluster for as many as may be of use, knows what each is doing, and tells a
worker's death from the death of its node."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray

from reinforce.cluster import capacity, live_resources
from reinforce.config import Config, Failures
from reinforce.dataset.layers import Layer
from reinforce.engine.plan import Work
from reinforce.engine.watch import Pulse
from reinforce.engine.worker import SHARDS_IN_FLIGHT, Started, as_actor

_COUNT_SECONDS = 5.0


@dataclass(eq=False)
class Slot:
    """One actor. ``alone`` means that its one lease is a suspect and nothing may run beside it."""

    actor: Any
    started: Started | None = None
    leases: dict[Any, Work] = field(default_factory=dict)
    alone: bool = False
    draining: bool = False
    failures: int = 0  # leases that raised since the last one that did not
    pulse: Pulse = field(default_factory=Pulse)
    since: float = field(default_factory=time.monotonic)
    moved: float = field(default_factory=time.monotonic)  # when it was last known to have got on

    @property
    def free(self) -> int:
        """Further leases it can take."""
        return 0 if self.started is None or self.alone else SHARDS_IN_FLIGHT - len(self.leases)

    def felt(self, pulse: Pulse) -> None:
        """Note what the worker said of itself."""
        before = self.pulse
        self.pulse = pulse
        if (before.samples, before.busy, before.prepared) != (pulse.samples, pulse.busy, pulse.prepared):
            self.moved = time.monotonic()

    def hangs(self, failures: Failures) -> str | None:
        """Why the worker must be taken to hang, if it must."""
        if not self.leases:
            return None
        where = f" at key {self.pulse.key!r}" if self.pulse.key is not None else ""
        if self.pulse.seconds > failures.sample_seconds:
            return f"one image takes more than failures.sample_seconds = {failures.sample_seconds:g}{where}"
        if time.monotonic() - self.moved > failures.stall_seconds:
            return f"nothing has moved for failures.stall_seconds = {failures.stall_seconds:g}{where}"
        return None


class Pool:
    """Actors that are asked for and cannot be placed stay pending in Ray: they start when a node joins."""

    def __init__(self, config: Config, layers: Mapping[str, Layer], needed: frozenset[str]) -> None:
        self._arguments = [ray.put(value) for value in (config, layers, needed, os.getcwd())]
        self._config = config
        self._class = as_actor(config)
        self.slots: list[Slot] = []
        self.loading: dict[Any, Slot] = {}
        self.leases: dict[Any, Slot] = {}
        self.failed_starts = 0
        self.gone_busy = self.gone_alive = 0.0  # of workers that are no more
        self._places = 0
        self._counted = -_COUNT_SECONDS

    def grow(self, size: int) -> None:
        """Ask for actors until ``size`` (at most ``workers.max``) exist or are pending."""
        limit = self._config.workers.max
        if limit is None:
            limit = max(self._config.workers.min, self._room())
        for _ in range(min(size, limit) - len(self.slots)):
            slot = Slot(self._class.remote(*self._arguments))
            self.slots.append(slot)
            self.loading[slot.actor.load.remote()] = slot

    def shrink(self, size: int) -> None:
        """Let go of workers without a lease, those first that have not started."""
        if len(self.slots) <= size:
            return
        idle = sorted((s for s in self.slots if not s.leases), key=lambda slot: slot.started is not None)
        for slot in idle[: max(0, len(self.slots) - size)]:
            self.remove(slot)

    def remove(self, slot: Slot) -> None:
        """End a worker; its leases are nobody's then."""
        self.slots.remove(slot)
        if slot.started is not None:
            self.gone_busy, self.gone_alive = (
                self.gone_busy + slot.pulse.busy,
                self.gone_alive + time.monotonic() - slot.since,
            )
        for ref in slot.leases:
            del self.leases[ref]
        self.loading = {ref: other for ref, other in self.loading.items() if other is not slot}
        ray.kill(slot.actor)

    def close(self) -> None:
        for slot in list(self.slots):
            self.remove(slot)

    @property
    def started(self) -> list[Slot]:
        return [slot for slot in self.slots if slot.started is not None]

    def lease(self, slot: Slot, work: Work, alone: bool = False) -> None:
        """Hand a shard to a worker."""
        if not slot.leases:
            slot.moved = time.monotonic()
        slot.alone, slot.draining = alone, False
        ref = slot.actor.process.remote(work)
        slot.leases[ref] = work
        self.leases[ref] = slot

    def returned(self, ref: Any) -> Work:
        """Take back a lease that has ended."""
        slot = self.leases.pop(ref)
        slot.alone, slot.moved = False, time.monotonic()
        return slot.leases.pop(ref)

    def _room(self) -> int:
        """Workers that the cluster's nodes can hold, counted anew every few seconds."""
        if time.monotonic() - self._counted > _COUNT_SECONDS:
            self._counted = time.monotonic()
            cpus, gpus = self._config.workers.cpus, self._config.workers.gpus
            self._places = capacity(cpus, gpus)
        return self._places

    def check_feasible(self) -> str | None:
        """What no node of the cluster can offer a worker, in words; None where one can."""
        workers = self._config.workers
        if capacity(workers.cpus, workers.gpus):
            return None
        nodes = live_resources()
        best: dict[str, float] = max(nodes, key=lambda n: (n.get("GPU", 0), n.get("CPU", 0)), default={})
        return (
            f"a worker wants {workers.cpus} CPUs and {workers.gpus:g} GPUs, the largest node has "
            f"{best.get('CPU', 0):g} CPUs and {best.get('GPU', 0):g} GPUs. Set workers.cpus and workers.gpus to fit."
        )
