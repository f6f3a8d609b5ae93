"""The format of a source, by the config, the names of its files or the first file; and the files of a folder."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from reinforce.errors import UserError
from reinforce.input_config import DEFAULT, MODULES
from reinforce.source.file_types import MANIFEST, METADATA, foreign_name, is_image_name
from reinforce.source.formats.base import SourceFormat
from reinforce.source.urls import canonical, filesystem
from reinforce.source.whole_reads import list_whole

_FIRST_BYTES = 512
_TRAIN = re.compile(r"(^|/)train[-_.0-9][^/]*$")
_NO_FOLDER = re.compile(r"[*?\[{]|::|^https?://|\.txt\Z", re.IGNORECASE)


def find_format(name: str) -> SourceFormat:
    found: SourceFormat = import_module(MODULES[name]).FORMAT
    return found


def all_formats() -> list[SourceFormat]:
    """Every format, in the order of the registry."""
    return [find_format(name) for name in MODULES]


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
    """The format that a file's name suggests, and the fix, if it is another format."""
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


def expand_folders(source: str | Sequence[str], named: str | None) -> tuple[list[str], list[str]]:
    """Entries of ``source`` where a folder of tars, tables or lines is a pattern for its files, and notes.

    A folder with images is one of images, also with other files in it. ``named`` is the format that the config names,
    if any. Raises UserError.
    """
    entries, notes = [], []
    for entry in [source] if isinstance(source, str) else source:
        is_path = not _NO_FOLDER.search(entry) and format_of_name(entry) is None and foreign_name(entry) is None
        expanded, found = files_of_folder(entry, named, images_first=True) if is_path else (entry, [])
        entries.append(expanded)
        notes += found
    return entries, notes


def files_of_folder(data: str, named: str | None = None, images_first: bool = False) -> tuple[str, list[str]]:
    """The `source` of a config for a folder, a file or a pattern, and notes. Raises UserError.

    ``named`` restricts it to the files of one format. With ``images_first``, a folder with images remains what it is.
    """
    fs, path = filesystem(data)
    try:
        is_folder = fs.isdir(path)
    except Exception as error:  # each driver has its own exceptions
        raise UserError(f"{canonical(data)} cannot be read: {type(error).__name__}: {error}.") from error
    if not is_folder:
        return data, []
    folder, path = data.rstrip("/"), path.rstrip("/")
    whole = format_of_folder(fs, path)
    if whole and not whole.is_listed:
        return folder, []
    files = sorted(file[len(path) + 1 :] for file in list_whole(lambda: fs.find(path)))
    inner = [file.removesuffix(MANIFEST) for file in files if file.endswith(f"/{MANIFEST}")]
    by_format: dict[str, list[str]] = {}
    for file in files:
        name = file.rpartition("/")[2].lower()
        if _is_hidden(file) or name in METADATA or file.startswith(tuple(inner)):
            continue
        if whole and images_first and is_image_name(name):
            return folder, []
        kind = format_of_name(file)
        if kind is not None and named in (None, kind.name):
            by_format.setdefault(kind.name, []).append(file)
    found = next((by_format[one.name] for one in all_formats() if one.name in by_format), None)
    if found is None:
        return folder, []
    train = [file for file in found if _TRAIN.search(file)]
    chosen = train or found
    pattern = f"{folder if '://' in folder else glob.escape(folder)}/{_pattern(chosen, bool(train))}"
    if inner and "**" in pattern:
        raise UserError(
            f"source: {canonical(folder)} has a reinforced dataset in it, {inner[0].rstrip('/')}. Name the files "
            "of the source by patterns, such as FOLDER/*.parquet."
        )
    left = len(found) - len(chosen)
    notes = [f"files of other splits than `train` are left out: {left:,}; `source` can name them"] if left else []
    return pattern, notes


def _pattern(files: Sequence[str], train: bool) -> str:
    """A glob for files, by their paths in a folder: in one folder or at any depth."""
    folders = {file.rpartition("/")[0] for file in files}
    ending = _common_ending([file.rpartition("/")[2] for file in files])
    name = f"{'train' if train else ''}*{ending}"
    only = next(iter(folders)) if len(folders) == 1 else None
    if only is None:
        return f"**/{name}"
    return f"{glob.escape(only)}/{name}" if only else name


def _common_ending(names: Sequence[str]) -> str:
    """The extensions that all names have, such as ``.tar`` or ``.jsonl.gz``; ``.tar*`` if they differ."""
    endings = {
        "." + ".".join(name.split(".")[-2:]) if name.count(".") > 1 and _is_packed(name) else os.path.splitext(name)[1]
        for name in names
    }
    if len(endings) == 1:
        return next(iter(endings))
    first = min(endings, key=len)
    return f"{first}*" if all(ending.startswith(first) for ending in endings) else ".*"


def _is_packed(name: str) -> bool:
    return name.rpartition(".")[2] in ("gz", "xz", "bz2", "zst", "zstd")


def _is_hidden(file: str) -> bool:
    return any(part.startswith((".", "_")) for part in file.split("/"))
