"""The machines that run a config or a parallel map: the nodes of a Ray cluster, or this machine; and the map.

A map over shards or other items runs in this process, in processes of this machine, or by tasks or actors of Ray. An
item whose storage fails or whose worker dies is computed again, by another worker where there is one. Results come as
items end, or in the order of the items. Items are taken from their iterable as workers become free, so memory is
bounded by the items in work and, where results come in order, by those that wait for an earlier one.

Imports Ray only where there is a cluster.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import queue
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.pool import ExceptionWithTraceback  # type: ignore[attr-defined]
from typing import Any, Generic, TypeVar

from reinforce.errors import StorageError, UserError
from reinforce.processes.attempts import MAPPED_ITEMS
from reinforce.processes.children import connect_to_parent, describe_exit, start_process
from reinforce.processes.cores import Node, available_cores
from reinforce.terminal import show_progress

T = TypeVar("T")
R = TypeVar("R")
RESUME = "Run the same command again to resume."
#: Of these one exists where torch may find a GPU.
_DEVICE_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
_PER_CORE = 2  # tasks in work for each core of a cluster, so that no core waits for this process
_AHEAD = 2  # items in work or done, for each that may be in work, from the first one that has not ended
_TICK_SECONDS = 0.5  # after which the number of cores of the cluster is looked up again
_LOG = logging.getLogger(__name__)


@contextlib.contextmanager
def cluster_of_run(address: str | None, log_to_driver: bool = True) -> Iterator[bool]:
    """Connect to the cluster at ``address`` or RAY_ADDRESS, unless Ray is initialised -> whether there is a cluster.

    Raises UserError if there is no cluster at the address.
    """
    ray = sys.modules.get("ray")
    if not (address or os.environ.get("RAY_ADDRESS") or (ray is not None and ray.is_initialized())):
        yield False
        return
    from reinforce.processes.cluster import ray_cluster

    with ray_cluster(address, log_to_driver):
        yield True


def nodes_of_run() -> list[Node]:
    """The nodes of the initialised Ray, or of the cluster at RAY_ADDRESS, else this machine: none without a GPU."""
    with cluster_of_run(None) as has_cluster:
        if has_cluster:
            from reinforce.processes.cluster import live_resources

            return [*live_resources()]
    if not any(map(os.path.exists, _DEVICE_FILES)):
        return []
    import torch

    return [{"GPU": torch.cuda.device_count()}]


class WorkerLost(Exception):
    """A worker died while it computed an item; the message is how, ``for_good`` whether another may have no place."""

    def __init__(self, text: str, for_good: bool = False) -> None:
        super().__init__(text)
        self.for_good = for_good


@dataclass
class _Item(Generic[T]):
    number: int
    item: T
    failures: int = 0


class MapWorkers(contextlib.ExitStack):
    """The workers of one or more maps: this process alone. A context manager, which ends them.

    A worker has a copy of the function that it computes with, which may keep state there. ``start`` makes a worker for
    a function, ``kill`` ends one that computes. Idle ones are ended when no item waits, unless they are ``kept``.
    """

    def __init__(
        self,
        count: int = 1,
        start: Callable[[Callable[[Any], Any]], Any] = lambda function: None,
        kill: Callable[[Any], object] = lambda worker: None,
        kept: bool = True,
    ) -> None:
        super().__init__()
        self._count, self._start, self._kill, self._kept = count, start, kill, kept
        self._idle: list[Any] = []
        self._busy: dict[Future[Any], Any] = {}

    def __exit__(self, *details: Any) -> bool | None:
        for worker in [*self._busy.values()]:
            self._kill(worker)
        return super().__exit__(*details)

    def limit(self) -> int:
        """How many items may be in work now."""
        return self._count

    def map(
        self,
        function: Callable[[T], R],
        items: Iterable[T],
        *,
        unit: str | None = None,
        ordered: bool = False,
        name: Callable[[T], str] = str,
        fix: str = RESUME,
        lost: Callable[[T, str], R] | None = None,
    ) -> Iterator[tuple[T, R]]:
        """Yield (item, ``function(item)``) as items end, or ``ordered``. With ``unit``, show progress over a sequence.

        ``function`` must be picklable: a ``functools.partial`` or an object of a class of a module. ``name`` is that of
        an item in messages. An item whose workers die each time gets the result of ``lost``, which gets the reason;
        without it, UserError names the item and the ``fix``. Raises UserError for storage that fails each time, and
        what the function raises; what has finished by then stays.
        """
        found = self._results(function, items, ordered, name, fix, lost)
        yield from found if unit is None or not isinstance(items, Sequence) else show_progress(found, len(items), unit)

    def _results(
        self,
        function: Callable[[T], R],
        items: Iterable[T],
        ordered: bool,
        name: Callable[[T], str],
        fix: str,
        lost: Callable[[T, str], R] | None,
    ) -> Iterator[tuple[T, R]]:
        waiting = (_Item(number, item) for number, item in enumerate(items))
        again: deque[_Item[T]] = deque()
        running: dict[Future[R], _Item[T]] = {}
        ended: queue.SimpleQueue[Future[R]] = queue.SimpleQueue()
        early: dict[int, tuple[T, R]] = {}  # results that wait for earlier items
        first = 0  # number of the first item that has no result
        while True:
            limit = self.limit()
            while len(running) < limit and (again or not ordered or len(running) + len(early) < _AHEAD * limit):
                if (one := again.popleft() if again else next(waiting, None)) is None:
                    self._idle[:] = self._idle if self._kept else []
                    break
                future = self._submit(function, one.item)
                running[future] = one
                future.add_done_callback(ended.put)
            if not running:
                return
            done: list[Future[R]] = []
            with contextlib.suppress(queue.Empty):
                done.append(ended.get(timeout=_TICK_SECONDS))
                while True:
                    done.append(ended.get_nowait())
            for future in done:
                one = running.pop(future)
                try:
                    result = future.result()
                except (StorageError, WorkerLost) as error:
                    one.failures += 1
                    if one.failures < MAPPED_ITEMS.count:
                        _LOG.warning("%s: attempt %d failed: %s", name(one.item), one.failures, error)
                        again.append(one)
                        continue
                    if isinstance(error, StorageError):
                        raise UserError(f"{error} {RESUME}") from error
                    reason = f"{name(one.item)}: {error}, {MAPPED_ITEMS.count} times"
                    if lost is None:
                        raise UserError(f"{reason}. {fix}") from error
                    result = lost(one.item, reason)
                if not ordered:
                    yield one.item, result
                    continue
                early[one.number] = (one.item, result)
                while first in early:
                    yield early.pop(first)
                    first += 1

    def _submit(self, function: Callable[[T], R], item: T) -> Future[R]:
        worker = self._idle.pop() if self._idle else self._start(function)
        future = self._call(worker, function, item)
        self._busy[future] = worker
        future.add_done_callback(self._release)
        return future

    def _release(self, done: Future[Any]) -> None:
        worker, error = self._busy.pop(done), done.exception()
        if not isinstance(error, WorkerLost):
            self._idle.append(worker)
        elif error.for_good and self._count > 1:
            self._count -= 1

    def _call(self, worker: Any, function: Callable[[T], R], item: T) -> Future[R]:
        """Begin ``function(item)``. The future raises WorkerLost if the worker dies, else what the function raises."""
        future: Future[R] = Future()
        try:
            future.set_result(function(item))
        except Exception as error:
            future.set_exception(error)
        return future


def open_workers(address: str | None = None, use_ray: bool = True, processes: int | None = None) -> MapWorkers:
    """Workers for a command: on the Ray cluster at ``address`` or RAY_ADDRESS, or on Ray as it is initialised.

    Otherwise, and without ``use_ray``, they are ``processes`` of this machine: default one a core, and without
    ``use_ray`` one, which is this process. Raises UserError if there is no cluster at the address.
    """
    with contextlib.ExitStack() as stack:
        if use_ray and stack.enter_context(cluster_of_run(address)):
            tasks = _Tasks()
            tasks.push(stack.pop_all().__exit__)
            return tasks
    count = processes or (available_cores() if use_ray else 1)
    return _Processes(count) if count > 1 else MapWorkers()


class WorkerProcess:
    """A process that calls functions for its parent. It has one copy of a function, with whatever state that keeps.

    One thread at a time may use it, apart from ``kill``.
    """

    def __init__(self) -> None:
        self._process, self._connection = start_process(__name__, os.getpid())
        self._function: Callable[[Any], Any] | None = None

    def call(self, function: Callable[[Any], Any], item: Any) -> Any:
        """Return ``function(item)``. The function is sent unless it is that of the call before.

        Raises WorkerLost, and what the function raises.
        """
        try:
            self._connection.send((None if function is self._function else function, item))
            self._function = function
            result, error = self._connection.recv()
        except (EOFError, OSError):
            self._process.kill()
            reason = f"its process ended with {describe_exit(self._process.wait())}"
            raise WorkerLost(reason, for_good=True) from None
        if error is not None:
            raise error
        return result

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def serve(descriptor: int, parent: int) -> None:
    """Answer the calls of a ``WorkerProcess`` until the parent is gone."""
    connection = connect_to_parent(descriptor, parent)
    function: Callable[[Any], Any] | None = None
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            message = connection.recv_bytes()
            try:
                sent, item = pickle.loads(message)  # noqa: S301 - from the parent
                function = function if sent is None else sent
                assert function is not None
                answer = pickle.dumps((function(item), None))
            except Exception as error:
                try:  # the error with its traceback as cause; only its text if it cannot be sent
                    answer = pickle.dumps((None, ExceptionWithTraceback(error, error.__traceback__)))
                    pickle.loads(answer)  # noqa: S301 - of the line above
                except Exception:
                    answer = pickle.dumps((None, RuntimeError(f"{type(error).__name__}: {error}")))
            connection.send_bytes(answer)


class _Processes(MapWorkers):
    """Processes of this machine. One that dies is not replaced unless it was the last: most die for lack of memory."""

    def __init__(self, count: int) -> None:
        super().__init__(count, lambda function: WorkerProcess(), WorkerProcess.kill)
        self._threads = ThreadPoolExecutor(count, "worker-process")  # each waits for a process
        self.callback(lambda: [process.kill() for process in self._idle])  # after the threads
        self.callback(self._threads.shutdown)

    def map(self, function: Callable[[T], R], items: Iterable[T], **options: Any) -> Iterator[tuple[T, R]]:
        alone = isinstance(items, Sequence) and len(items) < 2  # to start a process would take longer
        return MapWorkers().map(function, items, **options) if alone else super().map(function, items, **options)

    def _call(self, worker: WorkerProcess, function: Callable[[T], R], item: T) -> Future[R]:
        return self._threads.submit(worker.call, function, item)


class _Tasks(MapWorkers):
    """Tasks of the initialised Ray, of one core each; the number in work follows the cluster. A task keeps no state."""

    def __init__(self) -> None:
        import ray

        # A worker is the task that is running.
        super().__init__(1, lambda function: [], lambda running: ray.cancel(*running, force=True))
        self._ray: Any = ray
        self._task = ray.remote(num_cpus=1, max_retries=0)(_call)
        self._function: tuple[Any, Any] = (None, None)  # and Ray's copy of it

    def limit(self) -> int:
        return max(1, round(_PER_CORE * self._ray.cluster_resources().get("CPU", 1)))

    def _call(self, worker: list[Any], function: Callable[[T], R], item: T) -> Future[R]:
        if self._function[0] is not function:
            self._function = function, self._ray.put(function)
        worker[:] = [self._task.remote(self._function[1], item)]
        return _future_of(*worker)


def _call(function: Callable[[T], R], item: T) -> R:
    return function(item)


class Actors(MapWorkers):
    """At most ``count`` actors of the initialised Ray, with one core and so many ``gpus`` each, for maps of a function.

    Those of a lost node are not replaced unless they were the last: no node may have a place for others.
    """

    def __init__(self, count: int, gpus: float) -> None:
        import ray

        actor: Any = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0)(_MapActor)
        # Ray ends idle ones that are not kept, and has a place for an actor that waits for one with its item.
        super().__init__(count, actor.remote, ray.kill, kept=False)
        self.callback(self._idle.clear)

    def _call(self, worker: Any, function: Callable[[T], R], item: T) -> Future[R]:
        return _future_of(worker.call.remote(item))


class _MapActor:
    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function

    def call(self, item: Any) -> Any:
        return self._function(item)


def _future_of(ref: Any) -> Future[Any]:
    """The future of Ray's reference, with WorkerLost where the process died, and errors of users without a wrapper."""
    from ray.exceptions import ActorUnavailableError, RayError, RayTaskError

    from reinforce.processes.cluster import cause_of, is_node_lost

    result: Future[Any] = Future()

    def pass_on(done: Future[Any]) -> None:
        error = done.exception()
        if error is None:
            result.set_result(done.result())
        elif isinstance(error, RayTaskError):
            cause = cause_of(error)
            result.set_exception(cause if isinstance(cause, UserError) else error)
        elif isinstance(error, RayError):
            node_lost = is_node_lost(error) or isinstance(error, ActorUnavailableError)
            text = str(error).partition("\n")[0] or type(error).__name__
            result.set_exception(WorkerLost(text, for_good=node_lost))
        else:
            result.set_exception(error)

    ref.future().add_done_callback(pass_on)
    return result
