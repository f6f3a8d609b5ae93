"""WebDataset tars, read sequentially. What cannot become a sample is yielded as a refusal with its reason.

Damage is reported, and reading goes on after it; tarfile and webdataset stop silently at a bad header. The formats are
ustar and pax (POSIX.1-2001) and GNU tar's.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from reinforce.source.config import Input, Limits
from reinforce.source.file_types import foreign_content, foreign_name, is_image_name, unread_heic
from reinforce.source.formats.base import Shard, SourceFormat
from reinforce.source.samples import (
    DamagedTar,
    RawSample,
    ReadBudget,
    Refusal,
    T,
    as_utf8,
    refused_key,
    refused_rest,
    refusing_absent,
)
from reinforce.source.urls import COMPRESSIONS, Stream, open_stream
from schemas import Reason

_META = re.compile(r"__[^/]*__(/|$)")
_LINK = " (a link)"
_PACKED_TABLE = re.compile(r"\.(jsonl|ndjson|csv|tsv|json)\.(bz2|xz|lz4|br|snappy|7z|zip)$")

_BLOCK = 512
_RECORD_BYTES = (20 * _BLOCK, 2**20)  # multiples that writers pad a tar to, if they do
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


class Tar(SourceFormat):
    name = noun = "tar"
    endings = tuple(COMPRESSIONS)
    prevails = True  # as over the Parquet files that img2dataset writes beside its tars
    has_offsets = referable = True

    def read(
        self, shard: Shard, spec: Input, budget: ReadBudget | None = None, images: bool = True
    ) -> Iterator[RawSample | Refusal]:
        return _read_tar(shard.file, spec.limits, images, budget)

    def foreign(self, url: str) -> str | None:
        if _PACKED_TABLE.search(url.partition("?")[0].lower()):
            return "a table with a compression that is not read: store it as it is, or as .gz or .zst"
        return foreign_name(url)


def read_shard(url: str, limits: Limits, images: bool = True) -> Iterator[RawSample | Refusal]:
    """Yield the samples of a tar in order, grouped as webdataset groups them, with refusals in between.

    A sample is a run of members with the same key. The key is the path up to the first dot of the file name; the rest,
    in lower case, is the extension. Hidden files and ``__MACOSX`` and ``__meta__`` names belong to no sample. The image
    is the first member with an image extension; ``jpg`` takes precedence over a compound extension such as
    ``depth.png``. Of the other members, those of at most ``limits.sidecar_bytes`` are kept. Where the image's extension
    is compound (``v1.png``), a sidecar with the same beginning (``v1.txt``) replaces a missing ``txt``. After a sample
    with further images comes a refusal that names them, and sidecars that begin as they do (``v2.txt``).
    A key that occurs again later is refused, because the members of a sample must be next to each other. If most
    samples are split in this way, the shard as a whole is refused at its end.
    A shard that is missing, unreadable or damaged yields a Refusal without a key; samples before and after the damage
    are read. Memory does not grow with the shard, except for an 8-byte hash per key.
    With ``images=False`` only sidecars are read, and samples need no image.
    Raises the storage's other errors (timeouts, lost connections), for which the shard can be retried.
    """
    return refusing_absent(url, _read_tar(url, limits, images))


def sample_of_files(key: str, files: Iterable[tuple[str, SourceFile]], limits: Limits) -> Iterator[RawSample | Refusal]:
    """Yield the sample of the (extension, file) of one key, as ``read_shard`` makes it of members, and refusals.

    No refusal names further images, because each is a sample.
    """
    group = _Group(key, None, True, names_strays=False)
    for extension, file in files:
        group.add(extension, file, limits)
    yield from group.close(limits)


def split_name(name: str) -> tuple[str, str]:
    """Split a member's name into key and lower-case extension; the key is empty if it belongs to no sample."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not stem or not dot or _META.match(name) or "__MACOSX" in folder.split("/"):
        return "", ""
    return folder + slash + stem, extension.lower()


@dataclass
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


class SourceFile(Protocol):
    """A member of a tar, or a file of its own with its ``url``. ``read`` returns None for more than ``limit`` bytes."""

    offset: int
    size: int
    is_link: bool
    url: str | None

    def read(self, limit: int) -> bytes | None: ...


