"""Source shards as streams of samples. Whatever cannot become a sample comes out as a refusal with its reason."""

from __future__ import annotations

import bz2
import errno
import gzip
import hashlib
import itertools
import lzma
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from reinforce.config import Limits
from reinforce.errors import UserError
from reinforce.source.tar import DamagedTar, Member, Readable, members
from reinforce.source.urls import canonical, compression, filesystem
from schemas import Reason

#: Members that are images, in formats that reinforce.source.image reads.
IMAGE_EXTENSIONS = frozenset(
    {"jpg", "jpeg", "jpe", "jfif", "png", "apng", "webp", "gif", "bmp", "tif", "tiff", "avif"}
    | {"pnm", "pbm", "pgm", "ppm"}
)
_BLOCK = 8 * 2**20  # bytes of one request to an object store
_META = re.compile(r"__[^/]*__(/|$)")
_MAGIC = {b"\x1f\x8b": ".tar.gz", b"\xfd7zXZ": ".tar.xz", b"BZh": ".tar.bz2", b"\x28\xb5\x2f\xfd": ".tar.zst"}


@dataclass(frozen=True)
class Refusal:
    """A sample or a part of it that cannot be read, or with key None something about the shard as a whole."""

    key: str | None
    reason: Reason
    detail: str


@dataclass(frozen=True)
class RawSample:
    """A sample as it stands in its shard. ``offset`` and ``length`` place the image in the uncompressed tar."""

    key: str  # bytes of the name that are not UTF-8 are written %XX
    image: bytes
    offset: int
    length: int
    sidecars: dict[str, bytes]  # by lower-case extension: txt, json, ...
    left_out: Mapping[str, Refusal] = field(default_factory=dict)  # sidecars that were not read, and why


def read_shard(url: str, limits: Limits, images: bool = True) -> Iterator[RawSample | Refusal]:
    """The samples of a tar in its order, as webdataset groups them, with refusals in between.

    A sample is a run of members with one key: the path up to the first dot of the file name; the rest, in lower
    case, is the extension. Hidden files, ``__MACOSX`` and ``__meta__`` names are no samples. The image is the
    first member with an image extension; ``jpg`` goes before a compound one such as ``depth.png``. Of the other
    members those of at most ``limits.sidecar_bytes`` are kept. A key that comes again is refused: its members must
    lie side by side, and where those of most samples do not, the shard as a whole is refused at its end.
    A shard that is missing, unreadable or damaged gives a Refusal without a key; samples before and behind the damage
    are read. Memory does not grow with the shard, except for 8-byte hashes of its keys.
    Without ``images`` it is the sidecars that are wanted: samples need no image, and images are not read.
    Raises what the storage raises otherwise (timeouts, lost connections): that is worth another attempt.
    """
    try:
        with _open(url) as (stream, size):
            yield from _samples(stream, size, limits, images)
    except (FileNotFoundError, NotADirectoryError) as error:
        yield Refusal(None, Reason.SHARD_MISSING, _describe(error))
    except (IsADirectoryError, PermissionError) as error:
        yield Refusal(None, Reason.SHARD_UNREADABLE, _describe(error))


def read_ranges(url: str, ranges: Iterable[tuple[int, int]]) -> Iterator[bytes]:
    """The bytes at (offset, length) of an uncompressed tar, for ascending ranges.

    Read ahead in blocks of 8 MiB, so neighbouring ranges share requests. Raises DamagedTar where the file ends
    before a range does, and what the storage raises.
    """
    if compression(url):
        raise UserError(f"{canonical(url)}: images cannot be read by reference from a compressed tar. Unpack it.")
    fs, path = filesystem(url)
    with fs.open(path, "rb", block_size=_BLOCK, cache_type="readahead") as file:
        for offset, length in ranges:
            file.seek(offset)
            data = bytearray()
            while len(data) < length and (part := file.read(length - len(data))):
                data += part
            if len(data) < length:
                raise DamagedTar(offset + len(data), f"{length} bytes at {offset} are referred to, but the file ends")
            yield bytes(data)


def referenced_images(references: list[dict[str, object]]) -> Iterator[bytes]:
    """Images of one row group from their tar: consecutive rows of one URL are one sequential read."""
    for url, rows in itertools.groupby(references, key=lambda reference: str(reference["url"])):
        yield from read_ranges(url, ((int(str(r["offset"])), int(str(r["length"]))) for r in rows))


