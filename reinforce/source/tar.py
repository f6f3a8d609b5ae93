"""A tar read once from front to back, whose damage is told and passed over: tarfile and webdataset end silently at a
bad header."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

BLOCK = 512
_RECORDS = (20 * BLOCK, 2**20)  # what writers pad a tar to, if they do
_CHUNK = 2**20
_MOST_EXTENDED = 2**20  # bytes of one pax or long-name header
_MOST_SIZE = 2**40
_MOST_PADDING = 4 * 2**20  # zeros after the last member: writers pad to 10 KiB, some to 1 MiB; more is a hole
_MOST_SEARCHED = 2**30  # bytes behind damage in which the next header is looked for
_MOST_DAMAGES = 100
_MAGIC = b"ustar"
_MAGIC_AT = 257
_EXTENDED = {
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.XGLTYPE,
}
_PAX_RECORD = re.compile(rb"(\d{1,8}) ([^=]+)=")
_OWN_NAME = re.compile(rb"[^\0?]{1,99}\0")


class DamagedTar(Exception):
    """The tar is broken at byte ``offset`` (of the uncompressed stream)."""

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
    """A file or link in a tar. ``offset`` is the first byte of its data; ``read`` works until the next member."""

    name: str  # bytes that are not UTF-8 as lone surrogates (surrogateescape)
    offset: int
    size: int
    is_link: bool  # symbolic or hard, without data
    cut_off: bool  # known before it is read: the stream is too short for it
    _stream: _Stream

    def read(self, limit: int) -> bytes | None:
        """The data, or None without reading if it has more than ``limit`` bytes. Raises DamagedTar if cut off."""
        if self.cut_off:
            raise _cut_off(self)
        if self.size > limit:
            return None
        if self._stream.position != self.offset:
            raise RuntimeError("a member is read once, before the next one is taken")
        data = self._stream.read(self.size)
        if len(data) < self.size:
            raise _cut_off(self)
        return data


def members(stream: Readable, size: int | None = None) -> Iterator[Member | DamagedTar]:
    """The regular files and links of a tar: ustar, GNU and pax; folders and devices are skipped.

    Damage comes, not raised, where it stands between them. Reading goes on at the next header that can be told to be
    one: magic, checksum, and a name that no lost long-name header may have replaced. (A member that is a tar itself
    would be read for part of this one, if its own header is what is broken.) What follows is damage, too: an end
    without zero blocks, since the tar may be cut between members; zeros of a length that no writer leaves between
    concatenated tars; a member longer than what is left of ``size``, the stream's bytes where they are known.
    Memory stays at 1 MiB and what a caller reads.
    """
    reader = _Reader(_Stream(stream), size)
    for _ in range(_MOST_DAMAGES):
        try:
            yield from reader
            return
        except DamagedTar as damage:
            yield damage
        try:
            if not reader.resume():
                return
        except DamagedTar as damage:  # a decompressor's, which does not go on
            yield damage
            return
    yield DamagedTar(reader.position, f"after {_MOST_DAMAGES} places of damage the rest is not read")


class _Reader:
    """Goes from member to member. Raises DamagedTar once for each damage; ``resume`` goes on behind it."""

    def __init__(self, source: _Stream, size: int | None) -> None:
        self._source = source
        self._size = size
        self._begin = 0  # of the current one of concatenated tars
        self._common: dict[str, str] = {}  # pax records for all members that follow
        self._own: dict[str, str] = {}  # pax records and GNU long name of the next member

    @property
    def position(self) -> int:
        return self._source.position

    def __iter__(self) -> Iterator[Member]:
        while block := self._next_block():
            start = self.position - BLOCK
            try:
                header = _header(block, start)
            except DamagedTar:
                self._source.unread(block)  # the next one may begin in it
                raise
            if header.type in _EXTENDED:
                records = _extended(self._source, header, start)
                (self._common if header.type == tarfile.XGLTYPE else self._own).update(records)
                continue
            records, self._own = {**self._common, **self._own}, {}
            member = self._member(header, records, start)
            if header.isreg() or member.is_link:
                yield member
            self._finish(member)

    def resume(self) -> bool:
        """Go to the next header behind damage; False if there is none."""
        self._own = {}
        return not self._source.broken and self._source.find(_is_header)

    def _next_block(self) -> bytes:
        """The next block that is not zeros; nothing at the end."""
        source, start = self._source, self.position
        while not (block := source.read(BLOCK)).strip(b"\0") and block:
            if self.position - start > _MOST_PADDING:
                raise DamagedTar(start, f"more than {_MOST_PADDING} zero bytes where members should be")
        at = self.position - len(block)
        zeros = at - start
        if 0 < len(block) < BLOCK:
            raise DamagedTar(at, "it ends inside a header")
        if self._own and (zeros or not block):
            source.unread(block)
            raise DamagedTar(start, "nothing follows an extended header")
        if not block:
            if at == 0:
                raise DamagedTar(0, "the file is empty")
            if zeros < 2 * BLOCK:
                raise DamagedTar(start, "it ends without two blocks of zeros, so it may be cut off between members")
        elif zeros == 2 * BLOCK or (zeros and any((at - self._begin) % record == 0 for record in _RECORDS)):
            self._begin = at
        elif zeros:
            source.unread(block)
            raise DamagedTar(start, f"{zeros} zero bytes between members")
        return block

    def _member(self, header: tarfile.TarInfo, records: dict[str, str], start: int) -> Member:
        name = records.get("path") or header.name
        if header.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse.") for key in records):
            raise DamagedTar(
                start, f"{name[:100]!r} is stored sparsely, which is not read: write tars without --sparse"
            )
        size = header.size
        if not header.isreg() and header.type in tarfile.SUPPORTED_TYPES:
            size = 0  # links, folders and devices have no data, whatever their size field says
        elif pax := records.get("size"):
            if not re.fullmatch(r"[0-9]{1,13}", pax) or int(pax) > _MOST_SIZE:
                raise DamagedTar(start, f"a size of {pax[:20]!r} bytes")
            size = int(pax)
        cut_off = self._size is not None and self.position + size > self._size
        is_link = header.issym() or header.islnk()
        return Member(name, self.position, size, is_link, cut_off, self._source)

    def _finish(self, member: Member) -> None:
        """Skip what is left of a member's data and its padding."""
        if member.cut_off:  # or its size is wrong, and members follow
            raise _cut_off(member)
        end = member.offset + member.size
        padded = end + -member.size % BLOCK
        self._source.skip(padded - self.position)
        if self.position < end:
            raise _cut_off(member)
        if self.position < padded:
            raise DamagedTar(self.position, f"it ends in the padding after {member.name[:100]!r}")


