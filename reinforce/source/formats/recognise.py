"""The format of a source: named by the config, else recognised by the names of its files, else by the first file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from glob import escape
from typing import Any

from reinforce.source.file_types import DATASET, ENDINGS, FOLDER, JSONL, MANIFEST, PARQUET, TAR, foreign_name
from reinforce.source.urls import COMPRESSIONS, filesystem

_FIRST_BYTES = 512
_PACKED_TABLE = re.compile(r"\.(jsonl|ndjson|csv|tsv|json)\.(bz2|xz|lz4|br|snappy|7z|zip)$")
_LINES_OF_JSON = re.compile(r"\.json(\.(gz|zst|zstd))?$")  # such as Dataset.to_json writes, if the config says so


def source_format(urls: Sequence[str], named: str | None) -> str:
    """The format of all files of a source.

    If any file is a tar by its name, all are read as tars, such as those of img2dataset next to its Parquet files.
    """
    if named is not None:
        return named
    first = None
    for url in urls:
        found = format_of_name(url)
        if found == TAR:
            return TAR
        first = first or found
    return first or _format_of_content(urls[0])


def format_of_name(url: str) -> str | None:
    """The format that a file has by its name, or None."""
    name = _name(url)
    if name.endswith((".tar", *COMPRESSIONS)):
        return TAR
    return next((format_ for format_, endings in ENDINGS.items() if name.endswith(endings)), None)


def unexpected_name(url: str, format_: str) -> str | None:
    """What a file is and the remedy, if its name is that of another format than ``format_``."""
    if format_ == TAR and _PACKED_TABLE.search(_name(url)):
        return "a table with a compression that is not read: store it as it is, or as .gz or .zst"
    if format_ == TAR:
        return foreign_name(url)
    if format_ == JSONL and _LINES_OF_JSON.search(_name(url)):
        return None
    if format_ not in ENDINGS:
        return None
    found = format_of_name(url)
    if found is None:
        kind = foreign_name(url)
        return None if kind is None else f"{kind.partition(',')[0]}, not a {format_} file"
    return None if found == format_ else f"a {found} file by its name, not a {format_} file"


def _name(url: str) -> str:
    return url.partition("?")[0].rpartition("/")[2].lower()


def _format_of_content(url: str) -> str:
    """The format of a file or folder by what it holds; tar where nothing is recognised or nothing can be read."""
    if foreign_name(url) is not None:
        return TAR
    try:
        fs, path = filesystem(url)
        if fs.isfile(path):
            return _format_of_bytes(fs.read_block(path, 0, _FIRST_BYTES))
        return _format_of_folder(fs, path.rstrip("/")) if fs.isdir(path) else TAR
    except Exception:  # each driver has its own exceptions; whoever reads the file reports them
        return TAR


def _format_of_folder(fs: Any, path: str) -> str:
    if fs.isfile(f"{path}/{MANIFEST}"):
        return DATASET
    return TAR if fs.glob(f"{escape(path)}/*.tar*") else FOLDER


def _format_of_bytes(head: bytes) -> str:
    if head.startswith(b"PAR1"):
        return PARQUET
    return JSONL if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{") else TAR
