"""The footers of Parquet files, bounded before they are parsed.

The Arrow schema in a footer is not used, because Arrow would create the types that it names by whatever code has
registered them, and types of some libraries unpickle their values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

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