class _Stream:
    """Counts what is read, and reads the stream below in chunks."""

    def __init__(self, stream: Readable) -> None:
        self._below = stream
        self._chunk = b""
        self._used = 0
        self.broken = False  # its data is, so nothing follows
        self.position = 0

    def read(self, size: int) -> bytes:
        """``size`` bytes; fewer only at the end."""
        parts = list(self._parts(size))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def skip(self, size: int) -> None:
        for _ in self._parts(size):
            pass

    def unread(self, data: bytes) -> None:
        """Give back what was read last."""
        self._chunk, self._used = data + self._chunk[self._used :], 0
        self.position -= len(data)

    def find(self, accepts: Callable[[bytes], bool]) -> bool:
        """Go on to the next block, at any byte, that has a tar's magic and is accepted; False if there is none."""
        data = self._chunk[self._used :]
        last = self.position + _MOST_SEARCHED
        while self.position < last:
            at = data.find(_MAGIC, _MAGIC_AT)
            while 0 <= at <= len(data) - BLOCK + _MAGIC_AT:
                start = at - _MAGIC_AT
                if accepts(data[start : start + BLOCK]):
                    self._chunk, self._used = data, start
                    self.position += start
                    return True
                at = data.find(_MAGIC, at + 1)
            tail = data[-(BLOCK - 1) :]  # of which a header may be the beginning
            self.position += len(data) - len(tail)
            more = self._next_chunk()
            if not more:
                break
            data = tail + more
        self._chunk, self._used = b"", 0
        return False

    def _parts(self, missing: int) -> Iterator[bytes]:
        while missing > 0:
            if self._used == len(self._chunk):
                self._chunk, self._used = self._next_chunk(), 0
                if not self._chunk:
                    return
            part = self._chunk[self._used : self._used + missing]
            self._used += len(part)
            self.position += len(part)
            missing -= len(part)
            yield part

    def _next_chunk(self) -> bytes:
        try:
            return self._below.read(_CHUNK)
        except EOFError as error:
            self.broken = True
            raise DamagedTar(self.position, str(error)) from error


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


def _is_header(block: bytes) -> bool:
    """Whether a block found behind damage begins a member whose name is its own.

    One of a hundred bytes, or with ``?`` for letters that are not ASCII, is what stands in a header when the name is
    in an extended header before it, which may be what is lost.
    """
    try:
        header = _header(block, 0)
    except DamagedTar:
        return False
    return header.type in _EXTENDED or bool(_OWN_NAME.match(block))


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
