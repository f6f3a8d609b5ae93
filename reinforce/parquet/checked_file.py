"""A Parquet file that Arrow reads a few rows at a time: each page is checked before it is passed on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow.parquet as pq

from reinforce.parquet.delta_pages import decoded_bytes, is_delta
from reinforce.parquet.footers import RefusedFile, span
from reinforce.parquet.pages import DICTIONARY, BadPage, Bytes, CutOff, Page, longest_entry, read_page
from reinforce.parquet.window import WindowFile

#: Bytes of a page and of the pages of one batch, when decompressed, that are decoded at most.
MAX_PAGE_BYTES = 2**29
MAX_BATCH_BYTES = 2**30
MAX_LIST_VALUES = 2**24  # of a column of lists in a row group
_BATCH_BYTES = 16 * 2**20  # of a batch, by the sizes in the footer
_BATCH_ROWS = 256
_WINDOW_BYTES = 32 * 2**20  # of a row group that is fetched by one request
_HEADER_BYTES = 2**14  # of a page header; statistics in it can be longer
_MAX_HEADER_BYTES = 2**24


class CheckedFile(WindowFile):
    """A file that Arrow reads column chunks from; each page header is checked when it is read.

    ``batch_bytes`` are the decompressed bytes of the pages since it was set.
    """

    def __init__(self, file: Any) -> None:
        super().__init__(file, file.seek(0, 2))
        self._chunks: list[_Chunk] = []
        self.batch_bytes = 0

    def check(self, group: Any, leaves: Mapping[int, Any], schema: pq.ParquetSchema) -> int:
        """Prepare to read these leaves of a row group, by their place in the schema; returns the rows of a batch.

        Raises RefusedFile for a leaf that is above the bounds.
        """
        rows = max(1, group.num_rows)
        size = sum(max(0, leaf.total_uncompressed_size) for leaf in leaves.values())
        batch = max(1, min(_BATCH_ROWS, _BATCH_BYTES * rows // max(1, size)))
        self._chunks = []
        for place, leaf in leaves.items():
            if leaf.num_values != group.num_rows and leaf.num_values > MAX_LIST_VALUES:
                raise RefusedFile(f"column {leaf.path_in_schema} has {leaf.num_values:,} values in {rows:,} rows")
            start, length = span(leaf, self._size)
            self._chunks.append(_Chunk(start, start + length, leaf, schema.column(place)))
            if leaf.physical_type == "BYTE_ARRAY" and leaf.has_dictionary_page:
                batch = min(batch, self._dictionary_rows(start, leaf, batch))
        first, last = min(chunk.next for chunk in self._chunks), max(chunk.end for chunk in self._chunks)
        self.fetch([(first, last - first)] if last - first <= _WINDOW_BYTES else [])
        return batch

    def _dictionary_rows(self, start: int, leaf: Any, rows: int) -> int:
        """Rows of a batch whose values together stay within the bounds if each is the longest of the dictionary."""
        page, header = self._page(start, b"")
        if page.type != DICTIONARY or page.uncompressed * rows <= MAX_BATCH_BYTES // 16:
            return rows
        if page.uncompressed > MAX_PAGE_BYTES:
            raise BadPage(f"a dictionary of {page.uncompressed:,} bytes; at most {MAX_PAGE_BYTES:,} are read")
        stored = self.read_at(start + header, page.stored)
        return max(1, MAX_BATCH_BYTES // 16 // max(1, longest_entry(page, stored, leaf.compression)))

    def _page(self, position: int, known: Bytes) -> tuple[Page, int]:
        """The page whose header is at ``position``, and the bytes of its header. ``known`` are bytes from there on."""
        length = _HEADER_BYTES
        while True:
            try:
                page = read_page(known, 0)
                return page, page.start
            except CutOff:
                if length > _MAX_HEADER_BYTES or len(known) >= self._size - position:
                    raise
                known = self.read_at(position, min(length, self._size - position))
                length *= 16

    def _check_pages(self, start: int, data: Bytes) -> None:
        end = start + len(data)
        for chunk in self._chunks:
            while chunk.next < min(end, chunk.end) and start <= chunk.next:
                known = memoryview(data)[chunk.next - start :]
                page, header = self._page(chunk.next, known)
                body = chunk.pass_page(page, header)
                self.batch_bytes += page.uncompressed
                if is_delta(page):
                    self.batch_bytes += self._check_delta(chunk, page, body, known[header:])
                if self.batch_bytes > MAX_BATCH_BYTES:
                    raise BadPage(f"some rows need more than {MAX_BATCH_BYTES:,} bytes")

    def _check_delta(self, chunk: _Chunk, page: Page, start: int, known: memoryview) -> int:
        """Bytes of the texts of a page whose body is at ``start``; ``known`` is what has been read from there on.

        The rest of the body is kept for Arrow, which reads it next.
        """
        body: Bytes = known[: page.stored]
        if len(body) < page.stored:
            rest = self.read_at(start + len(body), page.stored - len(body))
            self.keep(chunk, start + len(body), rest)
            body = b"".join((body, rest))
        size = decoded_bytes(page, body, chunk.column, chunk.compression)
        if size > MAX_PAGE_BYTES:
            raise BadPage(f"a page of texts of {size:,} bytes; at most {MAX_PAGE_BYTES:,} are read")
        return size

    def read(self, count: int = -1) -> Bytes:
        start = self._position
        data = super().read(count)
        self._check_pages(start, data)
        return data


class _Chunk:
    """A column chunk that is being read: the place of its next page header, and how many values are to come."""

    def __init__(self, start: int, end: int, leaf: Any, column: Any) -> None:
        self.next, self.end = start, end
        self.column, self.compression = column, leaf.compression
        self._values, self._first = leaf.num_values, start

    def pass_page(self, page: Page, header: int) -> int:
        """Check a page and go on to the next; returns the place of its body. Raises BadPage."""
        if page.uncompressed > MAX_PAGE_BYTES:
            raise BadPage(f"a page of {page.uncompressed:,} bytes; at most {MAX_PAGE_BYTES:,} are read")
        if page.type == DICTIONARY:
            if self.next != self._first:
                raise BadPage("a dictionary that is not the first page")
        else:
            self._values -= page.values
        if self._values < 0:
            raise BadPage("the pages have more values than the footer")
        body = self.next + header
        self.next = body + page.stored
        if self.next > self.end:
            raise BadPage("a page is longer than its column chunk")
        return body
