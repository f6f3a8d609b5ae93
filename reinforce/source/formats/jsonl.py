"""Tables of lines, plain or compressed: jsonl and csv. They are read one line at a time and of bounded length."""

from __future__ import annotations

import codecs
import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from reinforce.source.config import Input
from reinforce.source.formats.base import (
    NoColumn,
    Part,
    Shard,
    SourceFormat,
    divided,
    find_columns,
    joined_rows,
    sample_of_row,
)
from reinforce.source.parquet_file import RefusedFile
from reinforce.source.samples import Item, Refusal, json_error, parse_json
from reinforce.source.urls import Stream, canonical, open_stream
from schemas import Reason

Row = Mapping[str, Any]

#: Compression of a table by the last extension of its name.
COMPRESSIONS = {"gz": "gzip", "zst": "zstd", "zstd": "zstd"}

_CHUNK_BYTES = 2**20
_COUNTED_LINE_BYTES = 2**30
_FIRST_LINE_BYTES = 2**26


class BrokenRow(ValueError):
    """A line that is no row; ``too_long`` if it is above the limit."""

    def __init__(self, detail: str, too_long: bool = False) -> None:
        super().__init__(detail)
        self.too_long = too_long


class LinesFormat(SourceFormat):
    """A table whose rows are lines of text. Rows have no schema: each is read by the columns that it has."""

    is_table = True
    #: What a line is, and whether the first one has the names of the columns.
    line: str
    has_header: bool = False

    def rows(self, url: str, most: int, part: Part | None = None) -> Iterator[tuple[int, Row | BrokenRow]]:
        """Yield (number, row) of a file with lines of at most ``most`` bytes, or of a part of it.

        Raises EOFError for broken compression, and the errors of the storage.
        """
        raise NotImplementedError

    def ends(self, url: str) -> Iterator[int]:
        """Yield the place after the names of the columns, if the first line has them, and after each row of ``rows``,
        in bytes of the uncompressed file. Raises as that.
        """
        raise NotImplementedError

    def items(self, shard: Shard, spec: Input) -> Iterator[Item]:
        columns = functools.lru_cache(maxsize=1)(lambda *names: find_columns(names, spec))  # most rows have equal names
        most = spec.limits.image_bytes * 4 // 3 + 4 * spec.limits.sidecar_bytes + 2**16
        good = bad = read = 0

        def rows() -> Iterator[tuple[int, Row | BrokenRow]]:
            nonlocal read
            for item in self.rows(shard.file, most, shard.part):
                read += 1
                yield item

        try:
            for number, row in joined_rows(rows(), lambda names: columns(*names), spec):
                key = f"{shard.name}-{number:08d}"
                try:
                    if isinstance(row, BrokenRow):
                        raise row
                    item = sample_of_row(shard.name, number, row, columns(*row), spec)
                    good += 1
                except BrokenRow as error:
                    bad += 1
                    item = Refusal(key, Reason.IMAGE_BYTES if error.too_long else Reason.ROW_BROKEN, str(error))
                except NoColumn as error:
                    item = Refusal(key, Reason.NO_IMAGE, str(error))
                    bad += 1
                yield item
        except EOFError as error:
            detail = str(error).replace(" .tar.", " .")  # the detail names the ending that the file needs
            yield Refusal(None, Reason.SHARD_DAMAGED if good else Reason.SHARD_UNREADABLE, detail)
            return
        if shard.part and read != shard.part.rows:
            detail = f"{read:,} rows where {shard.part.rows:,} were when its shards were formed"
            yield Refusal(None, Reason.SHARD_DAMAGED, detail)
        if bad and not good:
            detail = f"no line is {self.line} with an image; {item.detail}"  # type: ignore[union-attr]
            yield Refusal(None, Reason.SHARD_UNREADABLE, detail)

    def count(self, url: str, spec: Input) -> int | None:
        if spec.captions_per_sample is not None:
            return super().count(url, spec)
        try:
            return min(sum(1 for _ in self.rows(url, _COUNTED_LINE_BYTES)), spec.limits.shard_samples)
        except EOFError:
            return None

    def parts(self, url: str, rows: int, last: Part | None = None) -> Iterator[Part]:
        found = self.ends(url)
        header = next(found, None) or 0 if self.has_header else 0
        return divided(url, rows, ((1, place) for place in found), last, header)

    def first_row(self, url: str) -> tuple[list[str], Row] | None:
        broken = None
        for _, row in self.rows(url, _FIRST_LINE_BYTES):
            if not isinstance(row, BrokenRow):
                return [], row
            broken = broken or row
        if broken:
            raise RefusedFile(str(broken))
        return None


