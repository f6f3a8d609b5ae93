"""Rows of a Parquet file of anyone's, a few at a time: neither a row group nor a column is decoded as a whole.

A file may come from somebody else, and some kilobytes can ask a decoder for gigabytes: by the footer, by the headers of
pages, by a dictionary with one long value, or by delta-encoded texts that repeat each other. Arrow reads through a file
that checks each page before it passes it on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from reinforce.config import Input, Limits
from reinforce.parquet.delta_pages import ColumnLevels, decoded_bytes, is_delta
from reinforce.parquet.footers import (
    MAX_FOOTER_BYTES,
    TAIL_BYTES,
    ArrowInput,
    FooterCheck,
    RefusedFile,
    read_footer,
    span,
)
from reinforce.parquet.pages import DICTIONARY, BadPage, CutOff, Page, longest_entry, read_page
from reinforce.source.formats.base import Part, Shard, SourceFormat
from reinforce.source.formats.columns import Columns, NoColumn, RowReader, find_columns
from reinforce.source.samples import Item, ReadBudget, Refusal, unique_keys
from reinforce.source.streams import check_file
from reinforce.source.urls import filesystem
from schemas import Reason

Row = Mapping[str, Any]

#: Bytes of a page and of the pages of one batch, when decompressed, that are decoded at most.
MAX_PAGE_BYTES = 2**29
MAX_BATCH_BYTES = 2**30
MAX_LIST_VALUES = 2**24  # of a column of lists in a row group
_BATCH_BYTES = 16 * 2**20  # of a batch, by the sizes in the footer
_BATCH_ROWS = 256
_READ_BYTES = 4 * 2**20  # per request and column
_WINDOW_BYTES = 32 * 2**20  # of a row group that is fetched by one request
_HEADER_BYTES = 2**14  # of a page header; statistics in it can be longer
_MAX_HEADER_BYTES = 2**24


class ParquetFile:
    """An open Parquet file. A context manager. Raises RefusedFile for a footer that cannot be used."""

    def __init__(self, url: str) -> None:
        fs, path = filesystem(url)
        check_file(fs, path)
        self._stack = contextlib.ExitStack()
        self._file = _CheckedFile(self._stack.enter_context(fs.open(path, "rb", cache_type="none")))
        try:
            self.footer = self._file.footer()
            self.schema = _schema(self.footer)
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> ParquetFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def types(self) -> dict[str, pa.DataType]:
        """The types of the columns by name."""
        return {field.name: field.type for field in self.schema}

    @property
    def group_sizes(self) -> list[int]:
        """The rows of each row group."""
        return [self.footer.row_group(number).num_rows for number in range(self.footer.num_row_groups)]

    def rows(
        self, columns: Columns, groups: Iterable[int] | None = None, first: int = 0
    ) -> Iterator[tuple[int, Row] | RefusedFile]:
        """Yield (number, row) in order; a row group that cannot be read yields RefusedFile in its place.

        With ``groups``, only the rows of these row groups, which are numbered from ``first`` on. Raises the storage's
        errors.
        """
        names = _leaves(self.types, columns)
        source = pa.PythonFile(self._file, mode="r")
        options = {"buffer_size": _READ_BYTES, "pre_buffer": False, "page_checksum_verification": True}
        parquet = pq.ParquetFile(source, metadata=self.footer, **options)
        check = FooterCheck(self.footer, names)
        for number in range(self.footer.num_row_groups) if groups is None else groups:
            count = 0
            try:
                check.check(number)
                if not (count := self.footer.row_group(number).num_rows):
                    continue
                for batch in self._batches(parquet, number, names):
                    yield from enumerate(batch, first)
                    first, count = first + len(batch), count - len(batch)
            except (BadPage, RefusedFile, pa.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
                if self._file.error is not None:
                    raise self._file.error from None
                yield RefusedFile(f"row group {number}, from row {first:,} on: {_describe(error)}")
            first += count

    def _batches(self, parquet: pq.ParquetFile, number: int, names: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
        group = self.footer.row_group(number)
        leaves = {i: group.column(i) for i in range(group.num_columns)}
        leaves = {i: leaf for i, leaf in leaves.items() if _is_read(leaf.path_in_schema, names)}
        size = self._file.check(group, leaves, self.footer.schema)
        batches = parquet.iter_batches(size, row_groups=[number], columns=[*names], use_threads=False)
        while True:
            self._file.batch_bytes = 0
            batch = next(batches, None)
            if batch is None:
                return
            yield batch.to_pylist()


def is_binary(type_: pa.DataType) -> bool:
    """Whether a column has bytes, which cannot be in metadata."""
    nested = [type_.field(i).type for i in range(type_.num_fields)]
    return any(map(is_binary, nested)) or "binary" in str(type_).partition("<")[0]


def _check_image_column(columns: Columns, types: Mapping[str, pa.DataType]) -> None:
    """Raise NoColumn if the type of the image column is none that images are stored in."""
    type_ = types[columns.image]
    fields = {type_.field(i).name for i in range(type_.num_fields)} if pa.types.is_struct(type_) else set()
    if not {"bytes", "path"} & fields and str(type_).removeprefix("large_") not in ("string", "binary"):
        raise NoColumn(
            f"column {columns.image} has type {str(type_)[:200]}; images are binary, a struct of bytes and path as "
            "Hugging Face has it, base64 text, or paths and URLs: name the column in input.image"
        )


def _leaves(types: Mapping[str, pa.DataType], columns: Columns) -> list[str]:
    """The columns that are read, and of the image's struct only bytes and path."""
    names = [name for name in types if name in columns.read and name != columns.image]
    image = types[columns.image]
    if not pa.types.is_struct(image):
        return [columns.image, *names]
    parts = [image.field(i).name for i in range(image.num_fields)]
    return [*(f"{columns.image}.{part}" for part in ("bytes", "path") if part in parts), *names]


