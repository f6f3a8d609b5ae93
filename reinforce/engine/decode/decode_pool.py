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
from reinforce.engine.decode.process import DEPTH, ProcessDied, ProcessHandle, StatusBoard
from reinforce.engine.decode.row import DecodeSpec, Outcome, Row
from reinforce.engine.messages.pulse import LeaseWatch
from reinforce.processes.shared_memory import SharedMemory
from reinforce.source.samples import Refusal
from schemas import Reason

_MAX_LOOK_SECONDS = 1.0  # between two looks at what a busy process works on
STOPPED = "the decode processes were stopped"
_MAX_LOST_STARTS = 3  # deaths in a row of processes that had not begun an image


@dataclass(eq=False)
class RowChunk:
    """Rows of one lease that a decode process receives together; ``future`` has one outcome for each of them.

    After a process has died at a row, that row is sent again alone and first, and then all others without an outcome.
    """

    lease: CellLease
    rows: list[Row] = field(default_factory=list)
    number: int = field(default_factory=itertools.count(1).__next__)
    future: Future[list[Outcome]] = field(default_factory=Future)
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    deaths: Counter[int] = field(default_factory=Counter)  # of processes that worked on a row
    sent: Sequence[int] = ()  # the rows that a process has now

    def send(self) -> list[Row]:
        """The rows that a process receives now."""
        left = [row for row in range(len(self.rows)) if row not in self.outcomes]
        self.sent = next(([row] for row in left if row in self.deaths), left)
        return [self.rows[row] for row in self.sent]

    def receive(self, outcomes: Iterable[Outcome]) -> bool:
        """Record the outcomes of the rows that were sent; returns whether all rows have one now."""
        self.outcomes.update(zip(self.sent, outcomes, strict=True))
        if len(self.outcomes) < len(self.rows):
            return False
        self.future.set_result([self.outcomes[row] for row in range(len(self.rows))])
        return True

    def fail(self, error: str | None = None) -> None:
        """End with a RuntimeError."""
        if not self.future.done():
            self.future.set_exception(RuntimeError(error or STOPPED))


@dataclass(eq=False)
class CellLease:
    """The pixel cells that one shard uses; ``spec`` is the pickled DecodeSpec of its rows."""

    number: int
    spec: bytes
    cells: PixelCells
    free: FreeCells
    pool: DecodePool
    watch: LeaseWatch