def file_lines(
    url: str,
    most: int,
    part: Part | None = None,
    encoding: str | None = None,
    follow: Callable[[bytes], object] = bool,
) -> Iterator[tuple[bytes | None, int]]:
    """Yield the lines of a file, or of a part of it, and their bytes with line ends; None for a line of more than
    ``most`` bytes, whose parts are passed to ``follow``. A file with an ``encoding`` is read as if it were UTF-8."""
    with open_stream(url, _compression(url)) as (stream, _):
        text = stream if encoding is None else _AsUtf8(stream, encoding)
        source = text if part is None else _PartStream(text, part)
        parts: list[bytes] = []
        size = 0
        while chunk := source.read(_CHUNK_BYTES):
            for number, line in enumerate(chunk.split(b"\n")):
                if number:
                    yield None if size > most else b"".join(parts), size + 1
                    parts, size = [], 0
                size += len(line)
                parts.append(line)
                if size > most:
                    follow(b"".join(parts))
                    parts = []
        if size:
            yield None if size > most else b"".join(parts), size


def file_head(url: str, count: int) -> bytes:
    """The first bytes of a file, uncompressed; fewer where the compression is broken."""
    head = b""
    with open_stream(url, _compression(url)) as (stream, _), contextlib.suppress(EOFError):
        while len(head) < count and (data := stream.read(count - len(head))):
            head += data
    return head


def _compression(url: str) -> str | None:
    return COMPRESSIONS.get(canonical(url).rpartition(".")[2].lower())


def too_long(most: int, what: str = "line") -> BrokenRow:
    """The refusal of a line, or of a row of lines, above the limit."""
    return BrokenRow(f"a {what} of more than {most:,} bytes", True)


class _AsUtf8(Stream):
    """A stream of text in another encoding, as UTF-8."""

    def __init__(self, stream: Stream, encoding: str) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder(encoding)("replace")
        self._data = b""

    def read(self, size: int, /) -> bytes:
        more = True
        while more and not self._data:
            data = self._stream.read(size)
            more = bool(data)
            self._data = self._decoder.decode(data, final=not data).encode()
        data, self._data = self._data[:size], self._data[size:]
        return data


class _PartStream:
    """The bytes of a part of a stream, after those of its header. Raises EOFError where the stream ends before."""

    def __init__(self, stream: Stream, part: Part) -> None:
        self._stream, self._part = stream, part
        self._position = 0

    def read(self, size: int, /) -> bytes:
        part = self._part
        if part.header <= self._position < part.start:
            self._stream.skip(part.start - self._position)
            self._position = part.start
        end = part.header if self._position < part.header else part.end
        data = self._stream.read(min(size, end - self._position)) if self._position < end else b""
        if not data and self._position < end:
            raise EOFError(f"it has less than the {end:,} bytes that it had when its shards were formed")
        self._position += len(data)
        return data


_ENDS_LINE_BYTES = 2**12  # of a line that only has to be found


class Jsonl(LinesFormat):
    """A JSON object on each line. Empty lines are skipped."""

    name = "jsonl"
    noun = "jsonl file"
    line = "a JSON object"
    endings = tuple(
        f".{name}{end}" for name in ("jsonl", "ndjson", "jsonlines") for end in ("", *(f".{e}" for e in COMPRESSIONS))
    )
    other_endings = (".json", *(f".json.{end}" for end in COMPRESSIONS))  # such as Dataset.to_json writes
    whole_bytes = 2**31

    def recognises(self, head: bytes) -> bool:
        return head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{")

    def rows(self, url: str, most: int, part: Part | None = None) -> Iterator[tuple[int, Row | BrokenRow]]:
        number = part.first if part else 0
        for line, _ in file_lines(url, most, part):
            if line is None:
                yield number, too_long(most)
            elif 0 in line[:4]:  # JSON has no such byte, and its text begins with characters of ASCII
                yield number, BrokenRow("UTF-16 or UTF-32, in which jsonl is not read: store the file as UTF-8")
            elif line.strip():
                document = parse_json(line)
                if isinstance(document, dict):
                    yield number, document
                else:
                    yield number, BrokenRow(f"{json_error(line)}: jsonl has one object on each line")
            else:
                continue
            number += 1

    def ends(self, url: str) -> Iterator[int]:
        # Lines are only counted, so long ones are not held in memory.
        position = 0
        for line, size in file_lines(url, _ENDS_LINE_BYTES):
            position += size
            if line is None or line.strip():
                yield position


FORMAT = Jsonl()
