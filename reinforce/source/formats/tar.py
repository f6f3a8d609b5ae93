"""WebDataset tars. What cannot become a sample is yielded as a refusal with its reason."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from reinforce.source.config import Input, Limits
from reinforce.source.file_types import foreign_name, is_image_name, unread_heic
from reinforce.source.formats.base import Shard, SourceFormat
from reinforce.source.samples import (
    RawSample,
    ReadBudget,
    Refusal,
    T,
    as_utf8,
    refused_key,
    refused_rest,
    refusing_absent,
)
from reinforce.source.streams import DamagedTar, File, Member, Readable, members, open_stream
from reinforce.source.urls import COMPRESSIONS
from schemas import Reason

_META = re.compile(r"__[^/]*__(/|$)")
_LINK = " (a link)"
_PACKED_TABLE = re.compile(r"\.(jsonl|ndjson|csv|tsv|json)\.(bz2|xz|lz4|br|snappy|7z|zip)$")


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


def sample_of_files(key: str, files: Iterable[tuple[str, File]], limits: Limits) -> Iterator[RawSample | Refusal]:
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
    image: File | None = None
    image_extension: str = ""
    data: bytes | None = None  # None if above limits.image_bytes
    cut_off: bool = False
    sidecars: dict[str, bytes] = field(default_factory=dict)
    left_out: dict[str, Refusal] = field(default_factory=dict)

    def add(self, extension: str, member: File, limits: Limits) -> None:
        if extension in self.extensions:
            self.repeated = extension
            return
        if len(self.extensions) == limits.members:
            self.unread += 1
            return
        self.extensions.append(f"{extension}{_LINK}" if member.is_link else extension)
        is_image = is_image_name(extension)
        self.images += is_image
        if member.is_link:
            self._leave_out(extension, Reason.SIDECAR_BROKEN, "a link, which is not followed")
        elif is_image:
            if self.needs_image and (self.image is None or ("." in self.image_extension and "." not in extension)):
                self.image, self.image_extension = member, extension
                self.data, self.cut_off = _read(member, limits.image_bytes)
        else:
            data, cut_off = _read(member, limits.sidecar_bytes)
            if data is not None:
                self.sidecars[extension] = data
            elif not cut_off:  # a sidecar that is cut off is covered by the refusal for the damage
                detail = f"{member.size} bytes, above limits.sidecar_bytes of {limits.sidecar_bytes}"
                self._leave_out(extension, Reason.SIDECAR_BYTES, detail)

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
        key = as_utf8(self.key)
        if refusal := refused_key(key, limits, self.earlier is not None and not self.split):
            yield refusal
            return
        if self.split:
            yield Refusal(key, Reason.SPLIT_KEY, f"not next to the other members of the key: {self._listed()}")
            return
        yield self._sample(key, limits)
        if self.repeated is not None:
            detail = f"member .{as_utf8(self.repeated)[:100]} occurs twice; the first is kept"
            yield Refusal(key, Reason.DUPLICATE_KEY, detail)
        if self.unread:
            yield Refusal(key, Reason.MEMBERS, f"{self.unread} more than limits.members of {limits.members}, not read")
        if strays := self._strays():
            count, read, rest = 1 + sum(map(is_image_name, strays)), self.image_extension, ", .".join(strays)
            detail = f"{count} images, of which .{as_utf8(read)[:100]} is read, and not .{as_utf8(rest)[:300]}"
            yield Refusal(key, Reason.STRAY_MEMBERS, f"{detail}; a key ends at the first dot of the file name")

    def _strays(self) -> list[str]:
        """The extensions of images that are not read, and of sidecars that begin as these do."""
        if self.image is None or self.images < 2 or not self.names_strays:
            return []
        names = [name.removesuffix(_LINK) for name in self.extensions]
        images = [name for name in names if is_image_name(name)]
        own = _start(self.image_extension)
        starts = tuple({_start(name) for name in images} - {own, ""})
        return [
            name
            for name in names
            if (name in images and name != self.image_extension)
            or (name.startswith(starts) and not (own and name.startswith(own)))
        ]

    def _sample(self, key: str, limits: Limits) -> RawSample | Refusal:
        if not self.needs_image:
            return RawSample(key, b"", 0, 0, self.sidecars, self.left_out, members=self._members)
        if self.image is None:
            hint = unread_heic(self.extensions)
            return Refusal(key, Reason.NO_IMAGE, f"no image among: {self._listed()}" + (f"; {hint}" if hint else ""))
        if self.cut_off:
            return Refusal(key, Reason.IMAGE_BROKEN, "cut off where the shard is damaged")
        if self.data is None:
            detail = f"{self.image.size} bytes, above limits.image_bytes of {limits.image_bytes}"
            return Refusal(key, Reason.IMAGE_BYTES, detail)
        left_out = {**self._of_image(self.left_out), **self.left_out}
        of_image = self._of_image(self.sidecars)
        image = self.image
        place = (image.offset, image.size)
        return RawSample(key, self.data, *place, self.sidecars, left_out, of_image, self._members, url=image.url)

    def _of_image(self, sidecars: Mapping[str, T]) -> dict[str, T]:
        """The sidecars whose compound extension begins as the image's, by its last part where no other has that."""
        start = _start(self.image_extension)
        named = {name.removeprefix(start): value for name, value in sidecars.items() if name.startswith(start)}
        return {name: value for name, value in named.items() if name not in (*self.sidecars, *self.left_out)}

    def _leave_out(self, extension: str, reason: Reason, detail: str) -> None:
        self.left_out[extension] = Refusal(as_utf8(self.key), reason, f".{as_utf8(extension)}: {detail}")

    @property
    def _members(self) -> tuple[str, ...]:
        return tuple(map(as_utf8, self.extensions))

    def _listed(self) -> str:
        return ", ".join(self._members)[:200]


