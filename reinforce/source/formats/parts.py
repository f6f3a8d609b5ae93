"""Parts of tables: the rows of a Parquet, jsonl or csv file that are one shard, where ``input.rows_per_shard`` is set.

A part of a Parquet file is a run of whole row groups. A part of a jsonl or csv file is a range of the bytes of its
uncompressed content, so that no other part is read or parsed for it; a compressed file is decompressed up to its end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from reinforce.parquet.footers import RefusedFile
from reinforce.source.file_types import CSV, JSONL, PARQUET
from reinforce.source.formats import lines
from reinforce.source.formats.parquet import ParquetFile

#: Formats whose files can be divided.
DIVIDED = (PARQUET, JSONL, CSV)


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the table ``file``, a URL: ``rows`` rows from row ``first`` on.

    ``start`` and ``end`` are row groups of Parquet, else bytes; the first ``header`` bytes have the names of columns.
    """

    file: str
    first: int
    rows: int
    start: int
    end: int
    header: int = 0

    def numbers(self) -> list[int]:
        """The part without its file, for a list."""
        return [self.first, self.rows, self.start, self.end, self.header]

    @property
    def span(self) -> lines.Span:
        """The bytes of a part of jsonl or csv."""
        return lines.Span(self.header, self.start, self.end, self.first)

    def follows(self, sizes: list[int]) -> bool:
        """Whether a Parquet file with row groups of these rows still has the rows up to the end of this part."""
        return len(sizes) >= self.end and sum(sizes[: self.end]) == self.first + self.rows


def find_parts(url: str, format_: str, rows: int, last: Part | None = None) -> Iterator[Part]:
    """Yield the parts of a table, of at least ``rows`` rows of Parquet, else of as many, but the last one.

    With ``last``, the parts of the rows after it. Raises RefusedFile, EOFError and csv.Error for damage, and what the
    storage raises.
    """
    if format_ == PARQUET:
        yield from _row_groups(url, rows, last)
        return
    # The longest line is not held in memory, and what it contains does not matter.
    found = lines.jsonl_ends(url) if format_ == JSONL else lines.csv_ends(url)
    header = next(found, None) or 0 if format_ == CSV else 0
    first, start = (last.first + last.rows, last.end) if last else (0, header)
    count, end = 0, start
    for position in found:
        if position <= start:
            continue
        count, end = count + 1, position
        if count == rows:
            yield Part(url, first, count, start, end, header)
            first, start, count = first + count, end, 0
    if count:
        yield Part(url, first, count, start, end, header)


def _row_groups(url: str, rows: int, last: Part | None) -> Iterator[Part]:
    sizes = row_group_sizes(url)
    if last and not last.follows(sizes):
        raise RefusedFile("it has other row groups than when its shards were formed")
    first, start = (last.first + last.rows, last.end) if last else (0, 0)
    count = 0
    for number in range(start, len(sizes)):
        count += sizes[number]
        if count >= rows:
            yield Part(url, first, count, start, number + 1)
            first, start, count = first + count, number + 1, 0
    if count:
        yield Part(url, first, count, start, len(sizes))


def row_group_sizes(url: str) -> list[int]:
    """The rows of each row group of a Parquet file. Raises as ``ParquetFile``."""
    with ParquetFile(url) as file:
        return group_sizes(file.footer)


def group_sizes(footer: Any) -> list[int]:
    """The rows of each row group by a footer."""
    return [footer.row_group(number).num_rows for number in range(footer.num_row_groups)]
