"""Read a tar sequentially, report damage and continue after it; tarfile and webdataset stop silently at a bad header.

The formats are ustar and pax (POSIX.1-2001) and GNU tar's.
"""

from __future__ import annotations

import bz2
import contextlib
import errno
import gzip
import itertools
import lzma
import os
import re
import stat
import tarfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from reinforce.processes.attempts import prefetch
from reinforce.source.file_types import NOT_A_FILE, foreign_content
from reinforce.source.urls import compression, filesystem, is_storage_error, open_whole

BLOCK = 512
_RECORD_BYTES = (20 * BLOCK, 2**20)  # multiples that writers pad a tar to, if they do
_CHUNK_BYTES = 2**20
_MAX_EXTENDED_BYTES = 2**20  # of one pax or long-name header
_MAX_MEMBER_BYTES = 2**40
_MAX_PADDING_BYTES = 4 * 2**20  # zeros after the last member: writers pad to 10 KiB, some to 1 MiB; more is a hole
_MAX_SEARCH_BYTES = 2**30  # searched for the next header after damage
_MAX_DAMAGES = 100
_MAGIC = b"ustar"
_MAGIC_OFFSET = 257
_EXTENDED_TYPES = {
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.XGLTYPE,
}
_PAX_RECORD = re.compile(rb"(\d{1,8}) ([^=]+)=")
_COMPLETE_NAME = re.compile(rb"[^\0?]{1,99}\0")


class DamagedTar(Exception):
    """The tar is broken at byte ``offset`` of the uncompressed stream."""

    def __init__(self, offset: int, detail: str) -> None:
        super().__init__(f"damaged at byte {offset}: {detail}")
        self.offset = offset
        self.detail = detail


class Readable(Protocol):
    """A stream of bytes. ``read`` may return fewer bytes than asked for, and returns none at the end.

    It raises EOFError if its data is broken (by a decompressor); other exceptions pass through.
    """

    def read(self, size: int, /) -> bytes: ...


