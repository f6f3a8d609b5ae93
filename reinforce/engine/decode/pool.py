"""The decode processes of a worker: chunks of encoded images in, records out, pixels in shared memory.

A process that crashes, or takes too long for one image, is replaced. The image it was working on begins again in the
new process, and is refused if that happens ``attempts`` times. All others are decoded again. So neither the worker and
its models nor the shard are lost.

The images of the oldest lease come first, so that two shards that begin together do not end together.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import mmap
import pickle
import queue
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from reinforce.engine.decode.cells import Bytes, FreeCells, PixelCells
from reinforce.engine.decode.handle import DEPTH, ProcessDied, ProcessHandle
from reinforce.engine.decode.item import DecodeSpec, Item, Outcome, SourceItem
from reinforce.engine.decode.process import Chunk, StatusBoard
from reinforce.engine.messages.pulse import LeaseWatch
from reinforce.processes.shared_memory import SharedMemory
from reinforce.source.samples import Refusal
from schemas import Reason

_MAX_LOOK_SECONDS = 1.0  # between two looks at what a busy process works on
STOPPED = "the decode processes were stopped"
_MAX_LOST_STARTS = 3  # deaths in a row of processes that had not begun an image


@dataclass(eq=False)
class Job:
    """A chunk of items, which is finished once each has an outcome."""

    number: int
    lease: CellLease
    cells: Sequence[int]
    items: Sequence[Item]
    future: Future[list[Outcome]] = field(default_factory=Future)
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    deaths: Counter[int] = field(default_factory=Counter)  # of processes that worked on an item


@dataclass(frozen=True)
class Task:
    """The items ``start`` to ``stop`` of a job, which a process receives together."""

    job: Job
    start: int
    stop: int

    def finish(self, outcomes: Iterable[Outcome]) -> None:
        """Record the outcomes of the items; the job's future gets its result with the last one."""
        self.job.outcomes.update(zip(range(self.start, self.stop), outcomes, strict=True))
        if len(self.job.outcomes) == len(self.job.items):
            self.job.future.set_result([outcome for _, outcome in sorted(self.job.outcomes.items())])

    def without(self, item: int) -> list[Task]:
        """The tasks that are left without one of the items."""
        parts = [Task(self.job, self.start, item), Task(self.job, item + 1, self.stop)]
        return [part for part in parts if part.start < part.stop]

    def blame(self, item: int, refusal: Refusal, attempts: int) -> list[Task]:
        """The tasks that are left after a process died at ``item``, which begins again alone and first.

        It is refused instead if its processes have died ``attempts`` times.
        """
        self.job.deaths[item] += 1
        if self.job.deaths[item] < attempts:
            return [Task(self.job, item, item + 1), *self.without(item)]
        Task(self.job, item, item + 1).finish([refusal])
        return self.without(item)


@dataclass(eq=False)
class CellLease:
    """The pixel cells that one shard uses; ``spec`` is the pickled DecodeSpec of its items."""

    number: int
    spec: bytes
    cells: PixelCells
    free: FreeCells
    pool: DecodePool
    watch: LeaseWatch

    def submit(self, cells: Sequence[int], items: Sequence[Item]) -> Future[list[Outcome]]:
        """Decode items into cells. The result has one outcome per item."""
        return self.pool.submit(self, cells, items)