def _is_read(path: str, names: Sequence[str]) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in names)


def _schema(footer: pq.FileMetaData) -> pa.Schema:
    try:
        schema = footer.schema.to_arrow_schema()
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise RefusedFile(f"its schema cannot be read: {error}") from error
    if len({*schema.names}) < len(schema.names):
        raise RefusedFile("two of its columns have one name")
    return schema


def _describe(error: Exception) -> str:
    if "CRC checksum" in str(error):
        return "a page does not have its checksum: bytes of it have changed"
    return str(error)[:300]


class _CheckedFile(ArrowInput):
    """A file that Arrow reads column chunks from; each page header is checked when it is read.

    ``error`` is what the storage has raised, ``batch_bytes`` are the decompressed bytes of the pages since it was set.
    """

    closed = False

    def __init__(self, file: Any) -> None:
        self._file, self._position = file, 0
        self._size: int = file.seek(0, 2)
        self._chunks: list[_Chunk] = []
        self._window = (0, memoryview(b""))  # where it begins, and its bytes
        self.error: Exception | None = None
        self.batch_bytes = 0

    def footer(self) -> pq.FileMetaData:
        """The footer. Raises RefusedFile."""
        for length in (TAIL_BYTES, MAX_FOOTER_BYTES + 8):
            start = max(0, self._size - length)
            footer = read_footer(bytes(self._read_at(start, self._size - start)), self._size)
            if footer is not None:
                return footer
        raise RefusedFile("its footer cannot be read")

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
        self._window = (0, memoryview(b""))
        if last - first <= _WINDOW_BYTES:
            self._window = (first, memoryview(self._read_at(first, last - first)))
        return batch

    def _dictionary_rows(self, start: int, leaf: Any, rows: int) -> int:
        """Rows of a batch whose values together stay within the bounds if each is the longest of the dictionary."""
        page, header = self._page(start, b"")
        if page.type != DICTIONARY or page.uncompressed * rows <= MAX_BATCH_BYTES // 16:
            return rows
        if page.uncompressed > MAX_PAGE_BYTES:
            raise BadPage(f"a dictionary of {page.uncompressed:,} bytes; at most {MAX_PAGE_BYTES:,} are read")
        stored = self._read_at(start + header, page.stored)
        return max(1, MAX_BATCH_BYTES // 16 // max(1, longest_entry(page, stored, leaf.compression)))

    def _page(self, position: int, known: bytes | memoryview) -> tuple[Page, int]:
        """The page whose header is at ``position``, and the bytes of its header. ``known`` are bytes from there on."""
        length = _HEADER_BYTES
        while True:
            try:
                page = read_page(known, 0)
                return page, page.start
            except CutOff:
                if length > _MAX_HEADER_BYTES or len(known) >= self._size - position:
                    raise
                known = self._read_at(position, min(length, self._size - position))
                length *= 16

    def _check_pages(self, start: int, data: bytes | memoryview) -> None:
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
        body: bytes | memoryview = known[: page.stored]
        if len(body) < page.stored:
            rest = self._read_at(start + len(body), page.stored - len(body))
            chunk.ahead = (start + len(body), memoryview(rest))
            body = b"".join((body, rest))
        size = decoded_bytes(page, body, chunk.levels)
        if size > MAX_PAGE_BYTES:
            raise BadPage(f"a page of texts of {size:,} bytes; at most {MAX_PAGE_BYTES:,} are read")
        return size

    def _read_at(self, start: int, length: int) -> bytes | memoryview:
        for first, part in (self._window, *(chunk.ahead for chunk in self._chunks)):
            if first <= start and start + length <= first + len(part):
                return part[start - first : start - first + length]
            if first <= start < first + len(part):
                done = part[start - first :]
                return b"".join((done, self._read_at(start + len(done), length - len(done))))
        try:
            self._file.seek(start)
            data = bytearray()
            while len(data) < length and (part := self._file.read(length - len(data))):
                if len(part) == length:
                    return bytes(part)
                data += part
        except Exception as error:
            self.error = error
            raise
        if len(data) < length:
            raise BadPage("the file ends before its footer says")
        return bytes(data)

    # The file that Arrow reads.

    def read(self, count: int = -1) -> bytes | memoryview:
        left = max(0, self._size - self._position)
        data = self._read_at(self._position, left if count < 0 else min(count, left))
        self._check_pages(self._position, data)
        self._position += len(data)
        return data


class _Chunk:
    """A column chunk that is being read: the place of its next page header, and how many values are to come."""

    def __init__(self, start: int, end: int, leaf: Any, column: Any) -> None:
        self.next, self.end = start, end
        self.levels = ColumnLevels(column.max_repetition_level, column.max_definition_level, leaf.compression)
        # What has been read before Arrow asked for it: where it begins, and its bytes.
        self.ahead = (0, memoryview(b""))
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


class Parquet(SourceFormat):
    name = "parquet"
    noun = "parquet file"
    endings = (".parquet", ".pq")
    is_table = True
    whole_bytes = 2**31

    def recognises(self, head: bytes) -> bool:
        return head.startswith(b"PAR1")

    def read(self, shard: Shard, spec: Input, budget: ReadBudget | None = None) -> Iterator[Item]:
        return unique_keys(self._samples(shard, spec), spec.limits)

    def _samples(self, shard: Shard, spec: Input) -> Iterator[Item]:
        reader = RowReader(shard.name, spec)
        try:
            with ParquetFile(shard.file) as file:
                types = file.types
                columns = find_columns([*types], spec, [name for name, type_ in types.items() if not is_binary(type_)])
                _check_image_column(columns, types)
                part = shard.part
                if part:
                    _check_groups(part, file.group_sizes)
                for item in file.rows(columns, *((range(part.start, part.end), part.first) if part else ())):
                    if isinstance(item, RefusedFile):
                        yield Refusal(None, Reason.SHARD_DAMAGED, str(item))
                    else:
                        yield reader.sample(*item, columns)
        except (RefusedFile, NoColumn) as error:
            yield Refusal(None, Reason.SHARD_UNREADABLE, f"a Parquet file that cannot be used: {error}")

    def count(self, url: str, limits: Limits) -> int | None:
        try:
            with ParquetFile(url) as file:
                return min(int(file.footer.num_rows), limits.shard_samples)
        except RefusedFile:
            return None

    def parts(self, url: str, rows: int, last: Part | None = None) -> Iterator[Part]:
        """Yield runs of whole row groups."""
        with ParquetFile(url) as file:
            sizes = file.group_sizes
        if last:
            _check_groups(last, sizes)
        first, start = (last.first + last.rows, last.end) if last else (0, 0)
        count = 0
        for number in range(start, len(sizes)):
            count += sizes[number]
            if count >= rows:
                yield Part(url, first, count, start, number + 1)
                first, start, count = first + count, number + 1, 0
        if count:
            yield Part(url, first, count, start, len(sizes))

    def first_row(self, url: str) -> tuple[list[str], Row]:
        with ParquetFile(url) as file:
            types = file.types
            binary = [name for name, type_ in types.items() if is_binary(type_)]
            plain = [name for name in types if name not in binary]
            columns = Columns(plain[0], None, {}, tuple(plain), tuple(types)) if plain else None
            first = next(file.rows(columns), None) if columns else None
            row = first[1] if isinstance(first, tuple) else {}
            return binary, {name: row.get(name) for name in types}


def _check_groups(part: Part, sizes: list[int]) -> None:
    """Raise RefusedFile if a file with row groups of these rows has others than when a part was formed."""
    if len(sizes) < part.end or sum(sizes[: part.end]) != part.first + part.rows:
        raise RefusedFile("it has other row groups than when its shards were formed")


FORMAT = Parquet()
