"""Page headers of a Parquet column chunk, read before its pages are decoded.

A page states in its header how many values it has and how large it is when decompressed. The decoder allocates that
much memory and does not compare it with the footer, so a few bytes can ask for gigabytes. Headers are Thrift structs in
the compact protocol: https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple, TypeAlias

import pyarrow as pa

Bytes: TypeAlias = "bytes | memoryview"

DATA, INDEX, DICTIONARY, DATA_V2 = range(4)  # types of pages
PLAIN, PLAIN_DICTIONARY, RLE, RLE_DICTIONARY = 0, 2, 3, 8
DELTA_BINARY_PACKED, DELTA_LENGTH_BYTE_ARRAY, DELTA_BYTE_ARRAY, BYTE_STREAM_SPLIT = 5, 6, 7, 9
#: Encodings that pages of layer files may have. A page of another one can hold more bytes than its header states.
LAYER_ENCODINGS = {PLAIN, PLAIN_DICTIONARY, RLE, RLE_DICTIONARY, DELTA_BINARY_PACKED, BYTE_STREAM_SPLIT}
#: Encodings that pages may have where ``delta_pages`` computes the bytes of the two others.
ENCODINGS = LAYER_ENCODINGS | {DELTA_LENGTH_BYTE_ARRAY, DELTA_BYTE_ARRAY}

_MAX_DEPTH = 8
_INT32 = 2**31
_MAX_PAGES = 100_000  # of a chunk; a writer makes one for about a megabyte
_TRUE, _FALSE, _I32, _I64, _BINARY, _STRUCT = 1, 2, 5, 6, 8, 12  # types of Thrift's compact protocol
#: The field of a page header that holds the struct of a type of page.
_BODIES = {DATA: 5, DICTIONARY: 7, DATA_V2: 8}


class BadPage(ValueError):
    """A page header that is damaged, or that no writer of layer files writes."""


class CutOff(BadPage):
    """A page header whose end is missing."""


class Page(NamedTuple):
    """A page: its type, bytes when decompressed and as stored, number of values, and where its stored bytes begin.

    ``level_encodings`` are those of definition and repetition levels; of DATA_V2, ``levels`` are the bytes of both.
    ``checksum`` is None where the page has none.
    """

    type: int
    uncompressed: int
    stored: int
    values: int
    start: int
    encoding: int = PLAIN
    level_encodings: tuple[object, object] = (RLE, RLE)
    levels: int = 0
    is_compressed: bool = True
    checksum: int | None = None


def read_pages(chunk: Bytes, values: int) -> Iterator[Page]:
    """Yield the pages of a column chunk of a layer file of ``values`` values, until all of these are seen.

    Raises BadPage if a header cannot be read, if a page does not fit into the chunk or has a refused encoding, or if
    the pages have another number of values.
    """
    position = seen = pages = 0
    while seen < values:
        page = read_page(chunk, position, LAYER_ENCODINGS)
        pages += 1
        position = page.start + page.stored
        if position > len(chunk):
            raise BadPage("a page is longer than its column chunk")
        if page.type in (DATA, DATA_V2):
            seen += page.values
        if pages > _MAX_PAGES:
            raise BadPage(f"a column chunk has more than {_MAX_PAGES:,} pages")
        yield page
    if seen != values:
        raise BadPage(f"the pages have {seen} values, the footer has {values}")


def longest_entry(page: Page, stored: Bytes, compression: str) -> int:
    """Bytes of the longest text of a dictionary, whose page has the bytes ``stored``. Raises BadPage."""
    data = bytes(decompress(stored, page.uncompressed, compression))  # texts in PLAIN encoding
    longest = position = 0
    for _ in range(page.values):
        length = int.from_bytes(data[position : position + 4], "little")
        position += 4 + length
        if position > len(data):
            raise BadPage("a dictionary is cut off")
        longest = max(longest, length)
    return longest


def read_page(chunk: Bytes, position: int, encodings: Collection[int] = ENCODINGS) -> Page:
    """Read the page header at ``position``. Raises BadPage, CutOff if the header goes on after the end of ``chunk``."""
    try:
        fields, start = _read_struct(chunk, position, 0)
    except IndexError as error:
        raise CutOff("a page header is cut off") from error
    kind, uncompressed, stored = fields.get(1), _size(fields.get(2)), _size(fields.get(3))
    if kind == INDEX:
        return Page(INDEX, uncompressed, stored, 0, start)
    body = fields.get(_BODIES.get(kind, 0))  # type: ignore[call-overload]
    if not isinstance(body, dict):
        raise BadPage(f"a page of type {kind} without its header")
    encoding = body.get(4 if kind == DATA_V2 else 2)
    if not isinstance(encoding, int) or encoding not in encodings:
        raise BadPage(f"a page has encoding {encoding}, which is not read")
    count, checksum = _size(body.get(1)), fields.get(4)
    page = Page(kind, uncompressed, stored, count, start, encoding, checksum=checksum)  # type: ignore[arg-type]
    if kind == DATA:
        return page._replace(level_encodings=(body.get(3), body.get(4)))
    if kind == DATA_V2:
        levels = _size(body.get(5)) + _size(body.get(6))
        return page._replace(levels=levels, is_compressed=body.get(7) is not False)
    return page


def _size(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _INT32:
        raise BadPage(f"a page header has size or count {value!r}")
    return value


def _read_struct(data: Bytes, position: int, depth: int) -> tuple[dict[int, object], int]:
    """Read a struct of Thrift's compact protocol: its 32-bit integers and structs by field, and where it ends.

    Stricter than Thrift where that reads one thing in two ways: a field that occurs twice, an integer that does not fit
    its type, and a known field of another type are errors.
    """
    fields: dict[int, object] = {}
    number = 0
    while head := data[position]:
        kind, position = head & 15, position + 1
        if head >> 4:
            number += head >> 4
        else:
            number, position = read_integer(data, position)
        if number in fields or not 0 < number < 2**15:
            raise BadPage("a page header has a field twice")
        value: object = None
        if kind == _I32:
            value, position = read_integer(data, position)
        elif kind == _STRUCT and depth < _MAX_DEPTH:
            value, position = _read_struct(data, position, depth + 1)
        elif kind == _BINARY:
            length, position = read_integer(data, position, signed=False)
            position += length
        elif kind == _I64:
            _, position = read_integer(data, position)
        elif kind in (_TRUE, _FALSE):
            value = kind == _TRUE
        else:
            raise BadPage("a page header has a field of an unknown type")
        if depth == 0 and number <= 8 and kind != (_STRUCT if number >= 5 else _I32):
            raise BadPage("a page header has a field of another type")
        fields[number] = value
    return fields, position + 1


def read_integer(data: Bytes, position: int, signed: bool = True) -> tuple[int, int]:
    """Read an integer of at most 32 bits, zigzag-coded if ``signed``, and where it ends. Wider ones are errors."""
    value = byte = data[position]
    position += 1
    if byte > 127:
        value, shift = byte & 127, 7
        while byte > 127:
            byte = data[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
        if shift > 70 or value >= 2 * _INT32:
            raise BadPage("a page header has an integer of more than 32 bits")
    return ((value >> 1) ^ -(value & 1) if signed else value), position


def decompress(data: Bytes, size: int, compression: str) -> Bytes:
    """The ``size`` bytes of a page as stored, by the compression of its column chunk. Raises BadPage."""
    if compression == "UNCOMPRESSED" or not size:
        return data
    try:
        name = "lz4_raw" if compression == "LZ4" else compression.lower()
        return memoryview(pa.Codec(name).decompress(data, size)).cast("B")
    except (pa.ArrowException, ValueError, OSError) as error:
        raise BadPage(f"a page cannot be decompressed: {error}") from error
