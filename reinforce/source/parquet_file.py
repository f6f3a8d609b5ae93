"""Parquet files that may be untrusted: what their footers and pages ask for is bounded before Arrow decodes it.

The Arrow schema in a footer is not used, because Arrow would create the types that it names by whatever code has
registered them, and types of some libraries unpickle their values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

#: Bytes read at the end of a file: enough for most footers.
TAIL_BYTES = 64 * 2**10
MAX_FOOTER_BYTES = 8 * 2**20
MAGIC = b"PAR1"
_ENCRYPTED = b"PARE"  # in place of MAGIC where the footer is encrypted, and not columns alone

_MAX_ACCEPTED = 2**16
_accepted: set[bytes] = set()  # digests of footers


class RefusedFile(ValueError):
    """A Parquet file that is damaged, has other columns, or would need more memory than the bounds allow.

    ``file`` is the layer and the shard of a layer file, where they are known.
    """

    file: tuple[str, str] | None = None


def read_table(source: Any, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a small Parquet file that this project has written, or some of its columns. Raises what Arrow raises.

    This thread reads and decodes alone: Arrow's threads may hold bytes after the call, and a program that ends
    meanwhile is aborted.
    """
    file = pq.ParquetFile(source, page_checksum_verification=True, pre_buffer=False)
    return file.read(columns, use_threads=False)


def read_footer(tail: bytes, size: int) -> pq.FileMetaData | None:
    """Parse the footer of a file of ``size`` bytes from its last bytes; None if more of them are needed.

    Raises RefusedFile if there is none, or it is above the bounds.
    """
    if tail[-4:] == _ENCRYPTED:
        raise RefusedFile("it is encrypted, which is not read: decrypt it")
    if len(tail) < 12 or tail[-4:] != MAGIC:
        raise RefusedFile("it is not a Parquet file, or it is cut off")
    length = int.from_bytes(tail[-8:-4], "little")
    if not 0 < length <= min(size - 12, MAX_FOOTER_BYTES):
        raise RefusedFile(f"its footer has {length:,} bytes; at most {MAX_FOOTER_BYTES:,} are read")
    if length + 8 > len(tail):
        return None
    return _parse(footer_bytes(tail))


def _parse(content: bytes) -> pq.FileMetaData:
    # Any key of another name is ignored by Arrow.
    footer = content.replace(b"ARROW:schema", b"ARROW:unused")
    try:
        return pq.read_metadata(pa.BufferReader(MAGIC + footer))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise RefusedFile(f"its footer cannot be read: {error}") from error


def footer_bytes(tail: bytes) -> bytes:
    """The footer at the end of a file, with its length and the magic bytes."""
    return tail[-8 - int.from_bytes(tail[-8:-4], "little") :]


def span(leaf: Any, size: int) -> tuple[int, int]:
    """Start and length of a column chunk, as Arrow computes them."""
    start, length = leaf.data_page_offset, leaf.total_compressed_size
    if leaf.has_dictionary_page and 0 < leaf.dictionary_page_offset < start:
        start = leaf.dictionary_page_offset
    if start < 0 or length < 0 or start + length > size:
        raise RefusedFile("a column chunk is outside the file")
    return start, length