class _BoundedStream:
    """A stream that ends when its budget does."""

    def __init__(self, stream: Readable, budget: ReadBudget) -> None:
        self._stream, self._budget = stream, budget

    def read(self, size: int, /) -> bytes:
        data = self._stream.read(min(size, self._budget.left)) if self._budget.left else b""
        self._budget.left -= len(data)
        return data


class _KeyedMembers:
    """Iterates over the (key, extension, member) of a tar and collects its damage."""

    def __init__(self, stream: Readable, size: int | None) -> None:
        self._members = members(stream, size)
        self._damages: list[tuple[DamagedTar, str]] = []  # with the name of the member before
        self._last_name = ""

    def __iter__(self) -> Iterator[tuple[str, str, Member]]:
        for item in self._members:
            if isinstance(item, DamagedTar):
                self._damages.append((item, self._last_name))
                continue
            self._last_name = item.name
            key, extension = split_name(item.name)
            if key:
                yield key, extension, item

    def refusals(self) -> Iterator[Refusal]:
        """Yield a refusal for each damage; damage in a tar without any member makes the shard unreadable."""
        if self._damages and not self._last_name:
            yield Refusal(None, Reason.SHARD_UNREADABLE, self._damages[0][0].detail)
            return
        for damage, before in self._damages:
            name = as_utf8(before)[-200:]
            where = f"the member before it is {name!r}" if before else "no member comes before it"
            yield Refusal(None, Reason.SHARD_DAMAGED, f"{damage}; {where}")


def _start(extension: str) -> str:
    """A compound extension without its last part: ``v1.`` of ``v1.png``."""
    return extension[: extension.rfind(".") + 1]


def _read_tar(
    url: str, limits: Limits, images: bool = True, budget: ReadBudget | None = None
) -> Iterator[RawSample | Refusal]:
    complete: dict[bytes, bool] = {}  # by hash of the key: whether it made a complete sample
    split = 0
    with open_stream(url) as (stream, size):
        tar = _KeyedMembers(stream if budget is None else _BoundedStream(stream, budget), size)
        for key, run in itertools.groupby(tar, key=lambda item: item[0]):
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
    yield from tar.refusals()
    if 2 * split > len(complete):
        yield Refusal(
            None,
            Reason.SHARD_UNSORTED,
            f"the members of most of its {len(complete)} samples are not next to each other, as WebDataset needs them: "
            "unpack it, and pack it again with `tar --sort=name`",
        )


def _read(member: File, limit: int) -> tuple[bytes | None, bool]:
    """Return a member's data, or None if it is above the limit or cut off, and whether it is cut off."""
    try:
        return member.read(limit), False
    except DamagedTar:  # the same damage is reported again after this member
        return None, True


FORMAT = Tar()