def members(stream: Stream, size: int | None = None, budget: ReadBudget | None = None) -> Iterator[Member | DamagedTar]:
    """Yield the regular files and links of a tar, and its damage; folders and devices are skipped.

    Damage is yielded in place instead of raised. Reading resumes at the next block with the magic and the checksum of a
    header, and a name that a lost long-name header cannot have replaced. A member whose extended header is too long or
    malformed is skipped. (If the header of a member that is itself a tar is damaged, the members of that tar are read
    as members of this one.)
    Three more things count as damage: an end without zero blocks, since the tar may be cut off between members; zeros
    of a length that no writer leaves between concatenated tars; a member that exceeds ``size``, the length of the
    stream in bytes where it is known. The stream ends when its ``budget`` does.
    Memory is 1 MiB and what the caller reads.
    """
    source = _Stream(stream, budget)
    reader = _Reader(source, size)
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
    yield DamagedTar(source.position, f"damaged in {_MAX_DAMAGES} places; the rest is not read")


def _read_tar(
    url: str, limits: Limits, images: bool = True, budget: ReadBudget | None = None
) -> Iterator[RawSample | Refusal]:
    complete: dict[bytes, bool] = {}  # by hash of the key: whether it made a complete sample
    damages: list[tuple[DamagedTar, str]] = []  # with the name of the member before
    last_name = ""
    split = 0

    def keyed(stream: Stream, size: int | None) -> Iterator[tuple[str, str, Member]]:
        """Yield (key, extension, member), and collect the damage."""
        nonlocal last_name
        for item in members(stream, size, budget):
            if isinstance(item, DamagedTar):
                damages.append((item, last_name))
                continue
            last_name = item.name
            key, extension = split_name(item.name)
            if key:
                yield key, extension, item

    with open_stream(url) as (stream, size):
        for key, run in itertools.groupby(keyed(stream, size), key=lambda item: item[0]):
            digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
            if len(complete) == limits.shard_samples and digest not in complete:
                yield refused_rest(limits, repr(as_utf8(key)[:100]))
                break
            group = _Group(key, complete.get(digest), images)
            for _, extension, member in run:
                group.add(extension, member, limits)
            yield from group.close(limits)
            split += group.split
            complete[digest] = bool(group.earlier or group.complete)
    if damages and not last_name:  # without any member
        yield Refusal(None, Reason.SHARD_UNREADABLE, damages[0][0].detail)
    else:
        for damage, before in damages:
            where = f"the member before it is {as_utf8(before)[-200:]!r}" if before else "no member comes before it"
            yield Refusal(None, Reason.SHARD_DAMAGED, f"{damage}; {where}")
    if 2 * split > len(complete):
        yield Refusal(
            None,
            Reason.SHARD_UNSORTED,
            f"the members of most of its {len(complete)} samples are not next to each other, as WebDataset needs them: "
            "unpack it, and pack it again with `tar --sort=name`",
        )


