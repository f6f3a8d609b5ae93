"""The content of a source shard, recognised by its size and its first bytes, and shards whose folder has moved."""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from fsspec.implementations.local import LocalFileSystem

from reinforce.errors import UserError
from reinforce.source.samples import DamagedTar
from reinforce.source.urls import (
    BLOCK_BYTES,
    Info,
    canonical,
    check_file,
    compression,
    digest_of,
    filesystem,
    open_whole,
    read_up_to,
)
from reinforce.terminal import escape
from schemas import Reason

_HEAD_BYTES = 64 * 2**10  # holds the headers of the first members, and most of the first image
_STAMPS = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified")


@dataclass(frozen=True)
class SourceState:
    """Identity of a source file's content without reading all of it; None where it is unknown.

    Attributes:
        bytes: size of the file.
        head: hash of its first 64 KiB.
        stamp: its ETag or modification time. It changes when a file is copied, so it is not part of its content.
    """

    bytes: int | None
    head: str | None
    stamp: str | None = None

    @classmethod
    def from_footer(cls, footer: Mapping[str, str]) -> SourceState:
        """Read the state from the footer of a layer file; None for what it does not record."""
        size = footer.get("source_bytes")
        return cls(int(size) if size and size.isdecimal() else None, footer.get("source_head"))

    def footer(self) -> dict[str, str]:
        """The entries for the footer of a samples file: functions of the content alone."""
        entries = {"source_bytes": self.bytes, "source_head": self.head}
        return {key: str(value) for key, value in entries.items() if value is not None}

    def same_content(self, other: SourceState) -> bool | None:
        """Whether two files have the same content; None if that is unknown."""
        if None not in (self.bytes, other.bytes) and self.bytes != other.bytes:
            return False
        return None if self.head is None or other.head is None else self.head == other.head

    def describe_change(self, now: SourceState) -> str:
        """Differences of the state ``now``, as text."""
        if self.bytes != now.bytes and None not in (self.bytes, now.bytes):
            return f"{self.bytes:,} bytes then, {now.bytes:,} now"
        return "its first 64 KiB differ" if self.head != now.head else f"{self.stamp} then, {now.stamp} now"


class ChangedSource(Exception):
    """A source file has changed while it was read."""


