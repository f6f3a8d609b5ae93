"""The content of a source shard, recognised by its size and its first bytes, and shards whose folder has moved."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from reinforce.errors import UserError
from reinforce.source.urls import Info, canonical, filesystem
from reinforce.source.whole_reads import open_whole, read_up_to

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
        """Read the state from the footer of a samples file. Files of earlier versions do not have it."""
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
            state = listed_state(info or _listed(fs, path, file))
            if state.stamp is None:
                state = replace(state, head=_hash(_first_bytes(fs, path, file)))
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
        return replace(listed_state(_listed(fs, path, file)), head=_hash(read_up_to(file, _HEAD_BYTES)))


def _listed(fs: Any, path: str, file: Any) -> Info:
    info: Info = getattr(file, "details", None) or fs.info(path)
    return info


def _local_state(found: os.stat_result) -> SourceState:
    """The state of a local file itself, where that of a listing is of the link to it."""
    return SourceState(found.st_size, None, f"mtime={found.st_mtime}")


def _first_bytes(fs: Any, path: str, file: Any) -> bytes:
    """The first bytes of a file; an open one stays at its beginning."""
    if getattr(file, "size", None) is None:  # a stream, which cannot go back
        with fs.open(path, "rb") as other:
            return read_up_to(other, _HEAD_BYTES)
    data = read_up_to(file, _HEAD_BYTES)
    file.seek(0)
    return data


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
    return _replace_folder(canonical(url), _folders(moved))


def former_urls(urls: Sequence[str], moved: Mapping[str, str]) -> list[str]:
    """:func:`former_url` of each URL. Raises UserError for a folder that no URL is in."""
    if not moved:
        return list(urls)
    folders = _folders(moved)
    places = [canonical(url) for url in urls]
    unused = folders.keys() - {_folder_of(place, folders) for place in places}
    if unused:
        raise UserError(f"moved: no shard of `source` is in {min(unused)}. Correct the folder or remove it.")
    return [_replace_folder(place, folders) for place in places]


def current_url(url: str, moved: Mapping[str, str]) -> str:
    """The present place of a file that was at the canonical ``url`` when the dataset was made."""
    return _replace_folder(url, {old: new for new, old in _folders(moved).items()})


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


def _replace_folder(url: str, folders: Mapping[str, str]) -> str:
    folder = _folder_of(url, folders)
    return url if folder is None else folders[folder] + url[len(folder) :]


def _folder_of(url: str, folders: Mapping[str, str]) -> str | None:
    """The longest of the folders that the URL is in."""
    found = (folder for folder in folders if url.startswith(f"{folder}/"))
    return max(found, key=len, default=None)
