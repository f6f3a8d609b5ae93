"""Parquet files written byte by byte, so that footers and pages can state anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

I32, I64, BINARY, LIST, STRUCT = 5, 6, 8, 9, 12  # types of Thrift's compact protocol
BYTE_ARRAY, FLOAT, INT32 = 6, 4, 1  # physical types of Parquet
PLAIN, RLE, DELTA_LENGTH_BYTE_ARRAY, DELTA_BYTE_ARRAY, RLE_DICTIONARY = 0, 3, 6, 7, 8
CODECS = {"uncompressed": 0, "zstd": 6, "unknown": 99}
REQUIRED, OPTIONAL, REPEATED = range(3)


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def zigzag(value: int) -> bytes:
    return varint((value << 1) ^ (value >> 63))


def struct(fields: Mapping[int, tuple[int, bytes]]) -> bytes:
    """A struct of (type, encoded value) by field."""
    out, last = b"", 0
    for number, (kind, value) in sorted(fields.items()):
        out += bytes([(number - last) << 4 | kind]) if number - last < 16 else bytes([kind]) + zigzag(number)
        out, last = out + value, number
    return out + b"\0"


def i32(value: int) -> tuple[int, bytes]:
    return I32, zigzag(value)


def i64(value: int) -> tuple[int, bytes]:
    return I64, zigzag(value)


def binary(value: bytes | str) -> tuple[int, bytes]:
    data = value.encode() if isinstance(value, str) else value
    return BINARY, varint(len(data)) + data


def listed(kind: int, values: Sequence[bytes]) -> tuple[int, bytes]:
    head = bytes([len(values) << 4 | kind]) if len(values) < 15 else bytes([0xF0 | kind]) + varint(len(values))
    return LIST, head + b"".join(values)


def run(count: int, value: int, width: int = 1) -> bytes:
    """``count`` equal values of at most ``width`` bytes, run-length encoded."""
    return varint(count << 1) + value.to_bytes(width, "little")


def levels(count: int, value: int) -> bytes:
    """Definition or repetition levels of a page that are all equal."""
    encoded = run(count, value)
    return len(encoded).to_bytes(4, "little") + encoded


def text(value: bytes) -> bytes:
    return len(value).to_bytes(4, "little") + value


@dataclass(frozen=True)
class Page:
    """A page; ``uncompressed`` is the size that its header states, by default that of ``body``."""

    body: bytes
    values: int
    encoding: int = PLAIN
    dictionary: bool = False
    uncompressed: int | None = None

    def encoded(self) -> bytes:
        size = len(self.body) if self.uncompressed is None else self.uncompressed
        fields = {1: i32(2 if self.dictionary else 0), 2: i32(size), 3: i32(len(self.body))}
        if self.dictionary:
            fields[7] = (STRUCT, struct({1: i32(self.values), 2: i32(self.encoding)}))
        else:
            page = {1: i32(self.values), 2: i32(self.encoding), 3: i32(RLE), 4: i32(RLE)}
            fields[5] = (STRUCT, struct(page))
        return struct(fields) + self.body


@dataclass(frozen=True)
class Column:
    """A column: its path, with the repetition of each part, and its pages.

    ``values``, ``size`` and ``extra`` are what the footer states, by default those of the pages.
    """

    path: Sequence[tuple[str, int]]
    pages: Sequence[Page]
    type: int = BYTE_ARRAY
    codec: str = "uncompressed"
    values: int | None = None
    size: int | None = None
    extra: Mapping[int, tuple[int, bytes]] = field(default_factory=dict)  # further fields of the metadata

    @property
    def name(self) -> str:
        return self.path[0][0]


@dataclass(frozen=True)
class File:
    """A file with one row group of ``rows`` rows."""

    columns: Sequence[Column]
    rows: int
    metadata: Mapping[str, str] = field(default_factory=dict)

    def encoded(self) -> bytes:
        out, chunks = b"PAR1", []
        for column in self.columns:
            start = len(out)
            pages = [page.encoded() for page in column.pages]
            out += b"".join(pages)
            first = len(pages[0]) if column.pages[0].dictionary else 0
            chunks.append(self._chunk(column, start, len(out) - start, first))
        group = struct({1: listed(STRUCT, chunks), 2: i64(len(out)), 3: i64(self.rows)})
        elements = [struct({4: binary("schema"), 5: i32(len(self.columns))})]
        elements += [element for column in self.columns for element in _elements(column)]
        pairs = [struct({1: binary(key), 2: binary(value)}) for key, value in self.metadata.items()]
        footer = struct(
            {
                1: i32(2),
                2: listed(STRUCT, elements),
                3: i64(self.rows),
                4: listed(STRUCT, [group]),
                5: listed(STRUCT, pairs),
            }
        )
        return out + footer + len(footer).to_bytes(4, "little") + b"PAR1"

    @staticmethod
    def _chunk(column: Column, start: int, length: int, dictionary: int) -> bytes:
        values = sum(page.values for page in column.pages if not page.dictionary)
        encodings = [zigzag(encoding) for encoding in sorted({RLE, *(page.encoding for page in column.pages)})]
        metadata = {
            1: i32(column.type),
            2: listed(I32, encodings),
            3: listed(BINARY, [binary(name)[1] for name, _ in column.path]),
            4: i32(CODECS[column.codec]),
            5: i64(values if column.values is None else column.values),
            6: i64(length if column.size is None else column.size),
            7: i64(length),
            9: i64(start + dictionary),
        }
        if dictionary:
            metadata[11] = i64(start)
        metadata |= column.extra
        return struct({2: i64(start), 3: (STRUCT, struct(metadata))})


def _elements(column: Column) -> list[bytes]:
    """The schema of a column: groups for all parts of its path but the last."""
    elements = []
    for depth, (name, repetition) in enumerate(column.path):
        if depth < len(column.path) - 1:
            fields = {3: i32(repetition), 4: binary(name), 5: i32(1)}
            if depth == 0:
                fields[6] = i32(3)  # LIST
        else:
            fields = {1: i32(column.type), 3: i32(repetition), 4: binary(name)}
            if column.type == BYTE_ARRAY:
                fields[6] = i32(0)  # UTF8
        elements.append(struct(fields))
    return elements


def zeros(head: bytes, count: int) -> bytes:
    """Zstd frames of ``head`` and ``count`` zeros, in little memory."""
    codec, block = pa.Codec("zstd"), 2**24
    frame = codec.compress(bytes(block), asbytes=True)
    rest = codec.compress(bytes(count % block), asbytes=True) if count % block else b""
    return bytes(codec.compress(head, asbytes=True) + frame * (count // block) + rest)
