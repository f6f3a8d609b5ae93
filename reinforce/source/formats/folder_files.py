"""The files of a folder that are a source: a pattern for its tars, tables or lines."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence

from reinforce.errors import UserError
from reinforce.source.file_types import MANIFEST, METADATA, foreign_name, is_image_name
from reinforce.source.formats.recognise import format_of_folder, format_of_name
from reinforce.source.formats.registry import all_formats
from reinforce.source.urls import canonical, filesystem
from reinforce.source.whole_reads import list_whole

_TRAIN = re.compile(r"(^|/)train[-_.0-9][^/]*$")
_NO_FOLDER = re.compile(r"[*?\[{]|::|^https?://|\.txt\Z", re.IGNORECASE)


def expand_folders(source: str | Sequence[str], named: str | None) -> tuple[list[str], list[str]]:
    """Entries of ``source`` where a folder of tars, tables or lines is a pattern for its files, and notes.

    A folder with images is one of images, whatever else is in it. ``named`` is the format that the config names, if
    any. Raises UserError.
    """
    entries, notes = [], []
    for entry in [source] if isinstance(source, str) else source:
        is_path = not _NO_FOLDER.search(entry) and format_of_name(entry) is None and foreign_name(entry) is None
        expanded, found = files_of_folder(entry, named, images_first=True) if is_path else (entry, [])
        entries.append(expanded)
        notes += found
    return entries, notes


def files_of_folder(data: str, named: str | None = None, images_first: bool = False) -> tuple[str, list[str]]:
    """What `source` of a config is for a folder, a file or a pattern, and notes. Raises UserError.

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
