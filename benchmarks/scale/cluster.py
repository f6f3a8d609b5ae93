"""A simulated cluster: the real driver with its policy, queue and pool, and stand-ins for Ray's actors.

A lease ends after a drawn time, a node can be lost with its workers, and single workers can die. Time is real.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
from ray.exceptions import ActorDiedError

from reinforce.dataset.index import FileEntry
from reinforce.dataset.runs import ShardKeys, ShardRecord
from reinforce.engine.messages import PendingShard, ShardResult, WorkerId, WorkerInfo
from reinforce.engine.pulse import Pulse

_KEYS = 1024  # hashes of a shard's record
_NEVER = float("inf")


@dataclass(frozen=True)
class Cluster:
    """What is simulated.

    ``lease_seconds`` draws the time of a lease, ``start_seconds`` that of a worker's start. At ``losses`` (seconds,
    node) a node is lost, and at ``deaths`` (seconds) a worker dies. A worker occupies one CPU.
    """

    nodes: int
    workers_per_node: int
    lease_seconds: Callable[[random.Random], float]
    start_seconds: Callable[[random.Random], float] = lambda _: 0.0
    losses: Sequence[tuple[float, int]] = ()
    deaths: Sequence[float] = ()
    seed: int = 0


class _Ref:
    """A result that is there from the time ``at``."""

    __slots__ = ("actor", "at", "value")

    def __init__(self, at: float, value: Any, actor: _Actor | None = None) -> None:
        self.at, self.value, self.actor = at, value, actor


class Method:
    """A method of an actor: ``actor.process.remote(shard)``."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.remote = call

    def options(self, **_: Any) -> Method:
        return self


class _Actor:
    def __init__(self, ray: SimulatedRay, node: int, number: int) -> None:
        self.node, self.number, self.dead = node, number, False
        self.refs: set[_Ref] = set()
        self.identify = Method(lambda: ray.answer(self, 0.0, WorkerId(str(self.node), self.number)))
        self.load = Method(lambda: ray.start(self))
        self.process = Method(lambda shard: ray.lease(self, shard))
        self.pulse = Method(lambda: ray.answer(self, 0.001, Pulse()))