class OpenedStates:
    """The state of a source file each time that it was opened, before its bytes were read; for ``watching_opened``.

    Where opening a file shows neither an ETag nor a modification time, its first bytes are read. They cost no request
    where the file is read from its beginning.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._fs, self._path = filesystem(url)
        self._fs.invalidate_cache(self._path)  # a listing of before
        self.states: list[SourceState] = []

    def __call__(self, fs: Any, path: str, file: Any = None, info: Info | None = None) -> None:
        if path != self._path:
            return
        if isinstance(fs, LocalFileSystem):
            with contextlib.nullcontext(file) if file is not None else open(path, "rb") as opened:
                number = opened.fileno()
                state = replace(_local_state(os.fstat(number)), head=_hash(os.pread(number, _HEAD_BYTES, 0)))
        else:
            state = listed_state(info or getattr(file, "details", None) or fs.info(path))
            if state.stamp is None:
                if getattr(file, "size", None) is None:  # a stream, which cannot go back
                    with fs.open(path, "rb") as other:
                        head = read_up_to(other, _HEAD_BYTES)
                else:
                    head = read_up_to(file, _HEAD_BYTES)
                    file.seek(0)
                state = replace(state, head=_hash(head))
        self.states.append(state)

    def check(self, now: SourceState) -> None:
        """Raise ChangedSource if the file, which is ``now`` in this state, had another when it was opened."""
        if self.states and isinstance(self._fs, LocalFileSystem):
            now = replace(now, stamp=_local_state(os.stat(self._path)).stamp)
        for before in self.states:
            touched = None not in (before.stamp, now.stamp) and before.stamp != now.stamp
            if touched or before.same_content(now) is False:
                raise ChangedSource(
                    f"{canonical(self._url)} has changed while it was read: {before.describe_change(now)}. It is read "
                    "again, up to failures.attempts times. A program that still writes to it must end first."
                )


def read_state(url: str) -> SourceState:
    """Read the state of a source file with one request for its first bytes. Raises what the storage raises."""
    fs, path = filesystem(url)
    with open_whole(fs, path, block_size=_HEAD_BYTES, cache_type="none") as file:
        return replace(
            listed_state(getattr(file, "details", None) or fs.info(path)), head=_hash(read_up_to(file, _HEAD_BYTES))
        )


def _local_state(found: os.stat_result) -> SourceState:
    """The state of a local file itself, where that of a listing is of the link to it."""
    return SourceState(found.st_size, None, f"mtime={found.st_mtime}")


def _hash(head: bytes) -> str:
    return hashlib.blake2b(head, digest_size=8).hexdigest()


def listed_state(info: Info) -> SourceState:
    """The state of a file as a file system lists it, without its content."""
    stamp = next((f"{key}={info[key]}" for key in _STAMPS if info.get(key)), None)
    return SourceState(info.get("size"), None, stamp)


def probe_state(url: str) -> SourceState | None:
    """Read the state of a source file; None if it cannot be read."""
    try:
        fs, path = filesystem(url)
        if isinstance(fs, LocalFileSystem) and not os.path.isfile(path):  # opening a pipe would block
            return None
        return read_state(url)
    except Exception:  # each driver has its own exceptions; reading the whole file reports them
        return None


def former_url(url: str, moved: Mapping[str, str]) -> str:
    """The canonical URL that a shard is named after. ``moved`` maps folders to where their files were before."""
    return _replace_folder(canonical(url), _folders(moved))[1]


def former_urls(urls: Sequence[str], moved: Mapping[str, str]) -> list[str]:
    """:func:`former_url` of each URL. Raises UserError for a folder that no URL is in."""
    if not moved:
        return list(urls)
    folders = _folders(moved)
    found = [_replace_folder(canonical(url), folders) for url in urls]
    unused = folders.keys() - {folder for folder, _ in found}
    if unused:
        raise UserError(f"moved: no shard of `source` is in {min(unused)}. Correct the folder or remove it.")
    return [place for _, place in found]


def current_url(url: str, moved: Mapping[str, str]) -> str:
    """The present place of a file that was at the canonical ``url`` when the dataset was made."""
    return _replace_folder(url, {old: new for new, old in _folders(moved).items()})[1]


def moved_folders(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The value of ``moved`` for pairs of (URL now, URL before): their folders without the common end."""
    folders = {}
    for now, before in pairs:
        new, old = (canonical(url).split("/") for url in (now, before))
        while len(new) > 1 and len(old) > 1 and new[-1] == old[-1] and new[-2:-1] != [""] != old[-2:-1]:
            new.pop()
            old.pop()
        folders["/".join(new)] = "/".join(old)
    return folders


def _folders(moved: Mapping[str, str]) -> dict[str, str]:
    return {canonical(new).rstrip("/"): canonical(old).rstrip("/") for new, old in moved.items()}


def _replace_folder(url: str, folders: Mapping[str, str]) -> tuple[str | None, str]:
    """The longest of the folders that the URL is in, and the URL with what that one stands for."""
    folder = max((one for one in folders if url.startswith(f"{one}/")), key=len, default=None)
    return folder, url if folder is None else folders[folder] + url[len(folder) :]


#: Schemes of references, besides paths of local files. Others can read anything, such as ``reference://``.
SCHEMES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf", "hdfs", "https", "http")
MAX_URL_CHARS = 4096
_MAX_OFFSET = 2**50
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_ESCAPED = re.compile(r"\\|%2e|%2f|%5c", re.IGNORECASE)  # of a path's separators and folders, in a web address


