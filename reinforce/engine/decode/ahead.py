"""An ordered map over decode processes that runs ahead of its consumer within bounds."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import wait

from reinforce.engine.decode.decode_pool import CellLease, RowChunk
from reinforce.engine.decode.row import Decoded, Row
from reinforce.engine.messages.pulse import DECODING, READING
from reinforce.source.samples import RawSample, Refusal

#: A chunk is full at CHUNK_ROWS rows or _CHUNK_BYTES encoded bytes.
CHUNK_ROWS = 8
_CHUNK_BYTES = 2**20
_MAX_PENDING_BYTES = 128 * 2**20


def chunk_rows(window: int, processes: int) -> int:
    """Rows of a chunk: two chunks of a window per process."""
    return max(1, min(CHUNK_ROWS, window // (2 * processes)))


def decode_ahead(lease: CellLease, rows: Iterable[Row | Refusal], window: int) -> Iterator[Row | Refusal]:
    """Yield each row with its cell and what was decoded, in order; a Refusal passes through.

    A sample of the source that cannot be used gives its Refusal; a row of the samples layer is black then. At most
    ``window`` rows are pending, and fewer if their encoded bytes add up to more than 128 MiB. The consumer releases the
    cells. Raises RuntimeError for a row at which a decode process raised.
    """
    ahead = _Ahead(lease, chunk_rows(window, lease.pool.processes))
    try:
        for row in lease.watch.steps(READING, rows):
            ahead.add(row)
            while len(ahead) > window or (ahead.bytes > _MAX_PENDING_BYTES and len(ahead) > 1):
                yield ahead.take()
        while len(ahead):
            yield ahead.take()
    finally:
        ahead.cancel()


class _Ahead:
    """The pending rows, in order, and the chunks that they are in."""

    def __init__(self, lease: CellLease, chunk_limit: int) -> None:
        self.bytes = 0  # encoded, of all pending rows
        self._lease, self._chunk_limit = lease, chunk_limit
        self._pending: deque[Refusal | tuple[RowChunk, int]] = deque()
        self._open, self._open_bytes = RowChunk(lease), 0
        self._submitted: deque[RowChunk] = deque()

    def __len__(self) -> int:
        return len(self._pending)

    def add(self, row: Row | Refusal) -> None:
        if isinstance(row, Refusal):
            self._pending.append(row)
            return
        rows, size = self._open.rows, row.size
        self._pending.append((self._open, len(rows)))
        row.cell = self._lease.free.take()
        rows.append(row)
        self._open_bytes += size
        self.bytes += size
        if len(rows) == self._chunk_limit or self._open_bytes > _CHUNK_BYTES:
            self._submit()

    def take(self) -> Row | Refusal:
        """The oldest row, once it is decoded."""
        entry = self._pending.popleft()
        if isinstance(entry, Refusal):
            return entry
        chunk, number = entry
        if chunk is self._open:
            self._submit()
        row = chunk.rows[number]
        with self._lease.watch.stage(DECODING, f"key {row.key!r}"):
            outcome = chunk.future.result()[number]
        self.bytes -= row.size
        if isinstance(outcome, str):
            raise RuntimeError(outcome)
        assert row.cell is not None
        if isinstance(outcome, Refusal):
            if isinstance(row.sample, RawSample):
                self._lease.free.release([row.cell])
                return outcome
            self._lease.cells.blacken(row.cell)  # an image that was accepted before crashes its decode process now
            outcome = Decoded(unreadable=outcome)
        row.finish(outcome)
        return row

    def cancel(self) -> None:
        """Withdraw what no process has begun, and wait until no process writes into the cells any more."""
        futures = [chunk.future for chunk in self._submitted]
        wait([future for future in futures if not future.cancel()])

    def _submit(self) -> None:
        """Submit the open chunk and open another."""
        chunk = self._open
        self._lease.pool.submit(chunk)
        self._lease.watch.read_bytes += self._open_bytes
        self._open, self._open_bytes = RowChunk(self._lease), 0
        self._submitted.append(chunk)
        while self._submitted and self._submitted[0].future.done():
            self._submitted.popleft()