class File(Protocol):
    """A member of a tar, or a file of its own with its ``url``. ``read`` returns None for more than ``limit`` bytes."""

    @property
    def offset(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def is_link(self) -> bool: ...
    @property
    def url(self) -> str | None: ...
    def read(self, limit: int) -> bytes | None: ...


@dataclass(frozen=True)
class Member:
    """A file or link in a tar. ``offset`` is the first byte of its data; ``read`` is valid until the next member."""

    name: str  # bytes that are not UTF-8 as lone surrogates (surrogateescape)
    offset: int
    size: int
    is_link: bool  # symbolic or hard, without data
    cut_off: bool  # the stream is known to be too short for it
    _stream: _Stream
    url: str | None = None  # of a file of its own

    def read(self, limit: int) -> bytes | None:
        """Return the data, or None, unread, if it is larger than ``limit`` bytes. Raises DamagedTar if cut off."""
        if self.cut_off:
            raise _cut_off(self)
        if self.size > limit:
            return None
        if self._stream.position != self.offset:
            raise RuntimeError("a member can be read only once, and before the next one")
        data = self._stream.read(self.size)
        if len(data) < self.size:
            raise _cut_off(self)
        return data


def members(stream: Readable, size: int | None = None) -> Iterator[Member | DamagedTar]:
    """Yield the regular files and links of a tar, and its damage; folders and devices are skipped.

    Damage is yielded in place instead of raised. Reading resumes at the next block with the magic and the checksum of a
    header, and a name that a lost long-name header cannot have replaced. A member whose extended header is too long or
    malformed is skipped. (If the header of a member that is itself a
    tar is damaged, the members of that tar are read as members of this one.)
    Three more things count as damage: an end without zero blocks, since the tar may be cut off between members; zeros
    of a length that no writer leaves between concatenated tars; a member that exceeds ``size``, the length of the
    stream in bytes where it is known.
    Memory is 1 MiB and what the caller reads.
    """
    reader = _Reader(_Stream(stream), size)
    for _ in range(_MAX_DAMAGES):
        try:
            yield from reader
            return
        except DamagedTar as damage:
            yield damage
        try:
            if not reader.resume():
                return
        except DamagedTar as damage:  # a decompressor's, which cannot resume
            yield damage
            return
    yield DamagedTar(reader.position, f"damaged in {_MAX_DAMAGES} places; the rest is not read")


class _Reader:
    """Iterates over members. Raises DamagedTar at each damage; ``resume`` continues after it."""

    def __init__(self, source: _Stream, size: int | None) -> None:
        self._source = source
        self._size = size
        self._begin = 0  # offset of the current one of concatenated tars
        self._global_records: dict[str, str] = {}  # pax records for all members that follow
        self._next_records: dict[str, str] = {}  # pax records and GNU long name of the next member
        self._after_unusable = False  # the position is behind an extended header that cannot be used
        self._unnamed = False  # which may have had the name of the next member

    @property
    def position(self) -> int:
        return self._source.position

    def __iter__(self) -> Iterator[Member]:
        while block := self._next_block():
            start = self.position - BLOCK
            try:
                header = _header(block, start)
            except DamagedTar as damage:
                self._source.unread(block)  # the next header may begin inside this block
                raise damage if start else _not_a_tar(block, damage) from None
            if header.type in _EXTENDED_TYPES:
                try:
                    records = _extended(self._source, header, start)
                except DamagedTar:
                    whole = self.position == start + BLOCK + _padded(header.size)
                    self._after_unusable = whole and header.type != tarfile.XGLTYPE
                    raise
                (self._global_records if header.type == tarfile.XGLTYPE else self._next_records).update(records)
                continue
            records, self._next_records = {**self._global_records, **self._next_records}, {}
            member = self._member(header, records, start)
            unnamed, self._unnamed = self._unnamed, False
            if (header.isreg() or member.is_link) and not unnamed:
                yield member
            self._finish(member)

    def resume(self) -> bool:
        """Move to the next header after damage; return False if there is none."""
        self._next_records = {}
        self._unnamed, self._after_unusable = self._after_unusable, False
        return not self._source.broken and (self._unnamed or self._source.find(_is_header))

    def _next_block(self) -> bytes:
        """Return the next block that is not zeros, or no bytes at the end."""
        source, start = self._source, self.position
        while not (block := source.read(BLOCK)).strip(b"\0") and block:
            if self.position - start > _MAX_PADDING_BYTES:
                raise DamagedTar(start, f"more than {_MAX_PADDING_BYTES} zero bytes where members should be")
        position = self.position - len(block)
        zeros = position - start
        if 0 < len(block) < BLOCK:
            damage = DamagedTar(position, "the file ends inside a header")
            raise damage if position else _not_a_tar(block, damage)
        if self._next_records and (zeros or not block):
            source.unread(block)
            raise DamagedTar(start, "nothing follows an extended header")
        if not block:
            if position == 0:
                raise DamagedTar(0, "the file is empty")
            if zeros < 2 * BLOCK:
                raise DamagedTar(start, "it ends without two blocks of zeros, so it may be cut off between members")
        elif zeros == 2 * BLOCK or (zeros and any((position - self._begin) % record == 0 for record in _RECORD_BYTES)):
            self._begin = position
        elif zeros:
            source.unread(block)
            raise DamagedTar(start, f"{zeros} zero bytes between members")
        return block

    def _member(self, header: tarfile.TarInfo, records: dict[str, str], start: int) -> Member:
        name = records.get("path") or header.name
        if header.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse.") for key in records):
            raise DamagedTar(start, f"{name[:100]!r} is a sparse file, which is not read: write tars without --sparse")
        size = header.size
        if not header.isreg() and header.type in tarfile.SUPPORTED_TYPES:
            size = 0  # links, folders and devices have no data, even if their size field is set
        elif pax := records.get("size"):
            if not re.fullmatch(r"[0-9]{1,13}", pax) or int(pax) > _MAX_MEMBER_BYTES:
                raise DamagedTar(start, f"a size of {pax[:20]!r} bytes")
            size = int(pax)
        cut_off = self._size is not None and self.position + size > self._size
        is_link = header.issym() or header.islnk()
        return Member(name, self.position, size, is_link, cut_off, self._source)

    def _finish(self, member: Member) -> None:
        """Skip the rest of a member's data and its padding."""
        if member.cut_off:  # or its size is wrong and members follow: reading resumes right after the header
            raise _cut_off(member)
        end = member.offset + member.size
        padded = member.offset + _padded(member.size)
        self._source.skip(padded - self.position)
        if self.position < end:
            raise _cut_off(member)
        if self.position < padded:
            raise DamagedTar(self.position, f"the file ends in the padding after {member.name[:100]!r}")


class _Stream:
    """Reads a stream in chunks and counts the bytes consumed."""

    def __init__(self, stream: Readable) -> None:
        self._stream = stream
        self._chunk = b""
        self._used = 0
        self.broken = False  # the data of the stream is broken, so nothing follows
        self.position = 0

    def read(self, size: int) -> bytes:
        """Return ``size`` bytes, or fewer at the end."""
        parts = list(self._parts(size))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def skip(self, size: int) -> None:
        for _ in self._parts(size):
            pass

    def unread(self, data: bytes) -> None:
        """Push back the bytes that were read last."""
        self._chunk, self._used = data + self._chunk[self._used :], 0
        self.position -= len(data)

    def find(self, accepts: Callable[[bytes], bool]) -> bool:
        """Move to the next block, at any byte, with a tar's magic that ``accepts`` accepts; False if there is none."""
        data = self._chunk[self._used :]
        last = self.position + _MAX_SEARCH_BYTES
        while self.position < last:
            magic = data.find(_MAGIC, _MAGIC_OFFSET)
            while 0 <= magic <= len(data) - BLOCK + _MAGIC_OFFSET:
                start = magic - _MAGIC_OFFSET
                if accepts(data[start : start + BLOCK]):
                    self._chunk, self._used = data, start
                    self.position += start
                    return True
                magic = data.find(_MAGIC, magic + 1)
            tail = data[-(BLOCK - 1) :]  # may be the beginning of a header
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
            return self._stream.read(_CHUNK_BYTES)
        except EOFError as error:
            self.broken = True
            raise DamagedTar(self.position, str(error)) from error


def _cut_off(member: Member) -> DamagedTar:
    return DamagedTar(member.offset, f"the {member.size} bytes of {member.name[:100]!r} are cut off")


def _not_a_tar(block: bytes, damage: DamagedTar) -> DamagedTar:
    """Damage at the beginning of a file: what the file is, if its first block shows that."""
    is_header = block[_MAGIC_OFFSET:].startswith(_MAGIC)
    return damage if is_header else DamagedTar(0, foreign_content(block) or damage.detail)


def _header(block: bytes, start: int) -> tarfile.TarInfo:
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise DamagedTar(start, f"not a tar header ({error})") from error
    if not 0 <= header.size <= _MAX_MEMBER_BYTES:
        raise DamagedTar(start, f"a size of {header.size} bytes")
    return header


def _is_header(block: bytes) -> bool:
    """Return whether a block found after damage is the header of a member and holds its complete name.

    A name of a hundred bytes, or one with ``?`` for letters that are not ASCII, replaces a name in an extended header
    before it, which may be lost in the damage.
    """
    try:
        header = _header(block, 0)
    except DamagedTar:
        return False
    return header.type in _EXTENDED_TYPES or bool(_COMPLETE_NAME.match(block))


def _extended(source: _Stream, header: tarfile.TarInfo, start: int) -> dict[str, str]:
    """Read the records of an extended header; a GNU long name is returned as the pax record ``path``."""
    padded = _padded(header.size)
    if header.size > _MAX_EXTENDED_BYTES:
        source.skip(padded)
        raise DamagedTar(start, f"an extended header of {header.size} bytes; the member after it is not read")
    data = source.read(padded)
    if len(data) < padded:
        raise DamagedTar(start, "the file ends inside an extended header")
    if header.type == tarfile.GNUTYPE_LONGNAME:
        return {"path": _text(data.partition(b"\0")[0])}
    if header.type == tarfile.GNUTYPE_LONGLINK:
        return {}
    return _pax(data[: header.size], start)


def _pax(data: bytes, start: int) -> dict[str, str]:
    """Parse the records ``<length> <key>=<value>\\n`` of a pax header; the length counts the whole record."""
    records = {}
    position = 0
    while position < len(data) and data[position] != 0:
        match = _PAX_RECORD.match(data, position)
        end = position + int(match[1]) if match else 0
        if match is None or not match.end() < end <= len(data) or data[end - 1] != ord("\n"):
            raise DamagedTar(start, "a pax header with a malformed record")
        records[_text(match[2])] = _text(data[match.end() : end - 1])
        position = end
    return records


def _padded(size: int) -> int:
    """Bytes of the blocks that hold ``size`` bytes."""
    return size + -size % BLOCK


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


# -- Open source shards as streams of uncompressed bytes, and distinguish broken data from errors of the storage.

BLOCK_BYTES = 8 * 2**20  # bytes per request to an object store
#: Errors of a storage that has no file at a path which may be read.
NO_FILE = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
_NO_NAME = (errno.ENAMETOOLONG, errno.ELOOP)  # errors of file systems for impossible paths
_FEW = 16  # unreadable files of a shard that do not mean yet that its storage fails
_OTHERS = 8  # files that are tried to learn whether a storage works
_THREADS, _LOCAL_THREADS = 16, 2  # that read files ahead
_COMPRESSED_MAGIC = {
    b"\x1f\x8b": ".tar.gz",
    b"\xfd7zXZ": ".tar.xz",
    b"BZh": ".tar.bz2",
    b"\x28\xb5\x2f\xfd": ".tar.zst",
}

_T = TypeVar("_T")
_R = TypeVar("_R")


class Seekable(Readable, Protocol):
    """A stream of bytes that can go on further ahead."""

    def skip(self, count: int, /) -> None:
        """Leave out bytes."""


@contextmanager
def open_stream(url: str, kind: str | None = None) -> Iterator[tuple[Seekable, int | None]]:
    """Open a shard and yield its uncompressed bytes and their number, or None where that is not known in advance.

    ``kind`` is its compression, if that does not follow from the ending of a tar. Reading raises EOFError where the
    data is broken, and otherwise what the storage raises.
    """
    fs, path = filesystem(url)
    kind = kind or compression(url)
    check_file(fs, path)
    with open_whole(fs, path, block_size=BLOCK_BYTES, cache_type="readahead") as file:
        size = getattr(file, "size", None)
        if size == 0 and fs.isdir(path):  # s3fs opens a folder as an empty file
            raise IsADirectoryError(errno.EISDIR, "a folder")
        yield (_PlainStream(file), size) if kind is None else (_Decompressor(file, kind), None)


def check_file(fs: Any, path: str) -> None:
    """Raise IsADirectoryError for a local path that is a folder, pipe or device; opening a pipe would block."""
    if isinstance(fs, LocalFileSystem) and not stat.S_ISREG(mode := os.stat(path).st_mode):
        raise IsADirectoryError(errno.EISDIR, "a folder" if stat.S_ISDIR(mode) else NOT_A_FILE)


def read_file(url: str, limit: int) -> bytes:
    """Read a file; of one of more than ``limit`` bytes, one byte more than that. Raises as ``check_file``."""
    fs, path = filesystem(url)
    check_file(fs, path)
    with open_whole(fs, path, block_size=limit + 1, cache_type="none") as file:
        data: bytes = file.read(limit + 1)
    return data


class UnreadableFile(Exception):
    """A file that does not exist or cannot be read, in a storage that works."""


class FileReader:
    """Reads the small files of a folder, and distinguishes one that cannot be read from a storage that fails.

    ``others`` are URLs of files there that are tried where none was read before.
    """

    def __init__(self, others: Callable[[], Iterable[str]]) -> None:
        self._others = others
        self._last: str | None = None
        self._read = self._unreadable = 0

    def read(self, url: str, limit: int) -> bytes:
        """Read a file as ``read_file`` does. Raises UnreadableFile, or the errors of a storage that reads no other
        file either or that has failed at more files than it has read.
        """
        data = self._try(url, limit)
        if isinstance(data, Exception):
            if self._unreadable >= max(_FEW, self._read) or not self._works(url):
                raise data
            again = self._try(url, limit)
            if isinstance(again, Exception):
                self._unreadable += 1
                raise UnreadableFile(_describe(again)) from again
            data = again
        self._last = url
        self._read += 1
        return data

    def _try(self, url: str, limit: int) -> bytes | Exception:
        """The bytes of a file, or an error that may be the file's or the storage's. Raises UnreadableFile."""
        try:
            return read_file(url, limit)
        except NO_FILE as error:
            raise UnreadableFile(_describe(error)) from error
        except Exception as error:  # each driver has its own exceptions
            if getattr(error, "errno", None) in _NO_NAME:
                raise UnreadableFile(_describe(error)) from error
            if not is_storage_error(error):
                raise
            return error

    def _works(self, url: str) -> bool:
        """Whether any other file can be read now."""
        for other in [self._last] if self._last else itertools.islice(self._others(), _OTHERS):
            with contextlib.suppress(UnreadableFile):
                if other != url and isinstance(self._try(other, 1), bytes):
                    return True
        return False


def _describe(error: Exception) -> str:
    return getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"


def read_ahead(read: Callable[[_T], _R], items: Iterable[_T], folder: str) -> Iterator[_R]:
    """Yield ``read(item)`` in order; it reads files, most of them in ``folder``, ahead in threads."""
    threads = _THREADS if "://" in folder else _LOCAL_THREADS
    with ThreadPoolExecutor(threads) as pool:
        yield from prefetch(pool, read, items, threads)


class _PlainStream:
    """An uncompressed file. Raises EOFError if its first bytes are those of a compressed file."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._started = False

    def read(self, size: int, /) -> bytes:
        data: bytes = self._file.read(size)
        if not self._started:
            self._started = True
            for magic, ending in _COMPRESSED_MAGIC.items():
                if data.startswith(magic):
                    raise EOFError(f"compressed data; name the file {ending}")
        return data

    def skip(self, count: int, /) -> None:
        self._started = True
        self._file.seek(count, 1)


class _Decompressor:
    """Decompresses a file. Raises EOFError for broken data; errors of the storage pass through."""

    def __init__(self, file: Any, kind: str) -> None:
        self._file = _ErrorRecorder(file)
        decompressor, self._step = _DECOMPRESSORS[kind]
        self._stream = decompressor(self._file)
        self._kind = kind

    def read(self, size: int, /) -> bytes:
        try:  # small steps: what a decompressor has buffered when it fails is lost
            data: bytes = self._stream.read1(min(size, self._step))
        except Exception as error:  # each library raises its own types: zlib.error, LZMAError, OSError, EOFError
            if self._file.error is not None:
                raise self._file.error from None
            raise EOFError(f"broken {self._kind} data ({error})") from error
        return data

    def skip(self, count: int, /) -> None:
        while count and (data := self.read(count)):
            count -= len(data)


class _ErrorRecorder:
    """A compressed file that records the error it raised, to distinguish it from an error of the decompressor."""

    closed = False

    def __init__(self, file: Any) -> None:
        self._file = file
        self.error: Exception | None = None

    def read(self, size: int = -1, /) -> bytes:
        try:
            data: bytes = self._file.read(size)
        except Exception as error:
            self.error = error
            raise
        return data

    def close(self) -> None:
        """Do nothing: pyarrow closes its input, but ``open_stream`` closes the file."""

    def seek(self, *_: object) -> int:
        raise OSError("the stream cannot seek")


#: How each kind of compression is opened, and how many bytes are read from it at a time.
_DECOMPRESSORS: dict[str, tuple[Callable[[Any], Any], int]] = {
    "gzip": (lambda file: gzip.GzipFile(fileobj=file, mode="rb"), 2**16),
    "xz": (lzma.LZMAFile, 2**16),
    "bzip2": (bz2.BZ2File, 2**16),
    "zstd": (lambda file: pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd"), 2**12),
}
