"""An ordered map over decode processes that runs ahead of its consumer within bounds."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, wait

from reinforce.engine.decode.item import Decoded, Failed, Item, Outcome
from reinforce.engine.decode.pool import CellLease
from reinforce.engine.messages.pulse import DECODING, READING
from reinforce.source.samples import Refusal

#: Limits of a chunk, of which the first that is reached closes it: items and encoded bytes.
CHUNK_ITEMS = 8
_CHUNK_BYTES = 2**20
_MAX_PENDING_BYTES = 128 * 2**20


class _Chunk:
    """Items that are sent to a decode process together."""

    def __init__(self) -> None:
        self.cells: list[int] = []
        self.items: list[Item] = []
        self.size = 0  # encoded bytes
        self.future: Future[list[Outcome]] | None = None


def chunk_items(window: int, processes: int) -> int:
    """Items of a chunk: as many as spread a window over all processes, with two chunks for each."""
    return max(1, min(CHUNK_ITEMS, window // (2 * processes)))


def decode_ahead(
    lease: CellLease, items: Iterable[Item | Refusal], window: int
) -> Iterator[tuple[Item | None, int, Decoded | Refusal]]:
    """Yield each item, its cell and what it was decoded to, in order; a Refusal passes through.

    At most ``window`` items are pending, and fewer if their encoded bytes add up to more than 128 MiB. The consumer
    releases the cells of decoded items; those of refused ones are released here. Raises RuntimeError for an item at
    which a decode process raised.
    """
    ahead = _Ahead(lease, chunk_items(window, lease.pool.processes))
    try:
        for item in lease.watch.steps(READING, items):
            ahead.add(item)
            while len(ahead) > window or (ahead.bytes > _MAX_PENDING_BYTES and len(ahead) > 1):
                yield ahead.take()
        while len(ahead):
            yield ahead.take()
    finally:
        ahead.cancel()


class _Ahead:
    """The pending items, in order, and the chunks that they are in."""

    def __init__(self, lease: CellLease, chunk_limit: int) -> None:
        self.bytes = 0  # encoded, of all pending items
        self._lease, self._chunk_limit = lease, chunk_limit
        self._pending: deque[Refusal | tuple[_Chunk, int]] = deque()
        self._open = _Chunk()
        self._submitted: deque[_Chunk] = deque()

    def __len__(self) -> int:
        return len(self._pending)

    def add(self, item: Item | Refusal) -> None:
        if isinstance(item, Refusal):
            self._pending.append(item)
            return
        chunk = self._open
        self._pending.append((chunk, len(chunk.items)))
        chunk.cells.append(self._lease.free.take())
        chunk.items.append(item)
        chunk.size += item.size
        self.bytes += item.size
        if len(chunk.items) == self._chunk_limit or chunk.size > _CHUNK_BYTES:
            self._submit()

    def take(self) -> tuple[Item | None, int, Decoded | Refusal]:
        """The oldest item, its cell and its outcome, once it is decoded."""
        entry = self._pending.popleft()
        if isinstance(entry, Refusal):
            return None, 0, entry
        chunk, number = entry
        if chunk.future is None:
            self._submit()
        assert chunk.future is not None
        item, cell = chunk.items[number], chunk.cells[number]
        with self._lease.watch.stage(DECODING, f"key {item.key!r}"):
            outcome = chunk.future.result()[number]
        self.bytes -= item.size
        if isinstance(outcome, Failed):
            raise RuntimeError(outcome.error)
        if isinstance(outcome, Refusal):
            self._lease.free.release([cell])
        return item, cell, outcome

    def cancel(self) -> None:
        """Withdraw what no process has begun, and wait until no process writes into the cells any more."""
        futures = [chunk.future for chunk in self._submitted if chunk.future is not None]
        wait([future for future in futures if not future.cancel()])

    def _submit(self) -> None:
        """Submit the open chunk and open another."""
        chunk, self._open = self._open, _Chunk()
        chunk.future = self._lease.submit(chunk.cells, chunk.items)
        self._lease.watch.read_bytes += chunk.size
        self._submitted.append(chunk)
        while self._submitted[0].future is not None and self._submitted[0].future.done():
            self._submitted.popleft()
