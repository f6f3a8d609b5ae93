"""Files of some kilobytes that ask their decoder for gigabytes, and forged values of dataset.json."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.hostile.parquet import (
    DELTA_BYTE_ARRAY,
    DELTA_LENGTH_BYTE_ARRAY,
    FLOAT,
    I64,
    OPTIONAL,
    REPEATED,
    REQUIRED,
    RLE_DICTIONARY,
    STRUCT,
    Column,
    File,
    Page,
    levels,
    listed,
    run,
    struct,
    text,
    varint,
    zeros,
)

Metadata = dict[str, str]
CAPTIONS = [("captions", OPTIONAL), ("list", REPEATED), ("element", OPTIONAL)]
VECTORS = [("embeddings", OPTIONAL), ("list", REPEATED), ("element", OPTIONAL)]
LARGEST = 2**31 - 1


@dataclass(frozen=True)
class Bomb:
    """A file in place of one of ``layer``; ``write`` gets the metadata of the file that it replaces."""

    defect: str
    layer: str
    message: str
    write: Callable[[Metadata], bytes]


def keys(rows: int) -> Column:
    """The column ``key`` of any number of rows: one text in a dictionary."""
    pages = [Page(text(b"a"), 1, dictionary=True), Page(b"\x01" + run(rows, 0), rows, RLE_DICTIONARY)]
    return Column([("key", REQUIRED)], pages)


def _zstd(metadata: Metadata) -> bytes:
    """Seven captions of 1.9 GB each."""
    size = 1_900_000_000
    head = levels(1, 1) + size.to_bytes(4, "little")
    page = Page(zeros(head, size), 1, uncompressed=len(head) + size)
    pages = [keys(7), Column([("caption", OPTIONAL)], [page] * 7, codec="zstd", size=1000)]
    return File(pages, 7, metadata).encoded()


def _dictionary(metadata: Metadata) -> bytes:
    """A caption of a megabyte, 14,000 times."""
    rows = 14_000
    pages = [Page(text(b"a" * 2**20), 1, dictionary=True)]
    pages.append(Page(levels(rows, 1) + b"\x01" + run(rows, 0), rows, RLE_DICTIONARY))
    return File([keys(rows), Column([("caption", OPTIONAL)], pages)], rows, metadata).encoded()


def _prefixes(metadata: Metadata) -> bytes:
    """A caption of a megabyte, 14,000 times, each as the prefix of the one before."""
    rows, block = 14_000, 128

    def integers(first: int, rest: int) -> bytes:
        """``rows`` integers of which all but the first are ``rest``, with DELTA_BINARY_PACKED."""
        head = varint(block) + varint(4) + varint(rows) + varint(first << 1)
        deltas = [rest - first] + [0] * (rows - 2)
        out = head
        for start in range(0, len(deltas), block):
            low = min(deltas[start : start + block])
            out += varint((low << 1) ^ (low >> 63))
            part = [delta - low for delta in deltas[start : start + block]]
            part += [0] * (block - len(part))
            minis = [part[at : at + 32] for at in range(0, block, 32)]
            out += bytes(32 if any(mini) else 0 for mini in minis)
            out += b"".join(value.to_bytes(4, "little") for mini in minis if any(mini) for value in mini)
        return out

    body = levels(rows, 1) + integers(0, 2**20) + integers(2**20, 0) + b"a" * 2**20
    column = Column([("caption", OPTIONAL)], [Page(body, rows, DELTA_BYTE_ARRAY)])
    return File([keys(rows), column], rows, metadata).encoded()


def _lengths(metadata: Metadata) -> bytes:
    """A caption, whose page states the lengths of two billion."""
    body = levels(1, 1) + varint(2**30) + varint(1) + varint(LARGEST) + b"\0\0\0"
    column = Column([("caption", OPTIONAL)], [Page(body, 1, DELTA_LENGTH_BYTE_ARRAY)])
    return File([keys(1), column], 1, metadata).encoded()


def _levels(metadata: Metadata) -> bytes:
    """One row with two billion captions, all of them null."""
    repetition = run(1, 0) + run(LARGEST - 1, 1)
    body = len(repetition).to_bytes(4, "little") + repetition + levels(LARGEST, 2)
    return File([keys(1), Column(CAPTIONS, [Page(body, LARGEST)])], 1, metadata).encoded()


def _rows(metadata: Metadata) -> bytes:
    """A row group of two billion rows."""
    return File(
        [keys(LARGEST), Column([("caption", OPTIONAL)], [Page(levels(LARGEST, 0), LARGEST)])], LARGEST, metadata
    ).encoded()


def _tensors(metadata: Metadata) -> bytes:
    """A thousand rows without vectors, of a schema with vectors of a gigabyte."""
    tensor = pa.schema([("embeddings", pa.fixed_shape_tensor(pa.float32(), [1000, 250_000]))])
    sink = pa.BufferOutputStream()
    pq.write_table(tensor.empty_table(), sink)
    schema = pq.read_metadata(pa.BufferReader(sink.getvalue())).metadata[b"ARROW:schema"].decode()
    pages = [Page(levels(1000, 0) * 2, 1000)]
    columns = [keys(1000), Column(VECTORS, pages, FLOAT)]
    return File(columns, 1000, {**metadata, "ARROW:schema": schema}).encoded()


def _footer(metadata: Metadata) -> bytes:
    """A footer with millions of column chunks of three bytes."""
    chunk = b"\x26\x00\x00"
    group = struct({1: listed(12, [chunk] * 900_000), 2: (6, b"\x00"), 3: (6, b"\x00")})
    data = File([keys(1)], 1, metadata).encoded()
    footer = struct({1: (5, b"\x04"), 2: listed(12, []), 3: (6, b"\x00"), 4: listed(12, [group] * 8)})
    return data + footer + len(footer).to_bytes(4, "little") + b"PAR1"


def _statistics(metadata: Metadata) -> bytes:
    """Statistics of a column that Arrow rejects with an exception that Python does not catch."""
    histogram = struct({2: listed(I64, [b"\0"] * 4)})
    column = Column([("caption", OPTIONAL)], [Page(levels(1, 1) + text(b"a"), 1)], extra={16: (STRUCT, histogram)})
    return File([keys(1), column], 1, metadata).encoded()


BOMBS = [
    Bomb("zstd pages of kilobytes that decompress to 13 GB", "samples", "needs more than", _zstd),
    Bomb("a dictionary whose one text of 1 MB is repeated 14,000 times", "samples", "needs more than", _dictionary),
    Bomb("an encoding in which each text repeats the one before", "samples", "encoding 7", _prefixes),
    Bomb("a page of 20 bytes that states the lengths of two billion captions", "samples", "encoding 6", _lengths),
    Bomb("a page of 20 bytes with two billion captions of a row", "captions/namer", "2,147,483,647 values", _levels),
    Bomb("a row group of two billion rows", "samples", "2,147,483,647 rows", _rows),
    Bomb(
        "vectors of gigabytes in the schema, and none in the rows", "embeddings/red/images", "needs more than", _tensors
    ),
    Bomb("statistics whose rejection ends the process", "samples", "its footer cannot be used", _statistics),
    Bomb("a footer of millions of columns", "samples", "its footer has", _footer),
]

#: Values of dataset.json that no run writes: by the keys that are changed, and a part of the message.
FORGED: dict[str, tuple[dict[str, Any], str]] = {
    "layers that are a list": ({"layers": []}, "is not that of a reinforced dataset"),
    "no layers": ({"layers": {}}, "lists no samples"),
    "a layer that is text": ({"layers__samples": "x"}, r"layers\.samples"),
    "a fingerprint that is a number": ({"layers__samples__fingerprint": 1}, r"layers\.samples\.fingerprint"),
    "a dimension of a million million": ({"layers": {"embeddings/red/images": {"dim": 10**12}}}, "dataset.json"),
    "images in a way that is not known": ({"images": "both"}, "images: Input should be 'embed', 'reference' or 'none'"),
    "a logit scale that is text": ({"teachers__red__logit_scale": "\x1b[2J"}, r"teachers\.red\.logit_scale"),
    "an infinite logit scale": ({"teachers__red__logit_scale": float("inf")}, r"teachers\.red\.logit_scale"),
    "a schema version that is text": ({"schema_version": "one"}, "schema_version"),
    "augmentations of 60,000 pixels": ({"augmentations__size": 60_000}, r"augmentations\.size"),
    "policies that are a list": ({"policies": []}, "does not record image policies"),
    "a policy that is null": ({"policies__image": None}, "does not record image policies"),
    "a layer of images without its dimension": ({"layers__embeddings/red/images": {"kind": "images"}}, "dataset.json"),
    "another name of a layer": ({"layers__../../x": {}}, "not a valid layer name"),
    "a layer that leaves its folder": ({"layers__embeddings/../x": {}}, "not a valid layer name"),
    "a layer with markup": ({"layers__[red]x": {}}, "not a valid layer name"),
    "a layer with an escape sequence": ({"layers__\x1b[2J": {}}, "not a valid layer name"),
    "other dimensions than the files": ({"layers__embeddings/red/images__dim": 9}, "shapes in dataset.json"),
}
