"""Shards and workers of a driver in which nothing runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from reinforce.config import parse_config
from reinforce.dataset.layers import Layer
from reinforce.engine.driver.worker_pool import Slot, WorkerPool
from reinforce.engine.messages import PendingShard, WorkerId, WorkerInfo

SAMPLES_ONLY = {"samples": Layer("samples", "samples", "0")}


def shard(name: str) -> PendingShard:
    return PendingShard(name, f"{name}.tar", ("samples",))


def started(node: str = "node", pid: int = 1, **values: Any) -> Slot:
    """A worker whose models are loaded."""
    return Slot(Actor(), WorkerInfo(WorkerId(node, pid), "cpu", {}), **values)


class Actor:
    """Takes calls and does nothing."""

    def __getattr__(self, name: str) -> Any:
        method = SimpleNamespace(remote=lambda *_: object())
        method.options = lambda **_: method
        return method


def pool_of(monkeypatch: pytest.MonkeyPatch, slots: list[Slot], **workers: Any) -> WorkerPool:
    """A pool with ``slots``, whose new workers are of ``Actor``."""
    monkeypatch.setattr("reinforce.engine.driver.worker_pool.ray.put", lambda value: value)
    monkeypatch.setattr("reinforce.engine.driver.worker_pool.ray.kill", lambda actor: None)
    actors = SimpleNamespace(remote=lambda *_: Actor(), options=lambda **_: actors)
    monkeypatch.setattr("reinforce.engine.driver.worker_pool.as_actor", lambda _: actors)
    pool = WorkerPool(parse_config({"source": "a.tar", "output": "/tmp/out", "workers": workers}), {}, frozenset())
    pool.slots = slots
    for slot in slots:
        if slot.info:
            pool.record_start(slot, slot.info)
    return pool