@dataclass
class SimulatedRay:
    """The part of Ray that the driver uses. ``own_seconds`` is the CPU time of the simulation itself, ``calls`` counts
    the calls of the driver by kind, and ``delivered`` the results of leases that it has taken."""

    cluster: Cluster
    layers: Sequence[str]
    __version__: str = "simulated"
    own_seconds: float = 0.0
    delivered: int = 0
    calls: Counter[str] = field(default_factory=Counter)
    on_wait: Callable[[SimulatedRay], None] | None = None

    def __post_init__(self) -> None:
        self._random, self.started = random.Random(self.cluster.seed), time.monotonic()  # noqa: S311 - not a secret
        self._actors: list[_Actor] = []
        self._lost: set[int] = set()
        self._rooms = dict.fromkeys(range(self.cluster.nodes), self.cluster.workers_per_node)
        self._events: list[tuple[float, int, int | None]] = []
        self._order = itertools.count()
        for at, node in self.cluster.losses:
            heapq.heappush(self._events, (at, next(self._order), node))
        for at in self.cluster.deaths:
            heapq.heappush(self._events, (at, next(self._order), None))

    # -- what the driver calls

    def put(self, value: Any) -> Any:
        return value

    def options(self, **_: Any) -> SimulatedRay:
        return self

    def remote(self, *_: Any) -> _Actor:
        """Create a worker, on a node that has room for it."""
        with self._own():
            node = next((n for n, room in self._rooms.items() if room and n not in self._lost), -1)
            if node >= 0:
                self._rooms[node] -= 1
                if not self._rooms[node]:
                    del self._rooms[node]
        actor = _Actor(self, node, len(self._actors))
        self._actors.append(actor)
        return actor

    def nodes(self) -> list[dict[str, Any]]:
        self.calls["nodes"] += 1
        room = float(self.cluster.workers_per_node)
        return [
            {"NodeID": str(n), "Alive": n not in self._lost, "Resources": {"CPU": room}}
            for n in range(self.cluster.nodes)
        ]

    def kill(self, actor: _Actor) -> None:
        self._end(actor)

    def get(self, ref: _Ref) -> Any:
        self.calls["get"] += 1
        if isinstance(ref.value, BaseException):
            raise ref.value
        self.delivered += isinstance(ref.value, ShardResult)
        return ref.value

    def wait(self, refs: Sequence[_Ref], num_returns: int, timeout: float, **_: Any) -> tuple[list[_Ref], list[_Ref]]:
        """As ``ray.wait``: at most ``num_returns`` that are ready, after waiting for so many until the timeout."""
        with self._own():
            if self.on_wait is not None:
                self.on_wait(self)
            self.calls["wait"] += 1
            self.calls["waited refs"] += len(refs)
            self._happen()
            now = time.monotonic()
            ready = [ref for ref in refs if ref.at <= now]
            if len(ready) < num_returns and timeout > 0:
                due = heapq.nsmallest(num_returns, (ref.at for ref in refs))[-1]
                time.sleep(max(0.0, min(timeout, due - now)))
                now = time.monotonic()
                ready = [ref for ref in refs if ref.at <= now]
            chosen = ready[:num_returns]
            taken = set(chosen)
            return chosen, [ref for ref in refs if ref not in taken]

    # -- what happens in the cluster

    def start(self, actor: _Actor) -> _Ref:
        info = WorkerInfo(WorkerId(str(actor.node), actor.number), "cpu", {})
        return self.answer(actor, self.cluster.start_seconds(self._random), info)

    def lease(self, actor: _Actor, shard: PendingShard) -> _Ref:
        with self._own():
            self.calls["lease"] += 1
            seconds = self.cluster.lease_seconds(self._random)
            keys = ShardKeys(
                np.sort(np.random.default_rng(hash(shard.name) % 2**32).integers(0, 2**63, _KEYS, np.uint64))
            )
            result = ShardResult(
                shard=shard.name, layers=shard.layers, samples=10_000, seconds=seconds, busy=seconds, bytes=10**9,
                record=ShardRecord(shard.name, keys, None),
                files=dict.fromkeys(shard.layers, FileEntry(10**8, (1024,) * 10)),
            )  # fmt: skip
            return self.answer(actor, seconds, result)

    def answer(self, actor: _Actor, seconds: float, value: Any) -> _Ref:
        if actor.node < 0:  # pending: no node has room
            return _Ref(_NEVER, value, actor)
        ref = _Ref(time.monotonic() + seconds, value, actor)
        if actor.dead:
            ref.at, ref.value = 0.0, ActorDiedError()
        actor.refs.add(ref)
        return ref

    def _happen(self) -> None:
        """Let nodes and workers die whose time has come."""
        while self._events and self._events[0][0] <= time.monotonic() - self.started:
            _, _, node = heapq.heappop(self._events)
            living = [actor for actor in self._actors if not actor.dead and actor.node >= 0]
            if node is None:
                self._end(self._random.choice(living))
                continue
            self._lost.add(node)
            for actor in living:
                if actor.node == node:
                    self._end(actor)

    def _end(self, actor: _Actor) -> None:
        if not actor.dead and actor.node >= 0 and actor.node not in self._lost:
            self._rooms[actor.node] = self._rooms.get(actor.node, 0) + 1
        actor.dead, now = True, time.monotonic()
        for ref in actor.refs:
            if ref.at > now:
                ref.at, ref.value = now, ActorDiedError()
        actor.refs.clear()

    @contextlib.contextmanager
    def _own(self) -> Iterator[None]:
        start = time.thread_time()
        try:
            yield
        finally:
            self.own_seconds += time.thread_time() - start


@contextlib.contextmanager
def simulated(cluster: Cluster, layers: Sequence[str]) -> Iterator[SimulatedRay]:
    """Replace Ray by a simulated cluster, whose workers write no files that could be listed at the end."""
    from reinforce.engine.driver.driver import Driver

    ray = SimulatedRay(cluster, layers)
    with in_place_of_ray(ray), mock.patch.object(Driver, "_check_written"):
        yield ray


@contextlib.contextmanager
def in_place_of_ray(ray: Any) -> Iterator[None]:
    """Replace Ray in the modules of the driver."""
    from reinforce.engine.driver import driver, worker_pool
    from reinforce.processes import cluster

    with contextlib.ExitStack() as stack:
        for module in (driver, worker_pool, cluster):
            stack.enter_context(mock.patch.object(module, "ray", ray))
        stack.enter_context(mock.patch.object(worker_pool, "as_actor", return_value=ray))
        for watch in ("RayletWatch", "ControlWatch"):
            stack.enter_context(mock.patch.object(driver, watch))
        stack.enter_context(mock.patch.object(driver, "draining_nodes", return_value={}))
        yield


def config_of(folder: str, shards: int, workers: int, **failures: Any) -> dict[str, Any]:
    """A config with one teacher, three layers, for a number of shards; no model is loaded."""
    return {
        "source": f"{folder}/source/{{{'0' * 7}..{shards - 1:07d}}}.tar",
        "output": f"{folder}/out",
        "teachers": {"t": {"model": "ViT-B-32", "pretrained": "laion2b_s34b_b79k"}},
        "workers": {"min": 1, "max": workers, "gpus": 0, "cpus": 1},
        "failures": failures,
    }