@dataclass
class _Group:
    """The members read so far of one run of members with the same key.

    ``earlier`` is None if the key is new, otherwise whether its earlier members made a complete sample.
    """

    key: str
    earlier: bool | None
    needs_image: bool
    names_strays: bool = True  # whether a refusal names further images
    extensions: list[str] = field(default_factory=list)
    repeated: str | None = None
    unread: int = 0  # members above limits.members
    images: int = 0
    image: SourceFile | None = None
    image_extension: str = ""
    data: bytes | None = None  # None if above limits.image_bytes
    cut_off: bool = False
    sidecars: dict[str, bytes] = field(default_factory=dict)
    left_out: dict[str, Refusal] = field(default_factory=dict)

    def add(self, extension: str, member: SourceFile, limits: Limits) -> None:
        if extension in self.extensions:
            self.repeated = extension
            return
        if len(self.extensions) == limits.members:
            self.unread += 1
            return
        self.extensions.append(f"{extension}{_LINK}" if member.is_link else extension)
        is_image = is_image_name(extension)
        self.images += is_image
        key, shown = as_utf8(self.key), as_utf8(extension)
        if member.is_link:
            detail = f".{shown}: a link, which is not followed"
            self.left_out[extension] = Refusal(key, Reason.SIDECAR_BROKEN, detail)
        elif is_image:
            if self.needs_image and (self.image is None or ("." in self.image_extension and "." not in extension)):
                self.image, self.image_extension = member, extension
                self.data, self.cut_off = _read(member, limits.image_bytes)
        else:
            data, cut_off = _read(member, limits.sidecar_bytes)
            if data is not None:
                self.sidecars[extension] = data
            elif not cut_off:  # a sidecar that is cut off is covered by the refusal for the damage
                detail = f".{shown}: {member.size} bytes, above limits.sidecar_bytes of {limits.sidecar_bytes}"
                self.left_out[extension] = Refusal(key, Reason.SIDECAR_BYTES, detail)

    @property
    def complete(self) -> bool:
        """Whether the members make a sample."""
        return self.image is not None or not self.needs_image

    @property
    def split(self) -> bool:
        """Whether members of one sample are apart, and not a whole sample repeated."""
        return self.earlier is not None and not (self.earlier and self.complete)

    def close(self, limits: Limits) -> Iterator[RawSample | Refusal]:
        """Yield the sample or its refusal, then refusals of parts of it."""
        key, extensions = as_utf8(self.key), tuple(map(as_utf8, self.extensions))
        if refusal := refused_key(key, limits, self.earlier is not None and not self.split):
            yield refusal
            return
        if self.split:
            listed = ", ".join(extensions)[:200]
            yield Refusal(key, Reason.SPLIT_KEY, f"not next to the other members of the key: {listed}")
            return
        sample: RawSample | Refusal
        if not self.needs_image:
            sample = RawSample(key, b"", 0, 0, self.sidecars, self.left_out, members=extensions)
        elif (image := self.image) is None:
            hint = f"; {unread}" if (unread := unread_heic(self.extensions)) else ""
            sample = Refusal(key, Reason.NO_IMAGE, f"no image among: {', '.join(extensions)[:200]}{hint}")
        elif self.cut_off:
            sample = Refusal(key, Reason.IMAGE_BROKEN, "cut off where the shard is damaged")
        elif self.data is None:
            detail = f"{image.size} bytes, above limits.image_bytes of {limits.image_bytes}"
            sample = Refusal(key, Reason.IMAGE_BYTES, detail)
        else:
            left_out, of_image = {**self._of_image(self.left_out), **self.left_out}, self._of_image(self.sidecars)
            place = (image.offset, image.size)
            sample = RawSample(key, self.data, *place, self.sidecars, left_out, of_image, extensions, url=image.url)
        yield sample
        if self.repeated is not None:
            detail = f"member .{as_utf8(self.repeated)[:100]} occurs twice; the first is kept"
            yield Refusal(key, Reason.DUPLICATE_KEY, detail)
        if self.unread:
            yield Refusal(key, Reason.MEMBERS, f"{self.unread} more than limits.members of {limits.members}, not read")
        if self.image is None or self.images < 2 or not self.names_strays:
            return
        # Images that are not read, and sidecars that begin as these do.
        names = [name.removesuffix(_LINK) for name in self.extensions]
        images = [name for name in names if is_image_name(name)]
        own = _start(self.image_extension)
        starts = tuple({_start(name) for name in images} - {own, ""})
        strays = [
            name
            for name in names
            if (name in images and name != self.image_extension)
            or (name.startswith(starts) and not (own and name.startswith(own)))
        ]
        if strays:
            count, read, rest = 1 + sum(map(is_image_name, strays)), self.image_extension, ", .".join(strays)
            detail = f"{count} images, of which .{as_utf8(read)[:100]} is read, and not .{as_utf8(rest)[:300]}"
            yield Refusal(key, Reason.STRAY_MEMBERS, f"{detail}; a key ends at the first dot of the file name")

    def _of_image(self, sidecars: Mapping[str, T]) -> dict[str, T]:
        """The sidecars whose compound extension begins as the image's, by its last part where no other has that."""
        start = _start(self.image_extension)
        named = {name.removeprefix(start): value for name, value in sidecars.items() if name.startswith(start)}
        return {name: value for name, value in named.items() if name not in (*self.sidecars, *self.left_out)}


def _start(extension: str) -> str:
    """A compound extension without its last part: ``v1.`` of ``v1.png``."""
    return extension[: extension.rfind(".") + 1]