@dataclass
class _Group:
    """Members of one key, as far as they have been read. ``before`` is None for a new key, else whether it came
    ``whole``."""

    key: str
    before: bool | None
    images: bool
    extensions: list[str] = field(default_factory=list)
    repeated: str | None = None
    unread: int = 0  # members above limits.members
    image: Member | None = None
    image_extension: str = ""
    data: bytes | None = None  # None: over the limit
    cut_off: bool = False
    sidecars: dict[str, bytes] = field(default_factory=dict)
    left_out: dict[str, Refusal] = field(default_factory=dict)

    def add(self, extension: str, member: Member, limits: Limits) -> None:
        if extension in self.extensions:
            self.repeated = extension
            return
        if len(self.extensions) == limits.members:
            self.unread += 1
            return
        self.extensions.append(f"{extension} (a link)" if member.is_link else extension)
        if member.is_link:
            self._leave_out(extension, Reason.SIDECAR_BROKEN, "a link, which is not followed")
        elif extension.rpartition(".")[2] in IMAGE_EXTENSIONS:
            if self.images and (self.image is None or ("." in self.image_extension and "." not in extension)):
                self.image, self.image_extension = member, extension
                self.data, self.cut_off = _read(member, limits.image_bytes)
        else:
            data, cut_off = _read(member, limits.sidecar_bytes)
            if data is not None:
                self.sidecars[extension] = data
            elif not cut_off:  # else it is lost with the damage, which is told
                why = f"{member.size} bytes, above limits.sidecar_bytes of {limits.sidecar_bytes}"
                self._leave_out(extension, Reason.SIDECAR_BYTES, why)

    @property
    def whole(self) -> bool:
        """Whether what a sample needs is there."""
        return self.image is not None or not self.images

    def _leave_out(self, extension: str, reason: Reason, why: str) -> None:
        self.left_out[extension] = Refusal(_valid(self.key), reason, f".{_valid(extension)}: {why}")

    def close(self, limits: Limits) -> Iterator[RawSample | Refusal]:
        key = _valid(self.key)
        if len(key) > limits.key_chars:
            detail = f"{len(key)} characters, above limits.key_chars of {limits.key_chars}"
            yield Refusal(key[:100], Reason.KEY_CHARS, detail)
            return
        extensions = ", ".join(map(_valid, self.extensions))[:200]
        if self.before is not None:
            if self.before and self.whole:
                yield Refusal(key, Reason.DUPLICATE_KEY, "the key came before in this shard; the first is kept")
            else:
                yield Refusal(key, Reason.SPLIT_KEY, f"not beside the other members of the key: {extensions}")
            return
        if not self.images:
            yield RawSample(key, b"", 0, 0, self.sidecars, self.left_out)
        elif self.image is None:
            yield Refusal(key, Reason.NO_IMAGE, f"no image among: {extensions}")
        elif self.cut_off:
            yield Refusal(key, Reason.IMAGE_BROKEN, "cut off where the shard is damaged")
        elif self.data is None:
            detail = f"{self.image.size} bytes, above limits.image_bytes of {limits.image_bytes}"
            yield Refusal(key, Reason.IMAGE_BYTES, detail)
        else:
            yield RawSample(key, self.data, self.image.offset, self.image.size, self.sidecars, self.left_out)
        if self.repeated is not None:
            detail = f"member .{_valid(self.repeated)[:100]} came twice; the first is kept"
            yield Refusal(key, Reason.DUPLICATE_KEY, detail)
        if self.unread:
            yield Refusal(key, Reason.MEMBERS, f"{self.unread} more than limits.members of {limits.members}, not read")


def _read(member: Member, limit: int) -> tuple[bytes | None, bool]:
    """A member's data, None where it is above the limit or cut off, and whether it is the latter."""
    try:
        return member.read(limit), False
    except DamagedTar:  # comes again between the members
        return None, True


