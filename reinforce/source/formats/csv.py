"""csv and tsv, plain or compressed, in the encoding and with the delimiter that the file shows.

The first line has the names of the columns.
"""

from __future__ import annotations

import codecs
import csv
import itertools
from collections.abc import Iterator

from reinforce.source.captions import REPLACED
from reinforce.source.formats import csv_dialect
from reinforce.source.formats.base import Part
from reinforce.source.formats.csv_dialect import HEAD_BYTES, Dialect, find_dialect, header_fault
from reinforce.source.formats.lines import (
    COMPRESSIONS,
    BrokenRow,
    LinesFormat,
    Row,
    file_head,
    file_lines,
    too_long,
)
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

    def recognises(self, head: bytes) -> bool:
        return csv_dialect.is_table(head)

    def notes(self, url: str) -> list[str]:
        head, shown = file_head(url, HEAD_BYTES), canonical(url)
        dialect = _dialect_of(url, head)
        if not dialect.guessed:
            return []
        notes = [f"source: {shown} is not UTF-8 and is read as {dialect.encoding}; if that is wrong, store it as UTF-8"]
        if count := codecs.getincrementaldecoder(dialect.encoding)("replace").decode(head).count(REPLACED):
            notes.append(
                f"source: {shown} has {count:,} characters in its first {len(head):,} bytes that become U+FFFD"
            )
        return notes

    def rows(self, url: str, most: int, part: Part | None = None) -> Iterator[tuple[int, Row | BrokenRow]]:
        names: list[str] | None = None
        number = part.first if part else 0
        for line, values, _ in _records(url, part):
            if isinstance(values, Exception):
                yield number, BrokenRow(f"line {line}: {values}", isinstance(values, BrokenRow))
                if names is None:  # without the names of the columns, no row can be read
                    return
                number += 1
            elif names is None:
                names = [name.strip() for name in values]
                if fault := header_fault(names):
                    yield number, BrokenRow(f"line 1: {fault}")
                    return
            elif values:
                yield number, _row(names, values, line)
                number += 1

    def ends(self, url: str) -> Iterator[int]:
        named = False
        for _, values, position in _records(url):
            if isinstance(values, Exception) and not named:
                return
            if values or not named:
                named = True
                yield position


def _row(names: list[str], values: list[str], line: int) -> Row | BrokenRow:
    if any(values[len(names) :]):
        return BrokenRow(f"line {line}: {len(values)} values for {len(names)} columns: quote texts with the delimiter")
    return dict(itertools.zip_longest(names, values[: len(names)]))


def _dialect_of(url: str, head: bytes) -> Dialect:
    name = canonical(url).rpartition("/")[2].lower()
    return find_dialect(head, "\t" if ".tsv" in name else ",")


def _records(url: str, part: Part | None = None) -> Iterator[tuple[int, list[str] | Exception, int]]:
    """Yield the number of the first line of each record, its values or what is wrong with it, and where it ends."""
    dialect = _dialect_of(url, file_head(url, HEAD_BYTES))
    texts = _Texts(url, dialect, part)
    reader = csv.reader(texts, delimiter=dialect.delimiter, skipinitialspace=dialect.spaced, strict=True)
    values: list[str] | Exception | None
    while True:
        line = reader.line_num + 1
        try:
            values = next(reader, None)
        except (csv.Error, BrokenRow) as error:
            values = error
        if values is None:
            return
        yield line, values, texts.position


class _Texts:
    """The lines of a file as texts. Raises BrokenRow for one that is too long; the next call returns the line after it.

    ``position`` is the end of the last line, in bytes of the uncompressed file; of UTF-16, in those of its UTF-8.
    """

    def __init__(self, url: str, dialect: Dialect, part: Part | None = None) -> None:
        self._encoding = "utf-8" if dialect.is_wide else dialect.encoding
        self._lines = file_lines(url, _LINE_BYTES, part, dialect.encoding if dialect.is_wide else None)
        self.position = 0

    def __iter__(self) -> _Texts:
        return self

    def __next__(self) -> str:
        line, size = next(self._lines)
        self.position += size
        if line is None:
            raise too_long(_LINE_BYTES)
        encoding, self._encoding = self._encoding, self._encoding.removesuffix("-sig")
        return line.decode(encoding, "replace") + "\n"


FORMAT = Csv()