@dataclass(frozen=True)
class ImageRoots:
    """Folders and files, as canonical URLs, that references of images may name.

    A reference is a URL from a Parquet file. Who makes a dataset could name any file of its reader and any address in
    the reader's network, so it is followed only into folders that the reader has named.
    ``key`` is how a user names a folder, for messages: a text with ``{}``. ``max_bytes`` bounds an image. ``own`` is a
    URL of the user's config, which may be any.
    """

    urls: tuple[str, ...] = ()
    key: str = 'images_from=["{}"]'
    max_bytes: int = 2**28
    own: str | None = None

    @classmethod
    def of_shard(cls, url: str, max_bytes: int) -> ImageRoots:
        """A shard of the user's own ``source``, and nothing else."""
        return cls((), "it to `source`", max_bytes, canonical(url))

    @classmethod
    def named(cls, urls: str | Iterable[str], key: str, max_bytes: int = 2**28) -> ImageRoots:
        """The folders that a user has named. Raises UserError for one that would allow everything."""
        roots = []
        for url in [urls] if isinstance(urls, str) else urls:
            root = canonical(url)
            if "::" in url or not root.partition("://")[2 if "://" in root else 0].strip("/"):
                raise UserError(f"{key.partition('=')[0].partition(':')[0]}: {url!r} is no folder. Name one.")
            roots.append(root.rstrip("/"))
        return cls(tuple(roots), key, max_bytes)

    def holds(self, url: str) -> bool:
        """Whether a canonical URL is one of these folders and files, or is in one of the folders."""
        return any(url == root or url.startswith(f"{root}/") for root in self.urls)

    def check(self, url: str) -> str:
        """Return a URL that may be read. Raises UserError, which names the folder to add if that would allow it."""
        if url == self.own:
            return url
        shown = escape(url[:200])
        if fault := _fault(url):
            raise UserError(f"an image is stored by reference to {shown}, which is not followed: {fault}.")
        if not self.holds(url):
            folder = escape(url.rpartition("/")[0])
            raise UserError(
                f"an image is stored by reference to {shown}, which is in no folder that you have allowed. If the tars "
                f"there are yours, or you trust who made the dataset, add {self.key.format(folder)}."
            )
        return url

    def ranges(
        self, references: Sequence[Mapping[str, Any]], moved: Mapping[str, str] | None = None
    ) -> list[tuple[str, int, int]]:
        """URL, offset and length of each reference; raises as ``check``, and for impossible numbers."""
        checked: dict[str, str] = {}
        found = []
        for reference in references:
            url, offset, length = (reference[name] for name in ("url", "offset", "length"))
            if url not in checked:
                checked[url] = self.check(current_url(url, moved) if moved else url)
            if not 0 <= offset <= _MAX_OFFSET or not 0 < length <= self.max_bytes:
                raise UserError(
                    f"an image is stored by reference to {length:,} bytes at {offset:,} of {escape(url[:200])}; at "
                    f"most {self.max_bytes:,} bytes of an image are read."
                )
            found.append((checked[url], offset, length))
        return found


class ChangedImages(UserError):
    """Images that are stored by reference have changed since the samples were written."""

    def __init__(self, changed: int, total: int, url: str) -> None:
        self._what = (
            f"{changed:,} of {total:,} images that were read are not those that were in {escape(url[:200])} when the "
            "samples were written: the file was replaced"
        )
        super().__init__(self.describe("reinforce drop DATASET samples --shard NAME"))

    def describe(self, drop: str) -> str:
        """The message; ``drop`` is the command that sets the samples of the shard aside."""
        return (
            f"{self._what}. Restore it, or drop the samples by {drop} --yes and run again, which computes the other "
            "layers of the shard again, too."
        )


@dataclass(frozen=True)
class LostImage:
    """Why an image by reference is not the one that the samples were made of."""

    reason: Reason
    detail: str


