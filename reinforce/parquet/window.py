"""A Parquet file whose ranges are fetched once, checked in memory, and then read by Arrow from there."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import pyarrow.parquet as pq

from reinforce.parquet.footers import MAX_FOOTER_BYTES, TAIL_BYTES, ArrowInput, RefusedFile, footer_bytes, read_footer
from reinforce.parquet.pages import Bytes

_GAP = 2**13  # bytes between two columns that are read with them in one request


class WindowFile(ArrowInput):
    """An open binary file of ``size`` bytes, which the caller closes. ``error`` is what the storage has raised.

    The end of the file is kept, since it often is all of it, and what was fetched last, since it may be fetched again.
    """

    def __init__(self, file: Any, size: int) -> None:
        self._file, self._size = file, size
        self._parts: dict[Hashable, tuple[int, memoryview]] = {}  # where each begins, and its bytes
        self._end = size, memoryview(b"")
        self.error: Exception | None = None

    def footer(self) -> tuple[pq.FileMetaData, bytes]:
        """The footer, and its bytes. Raises RefusedFile."""
        for length in (TAIL_BYTES, MAX_FOOTER_BYTES + 8):
            start = max(0, self._size - length)
            tail = bytes(self.read_at(start, self._size - start))
            if (footer := read_footer(tail, self._size)) is not None:
                self._end = start, memoryview(tail)
                return footer, footer_bytes(tail)
        raise RefusedFile("its footer cannot be read")

    def fetch(self, spans: Sequence[tuple[int, int]]) -> None:
        """Fetch these (start, length) in place of all before, neighbours in one request."""
        wanted = _merged(spans)
        self._parts = {start: part for start, part in self._parts.items() if (start, len(part[1])) in wanted}
        for start, length in wanted:
            if start not in self._parts:
                self.keep(start, start, self.read_at(start, length))

    def keep(self, key: Hashable, start: int, data: Bytes) -> None:
        """Keep bytes at ``start`` for Arrow, in place of those of the same ``key``."""
        self._parts[key] = (start, memoryview(data).cast("B"))

    def read_at(self, start: int, length: int) -> Bytes:
        """Bytes that were fetched, and the rest from the file. Raises RefusedFile if the file ends before."""
        for first, part in (self._end, *self._parts.values()):
            if first <= start < first + len(part):
                done = part[start - first : start - first + length]
                if len(done) == length:
                    return done
                return b"".join((done, self.read_at(start + len(done), length - len(done))))
        return self._read_file(start, length)

    def _read_file(self, start: int, length: int) -> Any:
        read = getattr(self._file, "read_buffer", self._file.read)  # without a copy from a memory map
        data = bytearray()
        try:
            self._file.seek(start)
            while len(data) < length and (part := read(length - len(data))):
                if len(part) == length:
                    return part
                data += part
        except Exception as error:  # each driver has its own exceptions
            self.error = error
            raise
        if len(data) < length:
            raise RefusedFile("it is cut off: the file is shorter than its footer states")
        return bytes(data)

    # The file that Arrow reads.

    def read(self, count: int = -1) -> Bytes:
        left = max(0, self._size - self._position)
        data = self.read_at(self._position, left if count < 0 else min(count, left))
        self._position += len(data)
        return data


def _merged(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The spans in order, with neighbours joined."""
    merged: list[tuple[int, int]] = []
    for start, length in sorted(spans):
        if merged and start <= sum(merged[-1]) + _GAP:
            first, before = merged[-1]
            merged[-1] = (first, max(before, start + length - first))
        else:
            merged.append((start, length))
    return merged
