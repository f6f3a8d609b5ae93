"""The format of a source: named by the config, else recognised by the names of its files, else by the first file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reinforce.source.file_types import foreign_name
from reinforce.source.formats.base import SourceFormat
from reinforce.source.formats.registry import all_formats, find_format
from reinforce.source.urls import filesystem
from reinforce.source_formats import DEFAULT

_FIRST_BYTES = 512


def source_format(urls: Sequence[str], named: str | None) -> SourceFormat:
    """The format of all files of a source."""
    if named is not None:
        return find_format(named)
    known = all_formats()
    first = None
    for url in urls:
        found = format_of_name(url, known)
        if found and found.prevails:
            return found
        first = first or found
    return first or _format_of_content(urls[0])


def format_of_name(url: str, known: Sequence[SourceFormat] | None = None) -> SourceFormat | None:
    """The format that a file has by its name, or None. ``known`` are the formats, if the caller has them."""
    name = _name(url)
    return next((one for one in known or all_formats() if name.endswith(one.endings)), None)


def unexpected_name(url: str, format_: SourceFormat) -> str | None:
    """What a file is and the remedy, if its name is that of another format."""
    if not format_.endings or _name(url).endswith((*format_.endings, *format_.other_endings)):
        return None
    found = None if format_.prevails else format_of_name(url)
    return format_.foreign(url) if found is None else f"a {found.noun} by its name, not a {format_.noun}"


def format_of_folder(fs: Any, path: str) -> SourceFormat | None:
    """The format that a folder has as a whole, or None. Raises the errors of the storage."""
    # A later format is a more special one: a reinforced dataset is a folder, too.
    return next((one for one in reversed(all_formats()) if one.recognises_folder(fs, path)), None)


def _name(url: str) -> str:
    return url.partition("?")[0].rpartition("/")[2].lower()


def _format_of_content(url: str) -> SourceFormat:
    """The format of a file or folder by its content; the default if it is not recognised or cannot be read."""
    found, foreign = None, foreign_name(url) is not None
    known = [one for one in all_formats() if not foreign or _name(url).endswith(one.content_endings)]
    if known:
        try:
            fs, path = filesystem(url)
            if fs.isfile(path):
                head = fs.read_block(path, 0, _FIRST_BYTES)
                found = next((one for one in known if one.recognises(head)), None)
            elif fs.isdir(path) and not foreign:
                found = format_of_folder(fs, path.rstrip("/"))
        except Exception:  # each driver has its own exceptions; reading reports them
            found = None
    return found or find_format(DEFAULT)