def images_or_losses(
    ranges: Sequence[tuple[str, int, int]], digests: Iterable[int | None], there: bool = False
) -> Iterator[bytes | LostImage]:
    """Yield the image at each (URL, offset, length), or why it is lost: its file, or a part of it, does not exist, or
    it does not have its digest. Consecutive images of one URL are read sequentially.

    If all must be ``there``, what ``read_ranges`` raises for one that does not exist is raised.
    """
    for url, group in itertools.groupby(zip(ranges, digests, strict=True), key=lambda row: row[0][0]):
        part = [(place, digest) for (_, *place), digest in group]
        done = 0
        try:
            for image in read_ranges(url, ((offset, length) for (offset, length), _ in part)):
                digest, done = part[done][1], done + 1
                if digest is None or digest_of(image) == digest:
                    yield image
                else:
                    yield LostImage(Reason.IMAGE_BROKEN, "another image than when the samples were written")
        except (DamagedTar, FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            if there:
                raise
            yield from [LostImage(Reason.IMAGE_MISSING, f"{url[:500]}: {error}")] * (len(part) - done)


def images_of_group(
    references: Sequence[Mapping[str, Any]],
    roots: ImageRoots,
    moved: Mapping[str, str] | None = None,
    digests: Sequence[int | None] | None = None,
    tolerated: float = 0.5,
) -> Iterator[bytes | LostImage]:
    """Yield the images of one row group as ``referenced_images`` does, where single ones may be lost.

    Where more than the share ``tolerated`` of them are, the source was replaced or is not there: raises ChangedImages,
    or FileNotFoundError; where none is tolerated, what ``read_ranges`` raises.
    """
    found = images_or_losses(roots.ranges(references, moved), digests or [None] * len(references), not tolerated)
    for number, image in enumerate(found):
        if isinstance(image, LostImage):
            rest = [image, *found]
            lost = [one for one in rest if isinstance(one, LostImage)]
            if len(lost) > tolerated * len(references):
                if all(one.reason is Reason.IMAGE_MISSING for one in lost):
                    raise FileNotFoundError(image.detail)
                raise ChangedImages(len(lost), len(references), references[number]["url"])
            yield from rest
            return
        yield image


def _fault(url: str) -> str | None:
    """Why a URL is not one that a run writes, or None."""
    scheme, remote, rest = url.partition("://")
    if len(url) > MAX_URL_CHARS:
        return f"it has more than {MAX_URL_CHARS:,} characters"
    if "::" in url:
        return "it chains file systems"
    if remote and scheme not in SCHEMES:
        return f"only local files and {', '.join(SCHEMES)} are"
    web = scheme in ("http", "https")
    folders = {*rest.split("/")} if remote else set()
    if canonical(url) != url or {".", ".."} & folders or _CONTROL.search(url) or (web and _ESCAPED.search(url)):
        return "it is not in the form in which runs write URLs"
    if web:
        with contextlib.suppress(ValueError):  # a name and no number of an address, such as that of a cloud's metadata
            if ipaddress.ip_address(urlsplit(url).hostname or "").is_link_local:
                return "it is a link-local address"
    return None


def read_ranges(url: str, ranges: Iterable[tuple[int, int]]) -> Iterator[bytes]:
    """Yield the bytes at each (offset, length) of an uncompressed tar; the ranges must be in ascending order.

    Requests read ahead by 8 MiB, so that neighbouring ranges share them. Web servers cannot redirect
    them. Raises DamagedTar where the file ends before a range does, and what the storage raises, or OSError where it
    sends less than there is.
    """
    if compression(url):
        raise UserError(f"{canonical(url)}: images cannot be read by reference from a compressed tar. Unpack it.")
    fs, path = filesystem(url, redirects=False)
    check_file(fs, path)
    with open_whole(fs, path, block_size=BLOCK_BYTES, cache_type="readahead") as file:
        for offset, length in ranges:
            file.seek(offset)
            data = read_up_to(file, length)
            if len(data) < length:
                if offset + length <= (getattr(file, "size", None) or 0):
                    raise OSError(f"{canonical(url)}: the storage sent {len(data)} of {length} bytes at {offset}")
                raise DamagedTar(offset + len(data), f"the file ends inside the {length} bytes at {offset}")
            yield data


def referenced_images(
    references: Sequence[Mapping[str, Any]], roots: ImageRoots, digests: Sequence[int | None] | None = None
) -> Iterator[bytes]:
    """Yield the images of one row group from their tars; consecutive rows of one URL are read sequentially.

    Images with a known one of ``digests`` are checked. Raises UserError before anything is read if a reference is
    outside ``roots``, and ChangedImages; before that, the remaining images are read, so that the error has their
    number.
    """
    return images_of_group(references, roots, digests=digests, tolerated=0)  # type: ignore[return-value]