class ArrowInput:
    """The position in a file of ``_size`` bytes that Arrow reads; subclasses add ``read``."""

    closed = False
    _size: int
    _position = 0

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = offset + (0, self._position, self._size)[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def size(self) -> int:
        return self._size

    def close(self) -> None:
        """Do nothing: who has opened the file closes it."""


class FooterCheck:
    """A check of the columns ``names`` in a footer.

    ``accepted`` is whether Arrow accepts all row groups. Where ``content`` gives its bytes, a footer that this process
    has accepted before is not checked again: loaders open the same files many times.

    Python must not read values of a footer that Arrow rejects: nothing catches Arrow's exception there, and the process
    would end. So Arrow first begins to read the columns from a file that cannot be read.
    """

    def __init__(self, footer: pq.FileMetaData, names: Sequence[str], content: bytes | None = None) -> None:
        self._footer, self._names = footer, [*names]
        key = None if content is None else _digest(names, content)
        self.accepted = key in _accepted
        if self.accepted:
            return
        try:
            self._begin(range(footer.num_row_groups))
        except RefusedFile:
            return
        self.accepted = True
        if key is not None:
            _accept([key])

    def check(self, number: int) -> None:
        """Raise RefusedFile if Arrow rejects a row group."""
        if not self.accepted:
            self._begin([number])

    def _begin(self, numbers: Sequence[int]) -> None:
        # With pre_buffer, the places of all columns are computed before anything is read.
        nothing = _NoFile()
        file = pq.ParquetFile(pa.PythonFile(nothing, mode="r"), metadata=self._footer, pre_buffer=True)
        try:
            next(file.iter_batches(1, row_groups=[*numbers], columns=self._names, use_threads=False), None)
        except (pa.ArrowException, OSError, ValueError) as error:
            if "decrypt" in str(error).lower():
                raise RefusedFile("its columns are encrypted, which is not read: decrypt it") from error
            if not nothing.was_read:
                raise RefusedFile(f"its footer cannot be used: {str(error)[:300]}") from error


def check_codecs(footer: pq.FileMetaData, number: int, leaves: Iterable[str]) -> None:
    """Raise RefusedFile if Arrow does not know how one of these leaf columns of a row group is compressed.

    Reading an unknown compression from the footer in Python would end the process. With a buffer, Arrow looks at it
    when it opens a column, before it reads.
    """
    for leaf in leaves:
        nothing = _NoFile()
        file = pq.ParquetFile(pa.PythonFile(nothing, mode="r"), metadata=footer, buffer_size=1, pre_buffer=False)
        try:
            next(file.iter_batches(1, row_groups=[number], columns=[leaf], use_threads=False), None)
        except (pa.ArrowException, OSError, ValueError) as error:
            if not nothing.was_read:
                raise RefusedFile(f"column {leaf[:100]} cannot be read: {str(error)[:300]}") from error


def check_together(footers: Sequence[tuple[pq.FileMetaData, Sequence[str], bytes]]) -> None:
    """Check the footers of several files, each with its columns and its bytes, as one of many row groups.

    A ``FooterCheck`` of one that is accepted here takes a twentieth of the time. Nothing is refused here.
    """
    by_names: dict[tuple[str, ...], list[tuple[pq.FileMetaData, bytes]]] = {}
    for footer, names, content in footers:
        by_names.setdefault(tuple(names), []).append((footer, content))
    for names, group in by_names.items():
        if len(group) < 2:
            continue
        try:
            joined = _parse(group[0][1])
            for footer, _ in group[1:]:
                joined.append_row_groups(footer)
        except (RefusedFile, RuntimeError, OSError, pa.ArrowException):  # the schemas differ
            continue
        if FooterCheck(joined, names).accepted:
            _accept([_digest(names, content) for _, content in group])


def _accept(keys: Sequence[bytes]) -> None:
    if len(_accepted) + len(keys) > _MAX_ACCEPTED:
        _accepted.clear()
    _accepted.update(keys)


def _digest(names: Sequence[str], content: bytes) -> bytes:
    return hashlib.blake2b(repr([*names]).encode() + content, digest_size=16).digest()


class _NoFile(ArrowInput):
    """A file of any size that ends wherever it is read, and remembers that it was read.

    It does not raise: for each exception of Python in a read that runs ahead, Arrow 26 keeps 5 KB or more for ever, and
    formats a traceback.
    """

    was_read = False
    _size = 2**62

    def read(self, _: int = -1) -> bytes:
        self.was_read = True
        return b""


# A page states in its header how many values it has and how large it is when decompressed. The decoder allocates that
# much memory and does not compare it with the footer, so a few bytes can ask for gigabytes. Headers are Thrift structs
# in the compact protocol: https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift

Bytes: TypeAlias = "bytes | memoryview"

DATA, INDEX, DICTIONARY, DATA_V2 = range(4)  # types of pages
PLAIN, PLAIN_DICTIONARY, RLE, RLE_DICTIONARY = 0, 2, 3, 8
DELTA_BINARY_PACKED, DELTA_LENGTH_BYTE_ARRAY, DELTA_BYTE_ARRAY, BYTE_STREAM_SPLIT = 5, 6, 7, 9
#: Encodings that pages of layer files may have. A page of another one can hold more bytes than its header states.
LAYER_ENCODINGS = {PLAIN, PLAIN_DICTIONARY, RLE, RLE_DICTIONARY, DELTA_BINARY_PACKED, BYTE_STREAM_SPLIT}
#: Encodings that pages may have where ``decoded_bytes`` computes the bytes of the two others.
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


_GAP = 2**13  # bytes between two columns that are read with them in one request


class WindowFile(ArrowInput):
    """An open binary file of ``size`` bytes whose ranges are fetched once, checked, and then read by Arrow.

    The caller closes the file. ``error`` is what the storage has raised.
    The end of the file is kept, since it often is all of it, and what was fetched last, since it may be fetched again.
    """

    def __init__(self, file: Any, size: int) -> None:
        self._file, self._size = file, size
        self._parts: dict[Hashable, tuple[int, memoryview]] = {}  # where each begins, and its bytes
        self._end = size, memoryview(b"")
        self.error: Exception | None = None

    def footer(self) -> tuple[pq.FileMetaData, bytes]:
        """The footer, and its bytes. Raises RefusedFile."""
        for length in (TAIL_BYTES, MAX_FOOTER_BYTES + 8):
            start = max(0, self._size - length)
            tail = bytes(self.read_at(start, self._size - start))
            if (footer := read_footer(tail, self._size)) is not None:
                self._end = start, memoryview(tail)
                return footer, footer_bytes(tail)
        raise RefusedFile("its footer cannot be read")

    def fetch(self, spans: Sequence[tuple[int, int]]) -> None:
        """Fetch these (start, length) in place of all before, neighbours in one request."""
        wanted: list[tuple[int, int]] = []
        for start, length in sorted(spans):
            if wanted and start <= sum(wanted[-1]) + _GAP:
                first, before = wanted[-1]
                wanted[-1] = (first, max(before, start + length - first))
            else:
                wanted.append((start, length))
        self._parts = {start: part for start, part in self._parts.items() if (start, len(part[1])) in wanted}
        for start, length in wanted:
            if start not in self._parts:
                self.keep(start, start, self.read_at(start, length))

    def keep(self, key: Hashable, start: int, data: Bytes) -> None:
        """Keep bytes at ``start`` for Arrow, in place of those of the same ``key``."""
        self._parts[key] = (start, memoryview(data).cast("B"))

    def read_at(self, start: int, length: int) -> Bytes:
        """Bytes that were fetched, and the rest from the file. Raises RefusedFile if the file ends before."""
        for first, part in (self._end, *self._parts.values()):
            if first <= start < first + len(part):
                done = part[start - first : start - first + length]
                if len(done) == length:
                    return done
                return b"".join((done, self.read_at(start + len(done), length - len(done))))
        read = getattr(self._file, "read_buffer", self._file.read)  # without a copy from a memory map
        data = bytearray()
        try:
            self._file.seek(start)
            while len(data) < length and (more := read(length - len(data))):
                if len(more) == length:
                    return more
                data += more
        except Exception as error:  # each driver has its own exceptions
            self.error = error
            raise
        if len(data) < length:
            raise RefusedFile("it is cut off: the file is shorter than its footer states")
        return bytes(data)

    def read(self, count: int = -1) -> Bytes:
        left = max(0, self._size - self._position)
        data = self.read_at(self._position, left if count < 0 else min(count, left))
        self._position += len(data)
        return data


# Arrow allocates what a page of delta-encoded texts states inside its compressed body: the number of its lengths, and
# with DELTA_BYTE_ARRAY the length of the prefix that each text repeats of the text before. Both can be gigabytes in a
# page of a few bytes. https://parquet.apache.org/docs/file-format/data-pages/encodings/

#: Values of a page whose lengths are decoded at once; Arrow needs 8 bytes for each.
MAX_DELTA_VALUES = 2**22
#: Encodings of pages that have lengths which Arrow decodes at once.
_DELTAS = (DELTA_LENGTH_BYTE_ARRAY, DELTA_BYTE_ARRAY)
_UNIT = 32  # values of a miniblock are a multiple of it
_PART = 2**14  # values that are unpacked at once


def decoded_bytes(page: Page, stored: Bytes, column: pq.ColumnSchema, compression: str) -> int:
    """Bytes of the texts of a page with one of ``_DELTAS`` and of their lengths; ``stored`` is its body.

    Raises BadPage.
    """
    if page.values > MAX_DELTA_VALUES:
        raise BadPage(f"a page of {page.values:,} delta-encoded values; at most {MAX_DELTA_VALUES:,} are read")
    try:
        values = _values(page, stored, column, compression)
        if page.encoding == DELTA_LENGTH_BYTE_ARRAY:
            _check_count(values, 0, page.values)
            return page.uncompressed + 4 * page.values
        prefixes, end = _prefix_bytes(values, page.values)
        _check_count(values, end, page.values)
    except IndexError as error:
        raise BadPage("a page of delta-encoded values is cut off") from error
    return page.uncompressed + prefixes + 8 * page.values


def _values(page: Page, stored: Bytes, column: pq.ColumnSchema, compression: str) -> memoryview:
    """The encoded values of a page, without its levels."""
    size = page.uncompressed
    if page.type == DATA_V2:
        body, rest = memoryview(stored)[page.levels :], size - page.levels
        if rest < 0 or len(stored) < page.levels:
            raise BadPage("the levels of a page are longer than the page")
        return body if not page.is_compressed else memoryview(decompress(body, rest, compression))
    data = memoryview(decompress(stored, size, compression))
    definition, repetition = page.level_encodings
    for most, encoding in ((column.max_repetition_level, repetition), (column.max_definition_level, definition)):
        if most:
            if encoding != RLE or len(data) < 4:
                raise BadPage("the levels of a page cannot be read")
            data = data[4 + int.from_bytes(data[:4], "little") :]
    return data


def _check_count(data: Bytes, position: int, most: int) -> tuple[int, int, int, int]:
    """Read the header of DELTA_BINARY_PACKED: (values of a miniblock, miniblocks of a block, values, and its end)."""
    block, position = read_integer(data, position, signed=False)
    minis, position = read_integer(data, position, signed=False)
    count, position = read_integer(data, position, signed=False)
    if count > most:
        raise BadPage(f"a page of {most:,} values has {count:,} lengths")
    if not block or not minis or block % minis or block // minis % _UNIT:
        raise BadPage("a page has delta-encoded values in blocks that cannot be")
    return block // minis, minis, count, position


def _prefix_bytes(data: memoryview, most: int) -> tuple[int, int]:
    """The sum of the integers in DELTA_BINARY_PACKED at the beginning of ``data``, and where they end.

    Arrow decodes them as 32-bit integers. Raises BadPage for negative ones.
    """
    size, minis, count, position = _check_count(data, 0, most)
    last, position = read_integer(data, position)
    if not count:
        return 0, position
    total, left = _not_negative(last), count - 1
    while left:
        low, position = read_integer(data, position)
        widths, position = bytes(data[position : position + minis]), position + minis
        if position > len(data):
            raise IndexError
        for width in widths:
            if not left:
                break
            taken, length = min(left, size), size // 8 * width
            if width > 32 or position + length > len(data):
                raise BadPage("a page has delta-encoded values that are cut off")
            for first in range(0, taken, _PART):
                deltas = _unpack(data[position + first // 8 * width :], width, min(_PART, taken - first))
                values = last + np.cumsum(deltas + low)
                last = _not_negative(int(values[-1]))
                if values.min() < 0 or values.max() >= _INT32:
                    raise BadPage("a page has a length below 0")
                total += int(values.sum())
            left, position = left - taken, position + length
    return total, position


def _unpack(data: Bytes, width: int, count: int) -> npt.NDArray[np.int64]:
    """The first ``count`` integers of ``width`` bits."""
    if not width:
        return np.zeros(count, np.int64)
    used = np.frombuffer(data, np.uint8, -(-count * width // 8))
    bits = np.unpackbits(used, bitorder="little")[: count * width].reshape(count, width)
    return np.asarray(bits @ (1 << np.arange(width, dtype=np.int64)), np.int64)


def _not_negative(value: int) -> int:
    if not 0 <= value < _INT32:
        raise BadPage("a page has a length below 0")
    return value


#: Bytes of a page and of the pages of one batch, when decompressed, that are decoded at most.
MAX_PAGE_BYTES = 2**29
MAX_BATCH_BYTES = 2**30
MAX_LIST_VALUES = 2**24  # of a column of lists in a row group
_BATCH_BYTES = 16 * 2**20  # of a batch, by the sizes in the footer
_BATCH_ROWS = 256
_WINDOW_BYTES = 32 * 2**20  # of a row group that is fetched by one request
_HEADER_BYTES = 2**14  # of a page header; statistics in it can be longer
_MAX_HEADER_BYTES = 2**24


class CheckedFile(WindowFile):
    """A file that Arrow reads a few rows at a time; each page header is checked before it is passed on.

    ``batch_bytes`` are the decompressed bytes of the pages since it was set.
    """

    def __init__(self, file: Any) -> None:
        super().__init__(file, file.seek(0, 2))
        self._chunks: list[_Chunk] = []
        self.batch_bytes = 0

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
            values = leaf.num_values
            self._chunks.append(_Chunk(start, start + length, start, values, schema.column(place), leaf.compression))
            if leaf.physical_type != "BYTE_ARRAY" or not leaf.has_dictionary_page:
                continue
            page, header = self._page(start, b"")
            if page.type != DICTIONARY or page.uncompressed * batch <= MAX_BATCH_BYTES // 16:
                continue
            # The values of a batch together stay within the bounds if each is the longest of the dictionary.
            if page.uncompressed > MAX_PAGE_BYTES:
                raise BadPage(f"a dictionary of {page.uncompressed:,} bytes; at most {MAX_PAGE_BYTES:,} are read")
            longest = longest_entry(page, self.read_at(start + header, page.stored), leaf.compression)
            batch = min(batch, max(1, MAX_BATCH_BYTES // 16 // max(1, longest)))
        first, last = min(chunk.next for chunk in self._chunks), max(chunk.end for chunk in self._chunks)
        self.fetch([(first, last - first)] if last - first <= _WINDOW_BYTES else [])
        return batch

    def _page(self, position: int, known: Bytes) -> tuple[Page, int]:
        """The page whose header is at ``position``, and the bytes of its header. ``known`` are bytes from there on."""
        length = _HEADER_BYTES
        while True:
            try:
                page = read_page(known, 0)
                return page, page.start
            except CutOff:
                if length > _MAX_HEADER_BYTES or len(known) >= self._size - position:
                    raise
                known = self.read_at(position, min(length, self._size - position))
                length *= 16

    def read(self, count: int = -1) -> Bytes:
        start = self._position
        data = super().read(count)
        end = start + len(data)
        for chunk in self._chunks:
            while chunk.next < min(end, chunk.end) and start <= chunk.next:
                known = memoryview(data)[chunk.next - start :]
                page, header = self._page(chunk.next, known)
                body = chunk.pass_page(page, header)
                self.batch_bytes += page.uncompressed
                if page.encoding in _DELTAS:
                    self.batch_bytes += self._check_delta(chunk, page, body, known[header:])
                if self.batch_bytes > MAX_BATCH_BYTES:
                    raise BadPage(f"some rows need more than {MAX_BATCH_BYTES:,} bytes")
        return data

    def _check_delta(self, chunk: _Chunk, page: Page, start: int, known: memoryview) -> int:
        """Bytes of the texts of a page whose body is at ``start``; ``known`` is what has been read from there on.

        The rest of the body is kept for Arrow, which reads it next.
        """
        body: Bytes = known[: page.stored]
        if len(body) < page.stored:
            rest = self.read_at(start + len(body), page.stored - len(body))
            self.keep(chunk, start + len(body), rest)
            body = b"".join((body, rest))
        size = decoded_bytes(page, body, chunk.column, chunk.compression)
        if size > MAX_PAGE_BYTES:
            raise BadPage(f"a page of texts of {size:,} bytes; at most {MAX_PAGE_BYTES:,} are read")
        return size


@dataclass(eq=False)
class _Chunk:
    """A column chunk that is being read: the place of its next page header, and how many ``values`` are to come."""

    next: int
    end: int
    first: int
    values: int
    column: pq.ColumnSchema
    compression: str

    def pass_page(self, page: Page, header: int) -> int:
        """Check a page and go on to the next; returns the place of its body. Raises BadPage."""
        if page.uncompressed > MAX_PAGE_BYTES:
            raise BadPage(f"a page of {page.uncompressed:,} bytes; at most {MAX_PAGE_BYTES:,} are read")
        if page.type == DICTIONARY:
            if self.next != self.first:
                raise BadPage("a dictionary that is not the first page")
        else:
            self.values -= page.values
        if self.values < 0:
            raise BadPage("the pages have more values than the footer")
        body = self.next + header
        self.next = body + page.stored
        if self.next > self.end:
            raise BadPage("a page is longer than its column chunk")
        return body
