"""``reinforce init``: a commented config for the data that it looks at, which ``reinforce plan`` accepts as it is."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import schemas
from reinforce.config import Config, Input
from reinforce.engine.plan.source_shards import source_shards
from reinforce.engine.starter.fields import find_fields
from reinforce.engine.starter.template import render
from reinforce.errors import UserError
from reinforce.nodes import nodes_of_run
from reinforce.processes.cores import default_gpus
from reinforce.source.formats.base import Shard, SourceFormat
from reinforce.source.formats.folder import METADATA
from reinforce.source.formats.recognise import format_of_folder, format_of_name
from reinforce.source.formats.registry import all_formats
from reinforce.source.urls import Info, canonical, filesystem

_TRAIN = re.compile(r"(^|/)train[-_.0-9][^/]*$")


@dataclass(frozen=True)
class Starter:
    """A config as text, and lines about what was found."""

    text: str
    lines: Sequence[str]


def make_starter(data: str, config_path: Path) -> Starter:
    """Look at ``data``, and make the config that will be written to ``config_path``. Raises UserError."""
    source, notes = find_source(data)
    name = _name(data)
    output = f"{name}-reinforced"
    listed: dict[str, Info] = {}
    shards = source_shards(Config(source=source, output=output), listed)
    if not shards.urls:
        raise UserError(f"{canonical(data)} has no files. Check the folder.")
    first = shards.names[0].as_py()
    shard = Shard(shards.urls[0], first, shards.format.name, shards.lists.get(first, b""))
    fields = find_fields(shard, Input())
    gpu = bool(default_gpus(nodes_of_run()))
    sizes = [info.get("size") or 0 for info in listed.values()]
    found = _describe(len(shards.urls), shards.format, sum(sizes) if len(sizes) == len(shards.urls) else None)
    text = render(source, output, found, shards.format, fields, gpu, _schema_for(config_path), str(config_path))
    return Starter(text, [f"source: {found}", *fields.lines(), *notes, *shards.notes])


def find_source(data: str) -> tuple[str, list[str]]:
    """What `source` of a config is for a folder, a file or a pattern, and notes. Raises UserError."""
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
    files = sorted(file[len(path) + 1 :] for file in fs.find(path))
    by_format: dict[str, list[str]] = {}
    for file in files:
        kind = format_of_name(file)
        if kind is not None and file.rpartition("/")[2].lower() not in METADATA and not _is_hidden(file):
            by_format.setdefault(kind.name, []).append(file)
    found = next((by_format[one.name] for one in all_formats() if one.name in by_format), None)
    if found is None:
        return folder, []
    train = [file for file in found if _TRAIN.search(file)]
    chosen = train or found
    pattern = f"{folder if '://' in folder else glob.escape(folder)}/{_pattern(chosen, bool(train))}"
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


def _name(data: str) -> str:
    """A name for the dataset: the last part of the path that is no pattern, without the ending of a file."""
    parts = [part for part in re.split(r"[/:]+", data.rstrip("/")) if part and not re.search(r"[*?\[{]", part)]
    name = parts[-1] if parts else "data"
    if parts and format_of_name(name):
        name = name.partition(".")[0]
    if name in ("data", "shards", "train", "images", ".", "..") and len(parts) > 1:
        name = parts[-2]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "data"


def default_path(data: str) -> Path:
    """Where a config is written unless a path is given."""
    return Path(f"{_name(data)}.yaml")


def _describe(count: int, format_: SourceFormat, size: int | None) -> str:
    from reinforce.terminal import format_bytes

    what = format_.noun.removesuffix(" file")
    return f"{count:,} shard{'s' * (count > 1)} ({what}{'' if size is None else f', {format_bytes(size)}'})"


def _schema_for(config_path: Path) -> str:
    """Where the schema of the config is, relative to the config if both are in one checkout."""
    schema = Path(schemas.__file__).parent / "json" / "run.json"
    folder = config_path.absolute().parent
    return os.path.relpath(schema, folder) if folder.is_relative_to(schema.parents[2]) else str(schema)
