"""Rows of jsonl and csv files, plain or compressed, one line at a time and of bounded length."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from reinforce.source.formats import TABLE_COMPRESSIONS
from reinforce.source.streams import open_stream
from reinforce.source.tar import Readable
from reinforce.source.text import json_error, parse_json
from reinforce.source.urls import canonical

Row = Mapping[str, Any]

_CHUNK_BYTES = 2**20
_CSV_LINE_BYTES = 2**20


class BrokenRow(ValueError):
    """A line that is no row; ``too_long`` if it is above the limit."""

    def __init__(self, detail: str, too_long: bool = False) -> None:
        super().__init__(detail)
        self.too_long = too_long


def jsonl_rows(url: str, most: int) -> Iterator[tuple[int, Row] | tuple[int, BrokenRow]]:
    """Yield (number, row) of a file with a JSON object on each line of at most ``most`` bytes; empty lines are skipped.

    Raises EOFError for broken compression, and what the storage raises.
    """
    for number, line in _lines(url, most):
        if isinstance(line, BrokenRow):
            yield number, line
            continue
        document = parse_json(line)
        if isinstance(document, dict):
            yield number, document
        else:
            yield number, BrokenRow(f"{json_error(line)}: jsonl has one object on each line")


def csv_rows(url: str) -> Iterator[tuple[int, Row] | tuple[int, BrokenRow]]:
    """Yield (number, row) of a csv file, or a tsv file by its name, whose first line has the names of the columns.

    Raises as ``jsonl_rows``.
    """
    name = canonical(url).rpartition("/")[2].lower()
    reader = csv.reader(_Texts(url), delimiter="\t" if ".tsv" in name else ",", strict=True)
    names: list[str] | None = None
    number = 0
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


class _Texts:
    """The lines of a file as texts. Raises BrokenRow for one that is too long, and goes on after it."""

    def __init__(self, url: str) -> None:
        self._lines = _lines(url, _CSV_LINE_BYTES, skip_empty=False)

    def __iter__(self) -> _Texts:
        return self

    def __next__(self) -> str:
        number, line = next(self._lines)
        if isinstance(line, BrokenRow):
            raise line
        return line.decode("utf-8-sig" if number == 0 else "utf-8", "replace") + "\n"


def _lines(url: str, most: int, skip_empty: bool = True) -> Iterator[tuple[int, bytes | BrokenRow]]:
    """Yield (number, line) without line ends; a line of more than ``most`` bytes is skipped, and yielded as broken."""
    kind = TABLE_COMPRESSIONS.get(canonical(url).rpartition(".")[2].lower())
    number = 0
    with open_stream(url, kind) as (stream, _):
        for line in _split(stream, most):
            if line is None:
                yield number, BrokenRow(f"a line of more than {most:,} bytes", True)
            elif line.strip() or not skip_empty:
                yield number, line
            else:
                continue
            number += 1


def _split(stream: Readable, most: int) -> Iterator[bytes | None]:
    """Yield the lines of a stream; None for one of more than ``most`` bytes."""
    parts: list[bytes] = []
    size = 0
    while chunk := stream.read(_CHUNK_BYTES):
        first, *rest = chunk.split(b"\n")
        for line in (first, *rest):
            if line is not first:
                yield None if size > most else b"".join(parts)
                parts, size = [], 0
            size += len(line)
            if size <= most:
                parts.append(line)
            else:
                parts = []
    if size:
        yield None if size > most else b"".join(parts)
