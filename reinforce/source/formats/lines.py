"""Rows of jsonl and csv files, plain or compressed, one line at a time and of bounded length."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from reinforce.source.captions import json_error, parse_json
from reinforce.source.file_types import TABLE_COMPRESSIONS
from reinforce.source.streams import Seekable, open_stream
from reinforce.source.tar import Readable
from reinforce.source.urls import canonical

Row = Mapping[str, Any]

_CHUNK_BYTES = 2**20
_CSV_LINE_BYTES = 2**20
_ENDS_LINE_BYTES = 2**12  # of a line that only has to be found


@dataclass(frozen=True)
class Span:
    """Bytes of an uncompressed file: the first ``header``, and those from ``start`` to ``end``; ``first`` is the number
    of the first row in the second range."""

    header: int
    start: int
    end: int
    first: int


class BrokenRow(ValueError):
    """A line that is no row; ``too_long`` if it is above the limit."""

    def __init__(self, detail: str, too_long: bool = False) -> None:
        super().__init__(detail)
        self.too_long = too_long


def jsonl_rows(url: str, most: int, span: Span | None = None) -> Iterator[tuple[int, Row] | tuple[int, BrokenRow]]:
    """Yield (number, row) of a file with a JSON object on each line of at most ``most`` bytes; empty lines are skipped.

    With ``span``, only of that part. Raises EOFError for broken compression, and what the storage raises.
    """
    for number, line in _lines(url, most, span):
        if isinstance(line, BrokenRow):
            yield number, line
            continue
        document = parse_json(line)
        if isinstance(document, dict):
            yield number, document
        else:
            yield number, BrokenRow(f"{json_error(line)}: jsonl has one object on each line")


def csv_rows(url: str, span: Span | None = None) -> Iterator[tuple[int, Row] | tuple[int, BrokenRow]]:
    """Yield (number, row) of a csv file, or a tsv file by its name, whose first line has the names of the columns.

    Raises as ``jsonl_rows``.
    """
    reader = _csv_reader(url, _Texts(url, span))
    names: list[str] | None = None
    number = span.first if span else 0
    while True:
        line = reader.line_num + 1
        try:
            values = next(reader, None)
        except (csv.Error, BrokenRow) as error:
            yield number, BrokenRow(f"line {line}: {error}", isinstance(error, BrokenRow))
            if names is None:  # without the names of the columns, no row can be read
                return
            number += 1
            continue
        if values is None:
            return
        if names is None:
            names = values
        elif values:
            yield number, dict(itertools.zip_longest(names, values[: len(names)]))
            number += 1


def jsonl_ends(url: str) -> Iterator[int]:
    """Yield the place after each row of ``jsonl_rows``, in bytes of the uncompressed file. Raises as that."""
    position = 0
    for line, size in _file_lines(url, _ENDS_LINE_BYTES, None):
        position += size
        if line is None or line.strip():
            yield position


def csv_ends(url: str) -> Iterator[int]:
    """Yield the place after the names of the columns and after each row of ``csv_rows``. Raises as that."""
    texts = _Texts(url)
    reader, named = _csv_reader(url, texts), False
    while True:
        try:
            values = next(reader, None)
        except (csv.Error, BrokenRow):
            if not named:
                return
            yield texts.position
            continue
        if values is None:
            return
        if values or not named:
            named = True
            yield texts.position


def _csv_reader(url: str, texts: _Texts) -> Any:
    name = canonical(url).rpartition("/")[2].lower()
    return csv.reader(texts, delimiter="\t" if ".tsv" in name else ",", strict=True)


class _Texts:
    """The lines of a file as texts. Raises BrokenRow for one that is too long, and goes on after it.

    ``position`` is the place after the last one, in bytes of what is read.
    """

    def __init__(self, url: str, span: Span | None = None) -> None:
        self._lines = _file_lines(url, _CSV_LINE_BYTES, span)
        self._first = True
        self.position = 0

    def __iter__(self) -> _Texts:
        return self

    def __next__(self) -> str:
        line, size = next(self._lines)
        self.position += size
        encoding, self._first = "utf-8-sig" if self._first else "utf-8", False
        if line is None:
            raise BrokenRow(_too_long(_CSV_LINE_BYTES), True)
        return line.decode(encoding, "replace") + "\n"


def _lines(url: str, most: int, span: Span | None) -> Iterator[tuple[int, bytes | BrokenRow]]:
    """Yield (number, line) without line ends and empty lines; one of more than ``most`` bytes is yielded as broken."""
    number = span.first if span else 0
    for line, _ in _file_lines(url, most, span):
        if line is None:
            yield number, BrokenRow(_too_long(most), True)
        elif line.strip():
            yield number, line
        else:
            continue
        number += 1


def _too_long(most: int) -> str:
    return f"a line of more than {most:,} bytes"


def _file_lines(url: str, most: int, span: Span | None) -> Iterator[tuple[bytes | None, int]]:
    """Yield the lines of a file as ``_split``."""
    kind = TABLE_COMPRESSIONS.get(canonical(url).rpartition(".")[2].lower())
    with open_stream(url, kind) as (stream, _):
        yield from _split(stream if span is None else _SpanStream(stream, span), most)


class _SpanStream:
    """The bytes of a span of a stream. Raises EOFError where the stream ends before."""

    def __init__(self, stream: Seekable, span: Span) -> None:
        self._stream, self._span = stream, span
        self._position = 0

    def read(self, size: int, /) -> bytes:
        span = self._span
        if span.header <= self._position < span.start:
            self._stream.skip(span.start - self._position)
            self._position = span.start
        end = span.header if self._position < span.header else span.end
        data = self._stream.read(min(size, end - self._position)) if self._position < end else b""
        if not data and self._position < end:
            raise EOFError(f"it has less than the {end:,} bytes that it had when its shards were formed")
        self._position += len(data)
        return data


def _split(stream: Readable, most: int) -> Iterator[tuple[bytes | None, int]]:
    """Yield the lines of a stream and their bytes with line ends; None for a line of more than ``most`` bytes."""
    parts: list[bytes] = []
    size = 0
    while chunk := stream.read(_CHUNK_BYTES):
        first, *rest = chunk.split(b"\n")
        for line in (first, *rest):
            if line is not first:
                yield None if size > most else b"".join(parts), size + 1
                parts, size = [], 0
            size += len(line)
            if size <= most:
                parts.append(line)
            else:
                parts = []
    if size:
        yield None if size > most else b"".join(parts), size