class DecodePool:
    """``processes`` decode processes. ``sample_seconds`` is the longest time for one image, ``attempts`` the number of
    deaths of its process after which an image is refused. ``finished`` counts the rows so far."""

    def __init__(self, processes: int, sample_seconds: float = 300.0, attempts: int = 2) -> None:
        self.sample_seconds, self.attempts = sample_seconds, attempts
        self.finished = 0  # approximate under threads; only its changes matter
        self.idle = 0
        self.closed = False
        self.chunks: queue.PriorityQueue[tuple[float, int, RowChunk | None]] = queue.PriorityQueue()
        self.status = SharedMemory(processes * StatusBoard.ENTRY_BYTES)
        self.pixels = SharedMemory(1)  # the byte that processes lock
        self._regions: list[tuple[int, Bytes]] = []  # start and memory of each region that no shard uses
        self._changing = threading.Lock()
        self._lease_numbers = itertools.count(1)
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

    def submit(self, chunk: RowChunk) -> Future[list[Outcome]]:
        with self._changing:
            if self.closed:
                raise RuntimeError(STOPPED)
            self.chunks.put((chunk.lease.number, chunk.number, chunk))
        return chunk.future

    def longest(self) -> str | None:
        """Key of the row that a process has worked on for the longest time, or None if none is in work."""
        working = [at for server in self._servers if (at := server.working_on()) is not None]
        return max(working, key=lambda at: at[1])[0] if working else None

    def next_chunk(self, wait: bool) -> RowChunk | None:
        """The next chunk. Without ``wait``, None if other processes have nothing to do and can take what there is."""
        while wait or self.chunks.qsize() > self.idle:
            self._count_idle(+wait)
            try:
                _, _, chunk = self.chunks.get(block=wait)
            except queue.Empty:
                return None
            finally:
                self._count_idle(-wait)
            if chunk is None or chunk.future.set_running_or_notify_cancel():
                return chunk
        return None

    def close(self) -> None:
        """Kill the processes. Futures that are not done get a RuntimeError."""
        with self._changing:
            self.closed = True
        for _ in self._servers:
            self.chunks.put((math.inf, 0, None))
        for server in self._servers:
            server.kill()
            server.join()
        with contextlib.suppress(queue.Empty):
            while True:
                if (chunk := self.chunks.get_nowait()[2]) is not None:
                    chunk.fail()

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
    """The thread that serves one process: starts and replaces it, sends it chunks and receives their outcomes.

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
        self._todo: deque[RowChunk] = deque()  # begun in a process that died
        self._sent: deque[RowChunk] = deque()
        self._hung: tuple[int, int] | None = None  # chunk and row at which the process was killed

    def run(self) -> None:
        self._start()
        self.ready.set()
        while not self.pool.closed:
            self._send_chunks()
            if self._sent:
                self._receive()
        for chunk in [*self._sent, *self._todo]:
            chunk.fail()
        if self._handle is not None:
            self._handle.close()

    def kill(self) -> None:
        if (handle := self._handle) is not None:
            handle.kill()

    def working_on(self) -> tuple[str, float] | None:
        """Key of the row in work and the seconds, or None."""
        if (at := self.board.get(self.number)) is None:
            return None
        number, row, seconds = at
        chunk = next((chunk for chunk in list(self._sent) if chunk.number == number), None)
        sent = () if chunk is None else chunk.sent  # it may have been sent again since
        return (chunk.rows[sent[row]].key, seconds) if chunk is not None and row < len(sent) else None

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

    def _send_chunks(self) -> None:
        """Send chunks until the process has enough of them; wait for one if it has none."""
        while len(self._sent) < DEPTH:
            chunk = self._todo.popleft() if self._todo else self.pool.next_chunk(wait=not self._sent)
            if chunk is None:
                return
            if self._handle is None:
                self._start()
            if self._handle is None:
                chunk.fail(self.start_error)
                continue
            lease = chunk.lease
            spec = None if lease.number in self._known else lease.spec
            self._known.add(lease.number)
            self._sent.append(chunk)
            self._handle.send((chunk.number, lease.number, spec, chunk.send()))

    def _receive(self) -> None:
        assert self._handle is not None
        limit = self.pool.sample_seconds
        try:
            outcomes = self._handle.receive(min(_MAX_LOOK_SECONDS, limit / 4))
        except ProcessDied as error:
            self._handle_death(str(error))
            return
        if outcomes is not None:
            chunk = self._sent.popleft()
            if not chunk.receive(outcomes):
                self._todo.appendleft(chunk)
            self.pool.finished += len(outcomes)
            self._lost_starts = 0
        elif (at := self.board.get(self.number)) is not None and at[2] > limit and self._hung is None:
            self._hung = at[:2]
            self._handle.kill()

    def _handle_death(self, ending: str) -> None:
        """Put what the process had not finished in front of the queue; another process is started for it."""
        at, hung = self.board.get(self.number), self._hung
        self.board.clear(self.number)
        self._todo.extendleft(reversed(self._sent))
        guilty = next((chunk for chunk in self._sent if at is not None and chunk.number == at[0]), None)
        self._handle, self._hung = None, None
        self._sent.clear()
        self._known.clear()
        self.pool.finished += 1
        if at is None or guilty is None:
            self._lost_starts += 1
            if self._lost_starts >= _MAX_LOST_STARTS and self._todo:
                self._todo.popleft().fail(f"decode processes die before they begin an image: {ending}")
            return
        row = guilty.sent[at[1]]
        guilty.deaths[row] += 1
        if guilty.deaths[row] >= self.pool.attempts:
            guilty.sent = [row]
            if guilty.receive([self._refusal(guilty.rows[row], ending, hung == at[:2])]):
                self._todo.remove(guilty)

    def _refusal(self, row: Row, ending: str, hung: bool) -> Refusal:
        attempts = self.pool.attempts
        if hung:
            limit = f"failures.sample_seconds = {self.pool.sample_seconds:g}"
            return Refusal(row.source_key, Reason.IMAGE_HUNG, f"decoding took longer than {limit}, {attempts} times")
        detail = f"the process that decoded it ended with {ending}, {attempts} times"
        return Refusal(row.source_key, Reason.IMAGE_CRASHED, detail)
