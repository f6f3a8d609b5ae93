"""A run without Ray: the real driver and the real worker in one process, whose leases run in threads.

For tests that ask for it by name: many short runs, or classes that only this process has. Arguments and results are
pickled as Ray does. It cannot show how workers start, what their environment is, and how they die.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any
from unittest import mock

from ray import cloudpickle
from ray.exceptions import RayTaskError

from benchmarks.scale.cluster import Method, in_place_of_ray
from reinforce.engine.worker.actor import SHARDS_IN_FLIGHT, Worker
from tests.helpers.decoding import decode_pool


def _copied(value: Any) -> Any:
    return cloudpickle.loads(cloudpickle.dumps(value))


def _called(method: Callable[..., Any], arguments: Any) -> Any:
    return _copied(method(*arguments))


def _submitted(threads: ThreadPoolExecutor, method: Callable[..., Any], *arguments: Any) -> Future[Any]:
    return threads.submit(_called, method, _copied(arguments))


class _Actor:
    def __init__(self, arguments: Sequence[Any]) -> None:
        worker = Worker(*_copied(arguments))
        threads, control = ThreadPoolExecutor(SHARDS_IN_FLIGHT), ThreadPoolExecutor(1)
        methods = worker.identify, worker.load, worker.process
        self.identify, self.load, self.process = (Method(partial(_submitted, threads, of)) for of in methods)
        self.pulse = Method(partial(_submitted, control, worker.pulse))
        self.threads = (threads, control)


class _NoRay:
    """The functions of Ray that the driver calls."""

    __version__ = "local"

    def is_initialized(self) -> bool:
        return True

    def put(self, value: Any) -> Any:
        return value

    def options(self, **_: Any) -> _NoRay:
        return self

    def remote(self, *arguments: Any) -> _Actor:
        return _Actor(arguments)

    def nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": "here", "Alive": True, "Resources": {"CPU": 1.0}}]

    def kill(self, actor: _Actor) -> None:
        for threads in actor.threads:
            threads.shutdown(wait=False, cancel_futures=True)

    def get(self, ref: Future[Any]) -> Any:
        error = ref.exception()
        if isinstance(error, Exception):
            raise RayTaskError("worker", "", error)
        return ref.result()

    def wait(
        self, refs: Sequence[Future[Any]], num_returns: int, timeout: float
    ) -> tuple[list[Future[Any]], list[Future[Any]]]:
        wait(refs, timeout, FIRST_COMPLETED)
        ready = [ref for ref in refs if ref.done()][:num_returns]
        return ready, [ref for ref in refs if ref not in ready]


@contextlib.contextmanager
def worker_in_process() -> Iterator[None]:
    """Replace Ray in the modules of the driver, while the block runs."""
    from reinforce.engine.worker import actor

    with in_place_of_ray(_NoRay()), mock.patch.object(actor, "DecodePool", side_effect=lambda *_: decode_pool()):
        yield
