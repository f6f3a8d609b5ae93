"""A tar read once from front to back, whose damage is told: tarfile and webdataset end silently at a bad header."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

BLOCK = 512
_CHUNK = 2**20
_MOST_EXTENDED = 2**20  # bytes of one pax or long-name header
_MOST_SIZE = 2**40
_MOST_PADDING = 4 * 2**20  # zeros after the last member: writers pad to 10 KiB, some to 1 MiB; more is a hole
_EXTENDED = {
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.XGLTYPE,
}
_PAX_RECORD = re.compile(rb"(\d{1,8}) ([^=]+)=")


class DamagedTar(Exception):
    """The tar cannot be read beyond byte ``offset`` (of the uncompressed stream)."""

    def __init__(self, offset: int, detail: str) -> None:
        super().__init__(f"damaged at byte {offset}: {detail}")
        self.offset = offset
        self.detail = detail


class Readable(Protocol):
    """A stream of bytes. It may give less than was asked for; nothing means the end.

    EOFError from it means that its own data is broken (a decompressor's); other exceptions pass through.
    """

    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True)
class Member:
    """A regular file in a tar. ``offset`` is the first byte of its data; ``read`` works until the next member."""

    name: str  # bytes that are not UTF-8 as lone surrogates (surrogateescape)
    offset: int
    size: int
    _stream: _Stream

    def read(self, limit: int) -> bytes | None:
        """The data, or None without reading if it has more than ``limit`` bytes. Raises DamagedTar if cut off."""
        if self.size > limit:
            return None
        if self._stream.position != self.offset:
            raise RuntimeError("a member is read once, before the next one is taken")
        data = self._stream.read(self.size)
        if len(data) < self.size:
            raise _cut_off(self)
        return data


def members(stream: Readable) -> Iterator[Member]:
    """The regular files of a tar: ustar, GNU and pax; links, folders and devices are skipped.

    Zero blocks end it, and so does the end of the stream right after a member. Members behind zero blocks
    (concatenated tars) are read too; anything else there is damage. Memory stays at 1 MiB and what a caller
    reads. Raises DamagedTar after all members before the damage.
    """
    source = _Stream(stream)
    common: dict[str, str] = {}  # pax records for all members that follow
    own: dict[str, str] = {}  # pax records and GNU long name of the next member
    while True:
        expected = source.position
        block = _next_block(source)
        start = source.position - len(block)
        if own and (not block or start > expected):
            raise DamagedTar(expected, "nothing follows an extended header")
        if not block:
            if start == 0:
                raise DamagedTar(0, "the file is empty")
            return
        header = _header(block, start)
        if header.type in _EXTENDED:
            records = _extended(source, header, start)
            (common if header.type == tarfile.XGLTYPE else own).update(records)
            continue
        member = _member(source, header, {**common, **own}, start)
        own = {}
        if header.isreg():
            yield member
        _finish(source, member)


def _next_block(source: _Stream) -> bytes:
    """The next block that is not zeros; nothing at the end."""
    start = source.position
    while True:
        block = source.read(BLOCK)
        if block.strip(b"\0") or not block:
            return block
        if source.position - start > _MOST_PADDING:
            raise DamagedTar(start, f"more than {_MOST_PADDING} zero bytes where members should be")


def _member(source: _Stream, header: tarfile.TarInfo, records: dict[str, str], start: int) -> Member:
    name = records.get("path") or header.name
    if header.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse.") for key in records):
        raise DamagedTar(start, f"{name[:100]!r} is stored sparsely, which is not read: write tars without --sparse")
    size = header.size
    if not header.isreg() and header.type in tarfile.SUPPORTED_TYPES:
        size = 0  # links, folders and devices have no data, whatever their size field says
    elif pax := records.get("size"):
        if not re.fullmatch(r"[0-9]{1,13}", pax) or int(pax) > _MOST_SIZE:
            raise DamagedTar(start, f"a size of {pax[:20]!r} bytes")
        size = int(pax)
    return Member(name, source.position, size, source)


def _finish(source: _Stream, member: Member) -> None:
    """Skip what is left of a member's data and its padding."""
    end = member.offset + member.size
    padded = end + -end % BLOCK
    source.skip(padded - source.position)
    if source.position < end:
        raise _cut_off(member)
    if source.position < padded:
        raise DamagedTar(source.position, f"it ends in the padding after {member.name[:100]!r}")


class _Stream:
    """Counts what is read, and reads the stream below in chunks."""

    def __init__(self, stream: Readable) -> None:
        self._below = stream
        self._chunk = b""
        self._used = 0
        self.position = 0

    def read(self, size: int) -> bytes:
        """``size`` bytes; fewer only at the end."""
        parts = list(self._parts(size))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def skip(self, size: int) -> None:
        for _ in self._parts(size):
            pass

    def _parts(self, missing: int) -> Iterator[bytes]:
        while missing > 0:
            if self._used == len(self._chunk):
                try:
                    self._chunk, self._used = self._below.read(_CHUNK), 0
                except EOFError as error:
                    raise DamagedTar(self.position, str(error)) from error
                if not self._chunk:
                    return
            part = self._chunk[self._used : self._used + missing]
            self._used += len(part)
            self.position += len(part)
            missing -= len(part)
            yield part


def _cut_off(member: Member) -> DamagedTar:
    return DamagedTar(member.offset, f"the {member.size} bytes of {member.name[:100]!r} are cut off")


def _header(block: bytes, start: int) -> tarfile.TarInfo:
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise DamagedTar(start, f"not a tar header ({error})") from error
    if not 0 <= header.size <= _MOST_SIZE:
        raise DamagedTar(start, f"a size of {header.size} bytes")
    return header


def _extended(source: _Stream, header: tarfile.TarInfo, start: int) -> dict[str, str]:
    """Records of a header that describes what follows; a GNU long name is given as pax would give it."""
    if header.size > _MOST_EXTENDED:
        raise DamagedTar(start, f"an extended header of {header.size} bytes")
    padded = header.size + -header.size % BLOCK
    data = source.read(padded)
    if len(data) < padded:
        raise DamagedTar(start, "it ends inside an extended header")
    if header.type == tarfile.GNUTYPE_LONGNAME:
        return {"path": _text(data.partition(b"\0")[0])}
    if header.type == tarfile.GNUTYPE_LONGLINK:
        return {}
    return _pax(data[: header.size], start)


def _pax(data: bytes, start: int) -> dict[str, str]:
    """Records ``<length> <key>=<value>\\n`` of a pax header; the length counts the whole record."""
    records = {}
    at = 0
    while at < len(data) and data[at] != 0:
        match = _PAX_RECORD.match(data, at)
        end = at + int(match[1]) if match else 0
        if match is None or not match.end() < end <= len(data) or data[end - 1] != ord("\n"):
            raise DamagedTar(start, "a pax header with a malformed record")
        records[_text(match[2])] = _text(data[match.end() : end - 1])
        at = end
    return records


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")