def _samples(stream: Readable, size: int | None, limits: Limits, images: bool) -> Iterator[RawSample | Refusal]:
    seen: dict[bytes, bool] = {}  # keys by hash, and whether they came whole
    split = 0
    damages: list[tuple[DamagedTar, str]] = []
    last = ""  # member

    def named() -> Iterator[tuple[str, str, Member]]:
        nonlocal last
        for item in members(stream, size):
            if isinstance(item, DamagedTar):
                damages.append((item, last))
                continue
            last = item.name
            key, extension = _split(item.name)
            if key:
                yield key, extension, item

    for key, run in itertools.groupby(named(), key=lambda item: item[0]):
        digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
        if len(seen) == limits.shard_samples and digest not in seen:
            detail = (
                f"more than limits.shard_samples of {limits.shard_samples}; the rest, from {_valid(key)[:100]!r} on"
            )
            yield Refusal(None, Reason.SHARD_SAMPLES, f"{detail}, is not read")
            break
        group = _Group(key, seen.get(digest), images)
        for _, extension, member in run:
            group.add(extension, member, limits)
        yield from group.close(limits)
        split += group.before is not None and not (group.before and group.whole)
        seen[digest] = bool(group.before or group.whole)
    if damages and not last:
        yield Refusal(None, Reason.SHARD_UNREADABLE, damages[0][0].detail)
        return
    for damage, before in damages:
        name = _valid(before)[-200:]
        detail = f"{damage}; " + (f"the member before it is {name!r}" if before else "no member comes before it")
        yield Refusal(None, Reason.SHARD_DAMAGED, detail)
    if 2 * split > len(seen):
        yield Refusal(
            None,
            Reason.SHARD_UNSORTED,
            f"the members of most of its {len(seen)} samples do not lie side by side, as WebDatasets have them: unpack "
            "it, and pack it with `tar --sort=name`",
        )


def _split(name: str) -> tuple[str, str]:
    """Key and lower-case extension of a member; an empty key where it belongs to no sample."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not stem or not dot or _META.match(name) or "__MACOSX" in folder.split("/"):
        return "", ""
    return folder + slash + stem, extension.lower()


def _valid(name: str) -> str:
    """A name with the bytes that are not UTF-8 as %XX, so that different names stay different."""
    return re.sub(r"[\udc80-\udcff]", lambda match: f"%{ord(match[0]) - 0xDC00:02X}", name)


def _describe(error: OSError) -> str:
    return _valid(error.strerror or str(error) or type(error).__name__)


@contextmanager
def _open(url: str) -> Iterator[tuple[Readable, int | None]]:
    """The uncompressed bytes of a shard and their number, where it is known beforehand."""
    fs, path = filesystem(url)
    kind = compression(url)
    if isinstance(fs, LocalFileSystem) and not stat.S_ISREG(os.stat(path).st_mode):
        raise IsADirectoryError(errno.EISDIR, "a folder, pipe or device, not a file")  # opening a pipe would wait
    with fs.open(path, "rb", block_size=_BLOCK, cache_type="readahead") as file:
        yield (_Plain(file), getattr(file, "size", None)) if kind is None else (_Decompressed(file, kind), None)


class _Plain:
    """An uncompressed stream; compressed data under a plain name is told from junk."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._begun = False

    def read(self, size: int, /) -> bytes:
        data: bytes = self._file.read(size)
        if not self._begun:
            self._begun = True
            for magic, ending in _MAGIC.items():
                if data.startswith(magic):
                    raise EOFError(f"compressed data; name the file {ending}")
        return data


class _Decompressed:
    """A decompressing stream. EOFError: the data is broken. What the storage raises passes through."""

    def __init__(self, file: Any, kind: str) -> None:
        self._file = _Watched(file)
        decompressor, self._step = _DECOMPRESSORS[kind]
        self._stream = decompressor(self._file)
        self._kind = kind

    def read(self, size: int, /) -> bytes:
        try:  # little at a time: what a decompressor holds when it fails is lost
            data: bytes = self._stream.read1(min(size, self._step))
        except Exception as error:  # zlib.error, LZMAError, OSError, EOFError: each library its own
            if self._file.error is not None:
                raise self._file.error from None
            raise EOFError(f"broken {self._kind} data ({error})") from error
        return data


class _Watched:
    """A compressed file that remembers whether it raised, so that its errors are told from a decompressor's."""

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
        """pyarrow closes what it reads from; the file below is closed by who opened it."""

    def seek(self, *_: object) -> int:
        raise OSError("read from front to back only")


#: How to open each kind of compression, and how many bytes to take from it at a time.
_DECOMPRESSORS: dict[str, tuple[Callable[[Any], Any], int]] = {
    "gzip": (lambda file: gzip.GzipFile(fileobj=file, mode="rb"), 2**16),
    "xz": (lzma.LZMAFile, 2**16),
    "bzip2": (bz2.BZ2File, 2**16),
    "zstd": (lambda file: pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd"), 2**12),
}