class DecodePool:
    """``processes`` decode processes. ``sample_seconds`` is the longest time for one image, ``attempts`` the number of
    deaths of its process after which an image is refused. ``finished`` counts the items so far."""

    def __init__(self, processes: int, sample_seconds: float = 300.0, attempts: int = 2) -> None:
        self.sample_seconds, self.attempts = sample_seconds, attempts
        self.finished = 0  # approximate under threads; only its changes matter
        self.idle = 0
        self.closed = False
        self.jobs: queue.PriorityQueue[tuple[float, int, Job | None]] = queue.PriorityQueue()
        self.status = SharedMemory(StatusBoard.bytes(processes))
        self.pixels = SharedMemory(1)  # the byte that processes lock
        self._regions: list[tuple[int, Bytes]] = []  # start and memory of each region that no shard uses
        self._changing = threading.Lock()
        self._job_numbers, self._lease_numbers = itertools.count(1), itertools.count(1)
        self._servers = [_Server(self, number) for number in range(processes)]
        for server in self._servers:
            server.start()

    @property
    def processes(self) -> int:
        return len(self._servers)

    def wait_until_ready(self) -> None:
        """Wait until all processes run. Raises RuntimeError if one does not start."""
        for server in self._servers:
            server.ready.wait()
            if server.start_error is not None:
                raise RuntimeError(server.start_error)

    def allocate(self, size: int) -> Bytes:
        """Add a region of pixel memory of ``size`` bytes, which one shard at a time uses, and return it."""
        with self._changing:
            start = -(-self.pixels.size // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages can be locked for a device
            self.pixels.resize(start + size)
            region = self.pixels.array()[start:]
            self._regions.append((start, region))
            return region

    @contextlib.contextmanager
    def lease(self, spec: DecodeSpec, cells: int, watch: LeaseWatch | None = None) -> Iterator[CellLease]:
        """Cells for one shard, whose steps ``watch`` receives. No process uses them when the context ends."""
        size = cells * spec.layout.cell_bytes
        start, region = self._take_region(size)
        memory = region[:size]
        placed = replace(spec, start=start, stop=start + size)
        lease = CellLease(
            next(self._lease_numbers),
            pickle.dumps(placed, pickle.HIGHEST_PROTOCOL),
            spec.layout.cells(memory),
            FreeCells(cells),
            self,
            watch or LeaseWatch(),
        )
        try:
            yield lease
        finally:
            with self._changing:
                self._regions.append((start, region))

    def submit(self, lease: CellLease, cells: Sequence[int], items: Sequence[Item]) -> Future[list[Outcome]]:
        """Decode items into cells of a lease. The result has one outcome per item."""
        job = Job(next(self._job_numbers), lease, cells, items)
        with self._changing:
            if self.closed:
                raise RuntimeError(STOPPED)
            self.jobs.put((lease.number, job.number, job))
        return job.future

    def longest(self) -> str | None:
        """Key of the item that a process has worked on for the longest time, or None if none is in work."""
        working = [at for server in self._servers if (at := server.working_on()) is not None]
        return max(working, key=lambda at: at[1])[0] if working else None

    def next_job(self, wait: bool) -> Job | None:
        """The next job. Without ``wait``, None if other processes have nothing to do and can take what there is."""
        while wait or self.jobs.qsize() > self.idle:
            self._count_idle(+wait)
            try:
                _, _, job = self.jobs.get(block=wait)
            except queue.Empty:
                return None
            finally:
                self._count_idle(-wait)
            if job is None or job.future.set_running_or_notify_cancel():
                return job
        return None

    def close(self) -> None:
        """Kill the processes; whoever waits for an outcome gets a RuntimeError."""
        with self._changing:
            self.closed = True
        for _ in self._servers:
            self.jobs.put((math.inf, 0, None))
        for server in self._servers:
            server.kill()
            server.join()
        with contextlib.suppress(queue.Empty):
            while True:
                if (job := self.jobs.get_nowait()[2]) is not None:
                    fail(job)

    def __enter__(self) -> DecodePool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _count_idle(self, change: int) -> None:
        with self._changing:
            self.idle += change

    def _take_region(self, size: int) -> tuple[int, Bytes]:
        with self._changing:
            for number, (_, region) in enumerate(self._regions):
                if len(region) >= size:
                    return self._regions.pop(number)
        self.allocate(size)
        return self._take_region(size)


class _Server(threading.Thread):
    """The thread that serves one process: starts and replaces it, sends it tasks and receives their outcomes.

    The kernel kills the process when this thread ends.
    """

    def __init__(self, pool: DecodePool, number: int) -> None:
        super().__init__(name=f"decode-{number}", daemon=True)
        self.pool, self.number = pool, number
        self.board = StatusBoard(pool.status)
        self.ready = threading.Event()
        self.start_error: str | None = None
        self._handle: ProcessHandle | None = None
        self._lost_starts = 0
        self._known: set[int] = set()  # leases whose spec the process has
        self._todo: deque[Task] = deque()  # what is left of tasks of a process that died
        self._sent: deque[Task] = deque()
        self._hung: tuple[int, int] | None = None  # job and item at which the process was killed

    def run(self) -> None:
        self._start()
        self.ready.set()
        while not self.pool.closed:
            self._send_tasks()
            if self._sent:
                self._receive()
        for task in [*self._sent, *self._todo]:
            fail(task.job)
        if self._handle is not None:
            self._handle.close()

    def kill(self) -> None:
        if (handle := self._handle) is not None:
            handle.kill()

    def working_on(self) -> tuple[str, float] | None:
        """Key of the item in work and the seconds, or None."""
        if (at := self.board.get(self.number)) is None:
            return None
        items = (task.job.items for task in list(self._sent) if task.job.number == at[0])
        return next(((of_job[at[1]].key, at[2]) for of_job in items), None)

    def _start(self) -> None:
        """Start the process; one that dies before it is ready, such as for lack of memory, is started again."""
        for _ in range(_MAX_LOST_STARTS):
            try:
                self._handle = ProcessHandle(self.number, self.pool.status, self.pool.pixels)
            except (ProcessDied, OSError) as error:
                self.start_error = f"a decode process does not start: {error}"
            else:
                self.start_error = None
                return

    def _send_tasks(self) -> None:
        """Send tasks until the process has enough of them; wait for one if it has none."""
        while len(self._sent) < DEPTH:
            task = self._todo.popleft() if self._todo else self._next_task()
            if task is None:
                return
            if task.job.future.done():  # it has failed
                continue
            if self._handle is None:
                self._start()
            if self._handle is None:
                fail(task.job, self.start_error)
                continue
            lease, part = task.job.lease, slice(task.start, task.stop)
            spec = None if lease.number in self._known else lease.spec
            self._known.add(lease.number)
            job = task.job
            self._sent.append(task)
            self._handle.send(Chunk(job.number, task.start, lease.number, spec, job.cells[part], job.items[part]))

    def _next_task(self) -> Task | None:
        job = self.pool.next_job(wait=not self._sent)
        return None if job is None else Task(job, 0, len(job.items))

    def _receive(self) -> None:
        assert self._handle is not None
        limit = self.pool.sample_seconds
        try:
            outcomes = self._handle.receive(min(_MAX_LOOK_SECONDS, limit / 4))
        except ProcessDied as error:
            self._handle_death(str(error))
            return
        if outcomes is not None:
            task = self._sent.popleft()
            if not task.job.future.done():
                task.finish(outcomes)
            self.pool.finished += len(outcomes)
            self._lost_starts = 0
        elif (at := self.board.get(self.number)) is not None and at[2] > limit and self._hung is None:
            self._hung = at[:2]
            self._handle.kill()

    def _handle_death(self, ending: str) -> None:
        """Put what the process had not finished in front of the queue; another process is started for it."""
        at, hung = self.board.get(self.number), self._hung
        self.board.clear(self.number)
        tasks, self._handle, self._hung = list(self._sent), None, None
        self._sent.clear()
        self._known.clear()
        self.pool.finished += 1
        guilty = next(
            (t for t in tasks if at is not None and t.job.number == at[0] and t.start <= at[1] < t.stop), None
        )
        if at is None or guilty is None:
            self._lost_starts += 1
            self._todo.extend(tasks)
            if self._lost_starts >= _MAX_LOST_STARTS and tasks:
                fail(self._todo.popleft().job, f"decode processes die before they begin an image: {ending}")
            return
        item = guilty.job.items[at[1]]
        refusal = self._refusal(item, ending, hung == at[:2])
        for task in tasks:
            self._todo.extend(guilty.blame(at[1], refusal, self.pool.attempts) if task is guilty else [task])

    def _refusal(self, item: Item, ending: str, hung: bool) -> Refusal:
        key = item.raw.key if isinstance(item, SourceItem) else item.key
        attempts = self.pool.attempts
        if hung:
            limit = f"failures.sample_seconds = {self.pool.sample_seconds:g}"
            return Refusal(key, Reason.IMAGE_HUNG, f"decoding took longer than {limit}, {attempts} times")
        detail = f"the process that decoded it ended with {ending}, {attempts} times"
        return Refusal(key, Reason.IMAGE_CRASHED, detail)


def fail(job: Job, error: str | None = None) -> None:
    """End a job with a RuntimeError."""
    if not job.future.done():
        job.future.set_exception(RuntimeError(error or STOPPED))
