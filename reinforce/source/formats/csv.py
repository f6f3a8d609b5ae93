"""csv, and tsv by its name, plain or compressed: the first line has the names of the columns."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator
from typing import Any

from reinforce.source.formats.base import Part
from reinforce.source.formats.lines import COMPRESSIONS, BrokenRow, LinesFormat, Row, file_lines, too_long
from reinforce.source.urls import canonical

_LINE_BYTES = 2**20


class Csv(LinesFormat):
    name = "csv"
    noun = "csv file"
    line = "a row"
    has_header = True
    endings = tuple(f".{name}{end}" for name in ("csv", "tsv") for end in ("", *(f".{end}" for end in COMPRESSIONS)))
    whole_bytes = 2**24  # it names images, and holds none
    referable = True

    def rows(self, url: str, most: int, part: Part | None = None) -> Iterator[tuple[int, Row | BrokenRow]]:
        reader = _csv_reader(url, _Texts(url, part))
        names: list[str] | None = None
        number = part.first if part else 0
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

    def ends(self, url: str) -> Iterator[int]:
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
    """The lines of a file as texts. Raises BrokenRow for one that is too long; the next call returns the line after it.

    ``position`` is the end of the last line, in bytes of the uncompressed file.
    """

    def __init__(self, url: str, part: Part | None = None) -> None:
        self._lines = file_lines(url, _LINE_BYTES, part)
        self._first = True
        self.position = 0

    def __iter__(self) -> _Texts:
        return self

    def __next__(self) -> str:
        line, size = next(self._lines)
        self.position += size
        encoding, self._first = "utf-8-sig" if self._first else "utf-8", False
        if line is None:
            raise too_long(_LINE_BYTES)
        return line.decode(encoding, "replace") + "\n"


FORMAT = Csv()
