"""Bytes that pages of delta-encoded texts need when they are decoded, computed before Arrow decodes them.

Arrow allocates what such a page states inside its compressed body: the number of its lengths, and with
DELTA_BYTE_ARRAY the length of the prefix that each text repeats of the text before. Both can be gigabytes in a page of
a few bytes. https://parquet.apache.org/docs/file-format/data-pages/encodings/
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from reinforce.parquet.pages import (
    DATA_V2,
    DELTA_BYTE_ARRAY,
    DELTA_LENGTH_BYTE_ARRAY,
    RLE,
    BadPage,
    Bytes,
    Page,
    decompress,
    read_integer,
)

#: Values of a page whose lengths are decoded at once; Arrow needs 8 bytes for each.
MAX_DELTA_VALUES = 2**22
_UNIT = 32  # values of a miniblock are a multiple of it
_PART = 2**14  # values that are unpacked at once
_INT32 = 2**31


def is_delta(page: Page) -> bool:
    """Whether a page has lengths that Arrow decodes at once."""
    return page.encoding in (DELTA_LENGTH_BYTE_ARRAY, DELTA_BYTE_ARRAY)


def decoded_bytes(page: Page, stored: Bytes, column: pq.ColumnSchema, compression: str) -> int:
    """Bytes of the texts of a page ``is_delta`` and of their lengths; ``stored`` is its body. Raises BadPage."""
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
