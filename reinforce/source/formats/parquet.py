"""Read untrusted Parquet in small batches of bounded memory: no row group or column is decoded as a whole.

A file may be untrusted, and some kilobytes can ask a decoder for gigabytes: by the footer, by the headers of pages, by
a dictionary with one long value, or by delta-encoded texts that repeat each other. Arrow reads through a file that
checks each page before it passes it on.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from reinforce.source.config import Input
from reinforce.source.formats.base import (
    Columns,
    NoColumn,
    Part,
    Shard,
    SourceFormat,
    divided,
    find_columns,
    joined_rows,
    sample_of_row,
)
from reinforce.source.parquet_file import BadPage, CheckedFile, FooterCheck, RefusedFile, check_codecs
from reinforce.source.samples import Item, Refusal
from reinforce.source.urls import check_file, filesystem, open_whole
from schemas import Reason

Row = Mapping[str, Any]

_READ_BYTES = 4 * 2**20  # per request and column


class ParquetFile:
    """An open Parquet file. A context manager. Raises RefusedFile for a footer that cannot be used."""

    def __init__(self, url: str) -> None:
        fs, path = filesystem(url)
        check_file(fs, path)
        self._stack = contextlib.ExitStack()
        self._file = CheckedFile(self._stack.enter_context(open_whole(fs, path, cache_type="none")))
        try:
            self.footer, _ = self._file.footer()
            try:
                self.schema = self.footer.schema.to_arrow_schema()
            except (pa.ArrowException, UnicodeDecodeError) as error:
                raise RefusedFile(f"its schema cannot be read: {error}") from error
            if len({*self.schema.names}) < len(self.schema.names):
                raise RefusedFile("two of its columns have one name")
            self.types: dict[str, pa.DataType] = {field.name: field.type for field in self.schema}
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> ParquetFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def group_sizes(self) -> list[int]:
        return [self.footer.row_group(number).num_rows for number in range(self.footer.num_row_groups)]

    def rows(
        self, columns: Columns, groups: Iterable[int] | None = None, first: int = 0
    ) -> Iterator[tuple[int, Row] | RefusedFile]:
        """Yield (number, row) in order; a row group that cannot be read yields RefusedFile in its place.

        With ``groups``, only the rows of these row groups, which are numbered from ``first`` on. Raises the storage's
        errors.
        """
        # The columns that are read, and of the image's struct only bytes and path.
        names = [name for name in self.types if name in columns.read and name != columns.image]
        image = self.types[columns.image]
        if not pa.types.is_struct(image):
            names = [columns.image, *names]
        else:
            parts = [image.field(i).name for i in range(image.num_fields)]
            names = [*(f"{columns.image}.{part}" for part in ("bytes", "path") if part in parts), *names]
        source = pa.PythonFile(self._file, mode="r")
        options = {"buffer_size": _READ_BYTES, "pre_buffer": False, "page_checksum_verification": True}
        parquet = pq.ParquetFile(source, metadata=self.footer, **options)
        check, prefixes = FooterCheck(self.footer, names), tuple(f"{name}." for name in names)
        for number in range(self.footer.num_row_groups) if groups is None else groups:
            count = 0
            try:
                check.check(number)
                group = self.footer.row_group(number)
                if not (count := group.num_rows):
                    continue
                leaves = {i: group.column(i) for i in range(group.num_columns)}
                leaves = {i: leaf for i, leaf in leaves.items() if f"{leaf.path_in_schema}.".startswith(prefixes)}
                check_codecs(self.footer, number, (leaf.path_in_schema for leaf in leaves.values()))
                size = self._file.check(group, leaves, self.footer.schema)
                batches = parquet.iter_batches(size, row_groups=[number], columns=names, use_threads=False)
                self._file.batch_bytes = 0
                while (batch := next(batches, None)) is not None:
                    yield from enumerate(batch.to_pylist(), first)
                    first, count = first + len(batch), count - len(batch)
                    self._file.batch_bytes = 0
            except (BadPage, RefusedFile, pa.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
                if self._file.error is not None:
                    raise self._file.error from None
                why = str(error)[:300]
                if "CRC checksum" in str(error):
                    why = "a page does not have its checksum: bytes of it have changed"
                yield RefusedFile(f"row group {number}, from row {first:,} on: {why}")
            first += count


def is_binary(type_: pa.DataType) -> bool:
    """Whether a column has bytes, which cannot be in metadata."""
    nested = [type_.field(i).type for i in range(type_.num_fields)]
    return any(map(is_binary, nested)) or "binary" in str(type_).partition("<")[0]


class Parquet(SourceFormat):
    name = "parquet"
    noun = "parquet file"
    endings = (".parquet", ".pq")
    is_table = True
    whole_bytes = 2**31

    def recognises(self, head: bytes) -> bool:
        return head.startswith((b"PAR1", b"PARE"))

    def items(self, shard: Shard, spec: Input) -> Iterator[Item]:
        try:
            with ParquetFile(shard.file) as file:
                types = file.types
                columns = find_columns([*types], spec, [name for name, type_ in types.items() if not is_binary(type_)])
                image = types[columns.image]
                parts = {image.field(i).name for i in range(image.num_fields)} if pa.types.is_struct(image) else set()
                if not {"bytes", "path"} & parts and str(image).removeprefix("large_") not in ("string", "binary"):
                    raise NoColumn(
                        f"column {columns.image} has type {str(image)[:200]}; images are binary, a struct of bytes and "
                        "path as Hugging Face has it, base64 text, or paths and URLs: name the column in input.image"
                    )
                part = shard.part
                if part:
                    _check_groups(part, file.group_sizes)
                rows = file.rows(columns, *((range(part.start, part.end), part.first) if part else ()))
                for item in joined_rows(rows, lambda _: columns, spec):
                    if isinstance(item, RefusedFile):
                        yield Refusal(None, Reason.SHARD_DAMAGED, str(item))
                    else:
                        yield sample_of_row(shard.name, item[0], item[1], columns, spec)
        except (RefusedFile, NoColumn) as error:
            yield Refusal(None, Reason.SHARD_UNREADABLE, f"a Parquet file that cannot be used: {error}")

    def count(self, url: str, spec: Input) -> int | None:
        if spec.captions_per_sample is not None:
            return super().count(url, spec)
        try:
            with ParquetFile(url) as file:
                return min(int(file.footer.num_rows), spec.limits.shard_samples)
        except RefusedFile:
            return None

    def parts(self, url: str, rows: int, last: Part | None = None) -> Iterator[Part]:
        """Yield runs of whole row groups."""
        with ParquetFile(url) as file:
            sizes = file.group_sizes
        if last:
            _check_groups(last, sizes)
        return divided(url, rows, zip(sizes, itertools.count(1), strict=False), last)

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
    """Raise RefusedFile if the row groups, of ``sizes`` rows, are no longer those of a part."""
    if len(sizes) < part.end or sum(sizes[: part.end]) != part.first + part.rows:
        raise RefusedFile("it has other row groups than when its shards were formed")


FORMAT = Parquet()
