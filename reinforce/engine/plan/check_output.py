"""A dataset is not written where a run reads its source: its files would be taken for those of the source."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import PurePath, PurePosixPath

from fsspec.implementations.local import LocalFileSystem

from reinforce.config import Config
from reinforce.dataset.files.store import Store
from reinforce.dataset.manifest.manifest import find_manifest
from reinforce.errors import UserError
from reinforce.source.formats.recognise import find_format
from reinforce.source.urls import canonical, expand, expand_braces, filesystem, has_glob

_SPECIAL = re.compile(r"[*?\[{]")
_WRITTEN = ("parquet", "json", "jsonl")
_SAME = "is the same as"


def check_output(config: Config) -> None:
    """Raise UserError if ``output`` is, contains, or is in what the config names to be read.

    A dataset that was made inside or around its source, as earlier versions allowed, may be continued.
    """
    for relation, read in overlaps(config):
        if relation == _SAME or find_manifest(Store(config.output)) is None:
            raise UserError(
                f"output: {canonical(config.output)} {relation} {read}, so that a run would write among the files that "
                "it reads. Set `output` to a folder that is neither in nor above them."
            )


def overlaps(config: Config) -> Iterator[tuple[str, str]]:
    """How ``output`` overlaps each entry of the config that it is not apart from, in words, and the entry after its
    key."""
    output = _place(config.output)
    for key, entry in _named(config):
        relation = next(filter(None, (_relation(output, url) for url in _urls_of(entry, output))), None)
        if relation is not None:
            yield relation, f"{key} {canonical(entry)}"


def _named(config: Config) -> Iterator[tuple[str, str]]:
    """Each key of a config that names what is read, and an entry of it."""
    for key, value in (("source", config.source), ("reinforcements", config.reinforcements)):
        for entry in [value] if isinstance(value, str) else value or ():
            yield key, entry.strip()
    for name, labels in config.labels.items():
        yield f"labels.{name}.url", labels.url


def _urls_of(entry: str, output: PurePath) -> Iterator[str]:
    """The URLs and patterns that an entry stands for; the entry itself where none of them can be in ``output``."""
    folder = _SPECIAL.split(entry, maxsplit=1)[0].rpartition("/")[0]
    if entry.partition("?")[0].endswith(".txt"):
        yield from _decisive(expand(entry, None, find_format("csv").recognises), output)
    elif "{" in entry and (folder.endswith(":/") or _overlap(_place(folder or "."), output)):
        yield from _decisive(expand_braces(entry, entry), output)
    else:
        yield entry


def _decisive(urls: Iterable[str], output: PurePath) -> Iterator[str]:
    """One URL of each folder, as they are in ``output`` together, and those that may be a folder above it by name."""
    folders, names = set(), {*output.parts}
    for url in urls:
        folder, _, name = url.rstrip("/").rpartition("/")
        if folder not in folders or name in names or "**" in name:
            folders.add(folder)
            yield url


def _relation(output: PurePath, url: str) -> str | None:
    """How the place of a dataset overlaps a URL or pattern that is read, in words; None if they are apart."""
    read = _place(url)
    patterns = next((n for n, part in enumerate(read.parts) if has_glob(url) and has_glob(part)), None)
    if patterns is not None:
        if PurePosixPath(*read.parts[:patterns]).is_relative_to(output):
            return "contains the files of"
        return "is among the files of" if _matches_inside(read.parts, output.parts) else None
    if output == read:
        return _SAME
    if output.is_relative_to(read):
        return "is inside"
    return "contains" if read.is_relative_to(output) else None


def _overlap(one: PurePath, other: PurePath) -> bool:
    return one.is_relative_to(other) or other.is_relative_to(one)


def _matches_inside(pattern: Sequence[str], folder: Sequence[str]) -> bool:
    """Whether a pattern can match files of a dataset in a folder; both are the parts of paths."""
    for n, name in enumerate(folder):
        if n < len(pattern) and "**" in pattern[n]:
            return True
        if n >= len(pattern) - 1 or not fnmatchcase(name, pattern[n]):
            return False
    extension = pattern[-1].rpartition(".")[2]
    return has_glob(extension) or extension in _WRITTEN


def _place(url: str) -> PurePath:
    """Protocol and path of a URL or pattern, without links of local disks."""
    fs, path = filesystem(canonical(url).rpartition("::")[2])
    if isinstance(fs, LocalFileSystem):
        return PurePosixPath(os.path.realpath(path))
    protocol = fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0]
    return PurePosixPath(f"{protocol}://{path.strip('/')}")