def _read(member: SourceFile, limit: int) -> tuple[bytes | None, bool]:
    """Return a member's data, or None if it is above the limit or cut off, and whether it is cut off."""
    try:
        return member.read(limit), False
    except DamagedTar:  # the same damage is reported again after this member
        return None, True


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

    def __iter__(self) -> Iterator[Member]:
        source = self._source
        while block := self._next_block():
            start = source.position - _BLOCK
            try:
                header = _header(block, start)
            except DamagedTar as damage:
                source.unread(block)  # the next header may begin inside this block
                raise damage if start else _not_a_tar(block, damage) from None
            if header.type in _EXTENDED_TYPES:
                try:
                    records = _extended(source, header, start)
                except DamagedTar:
                    whole = source.position == start + _BLOCK + _padded(header.size)
                    self._after_unusable = whole and header.type != tarfile.XGLTYPE
                    raise
                (self._global_records if header.type == tarfile.XGLTYPE else self._next_records).update(records)
                continue
            records, self._next_records = {**self._global_records, **self._next_records}, {}
            member = self._member(header, records, start)
            unnamed, self._unnamed = self._unnamed, False
            if (header.isreg() or member.is_link) and not unnamed:
                yield member
            # Skip the rest of the member's data and its padding.
            if member.cut_off:  # or its size is wrong and members follow: reading resumes right after the header
                raise _cut_off(member)
            padded = member.offset + _padded(member.size)
            source.skip(padded - source.position)
            if source.position < member.offset + member.size:
                raise _cut_off(member)
            if source.position < padded:
                raise DamagedTar(source.position, f"the file ends in the padding after {member.name[:100]!r}")

    def resume(self) -> bool:
        """Move to the next header after damage; return False if there is none."""
        self._next_records = {}
        self._unnamed, self._after_unusable = self._after_unusable, False
        return not self._source.broken and (self._unnamed or self._source.find(_is_header))

    def _next_block(self) -> bytes:
        """Return the next block that is not zeros, or no bytes at the end."""
        source = self._source
        start = source.position
        while not (block := source.read(_BLOCK)).strip(b"\0") and block:
            if source.position - start > _MAX_PADDING_BYTES:
                raise DamagedTar(start, f"more than {_MAX_PADDING_BYTES} zero bytes where members should be")
        position = source.position - len(block)
        zeros = position - start
        if 0 < len(block) < _BLOCK:
            damage = DamagedTar(position, "the file ends inside a header")
            raise damage if position else _not_a_tar(block, damage)
        if self._next_records and (zeros or not block):
            source.unread(block)
            raise DamagedTar(start, "nothing follows an extended header")
        if not block:
            if position == 0:
                raise DamagedTar(0, "the file is empty")
            if zeros < 2 * _BLOCK:
                raise DamagedTar(start, "it ends without two blocks of zeros, so it may be cut off between members")
        elif zeros == 2 * _BLOCK or (zeros and any((position - self._begin) % record == 0 for record in _RECORD_BYTES)):
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
        cut_off = self._size is not None and self._source.position + size > self._size
        is_link = header.issym() or header.islnk()
        return Member(name, self._source.position, size, is_link, cut_off, self._source)


class _Stream:
    """Reads a stream in chunks, at most the budget, and counts the bytes consumed."""

    def __init__(self, stream: Stream, budget: ReadBudget | None = None) -> None:
        self._stream, self._budget = stream, budget
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
            while 0 <= magic <= len(data) - _BLOCK + _MAGIC_OFFSET:
                start = magic - _MAGIC_OFFSET
                if accepts(data[start : start + _BLOCK]):
                    self._chunk, self._used = data, start
                    self.position += start
                    return True
                magic = data.find(_MAGIC, magic + 1)
            tail = data[-(_BLOCK - 1) :]  # may be the beginning of a header
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
        size = _CHUNK_BYTES if self._budget is None else min(_CHUNK_BYTES, self._budget.left)
        try:
            chunk = self._stream.read(size) if size else b""
        except EOFError as error:
            self.broken = True
            raise DamagedTar(self.position, str(error)) from error
        if self._budget is not None:
            self._budget.left -= len(chunk)
        return chunk


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
    # Records of pax are ``<length> <key>=<value>\n``; the length counts the whole record.
    records = {}
    position, data = 0, data[: header.size]
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
    return size + -size % _BLOCK


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


FORMAT = Tar()
