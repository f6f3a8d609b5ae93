"""``reinforce init``: a commented config for the data that it looks at, which ``reinforce plan`` accepts as it is."""

from __future__ import annotations

import glob
import json
import os
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import schemas
from reinforce.config import Config
from reinforce.engine.plan.check_output import overlaps
from reinforce.engine.plan.source_shards import source_shards
from reinforce.engine.starter.fields import CLASS_TEXTS, Fields, class_folders, find_fields, first_folders
from reinforce.errors import UserError
from reinforce.input_config import Input
from reinforce.markup import render_markdown
from reinforce.parallel.machines import nodes_of_run
from reinforce.processes.cores import default_gpus
from reinforce.settings import load_yaml
from reinforce.source.formats.base import Shard, SourceFormat
from reinforce.source.formats.folder import folders_of_one_class
from reinforce.source.formats.recognise import files_of_folder, format_of_name
from reinforce.source.urls import Info, canonical, filesystem
from reinforce.terminal import format_bytes, plural

_UNMADE = "none"  # folder of an output in which there is no dataset
#: Names of files with captions of images elsewhere, in a folder of images.
_CAPTIONS = ("captions.txt", "captions.csv", "captions*.json", "*/captions.txt", "*/captions*.json")
_PLAIN = re.compile(r"[A-Za-z0-9_./-][A-Za-z0-9_./*-]*(://[A-Za-z0-9_./*-]+)?")


def make_starter(data: str, config_path: Path) -> tuple[str, list[str]]:
    """Look at ``data`` -> the text of the config that will be written to ``config_path``, and lines about the data.

    Raises UserError.
    """
    output = f"{_name(data)}-reinforced"
    look = look_at(data, output)
    gpu = bool(default_gpus(nodes_of_run()))
    schema = _schema_for(config_path)
    output = _apart_from(look.source, output)
    text = render(look, output, gpu, schema, str(config_path))
    return text, [f"source: {look.found}", *look.fields.lines(), *look.notes]


def look_at(data: str, output: str) -> Look:
    """What ``data`` is as the source of a run that writes to ``output``. Raises UserError."""
    source, notes = files_of_folder(data)
    look = _look_at(source, output)
    if look.fields.remote and (images := files_of_folder(data, images_first=True))[0] != source:
        source, notes = images  # the table is where images were downloaded from, as img2dataset writes it
        look = _look_at(source, output)
    if not look.fields.has_captions:
        for table in _captions_beside(data):
            try:
                captioned = _look_at(table, output)
            except UserError:  # something else under such a name
                continue
            if captioned.fields.has_captions and captioned.fields.unread is None:
                notes, look = [], captioned
                break
    return replace(look, notes=[*notes, *look.notes])


def _apart_from(source: str, output: str) -> str:
    """The folder ``output`` of the current one, or else of the nearest one above it where it is not in ``source``."""
    for _ in Path.cwd().parents:
        if not any(overlaps(Config(source=source, output=output))):
            break
        output = f"../{output}"
    return output


def _captions_beside(folder: str) -> list[str]:
    """Tables in a folder of images, or one folder below, that are named as Flickr and COCO name captions."""
    fs, path = filesystem(folder)
    if not fs.isdir(path):
        return []
    root, top = folder.rstrip("/"), path.rstrip("/")
    found = [one for pattern in _CAPTIONS for one in sorted(fs.glob(f"{glob.escape(top)}/{pattern}"))]
    paths = [f"{root}{str(one).removeprefix(top)}" for one in found]
    return sorted(paths, key=lambda one: "train" not in one.rpartition("/")[2])


@dataclass(frozen=True)
class Look:
    """What a source is: its URL, a description, its format, the fields of its first shard, and notes.

    ``classes`` are those of its folders, of a folder of images.
    """

    source: str
    found: str
    format: SourceFormat
    fields: Fields
    notes: Sequence[str]
    classes: tuple[str, ...]


def _look_at(source: str, output: str) -> Look:
    listed: dict[str, Info] = {}
    unmade = f"{output}/{_UNMADE}"  # of a dataset that exists, only files that it does not know would be listed
    shards = source_shards(Config(source=source, output=unmade), listed)
    if not shards.urls:
        raise UserError(f"{canonical(source)} has no files. Check the folder.")
    first = shards.names[0].as_py()
    shard = Shard(shards.urls[0], first, shards.format.name, b"".join(shards.lists.values()))
    sizes = [info.get("size") or 0 for info in listed.values()]
    found = _describe(len(shards.urls), shards.format, sum(sizes) if len(sizes) == len(shards.urls) else None)
    classes, notes = class_folders(shard), list(shards.notes)
    if classes and (same := folders_of_one_class(first_folders(shard))):
        notes.append(f"warning: {same}")
    return Look(source, found, shards.format, find_fields(shard, Input()), notes, classes)


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
    what = format_.noun.removesuffix(" file")
    return f"{plural(count, 'shard')} ({what}{'' if size is None else f', {format_bytes(size)}'})"


def _schema_for(config_path: Path) -> str:
    """Where the schema of the config is, relative to the config if both are in one checkout."""
    schema = Path(schemas.__file__).parent / "json" / "run.json"
    folder = config_path.absolute().parent
    return os.path.relpath(schema, folder) if folder.is_relative_to(schema.parents[2]) else str(schema)


def render(look: Look, output: str, gpu: bool, schema: str, path: str) -> str:
    """The config of a source that writes to ``output``. What was found is in it, optional keys are comments."""
    columns = "columns: " + ", ".join(_scalar(name[:40]) for name in look.fields.names[:20])
    return render_markdown(
        "starter.yaml",
        **vars(look),
        output=output,
        gpu=gpu,
        schema=schema.replace("\n", " "),  # a comment ends with the line
        path=path.replace("\n", " "),
        columns=textwrap.wrap(columns, 110) if look.format.is_table else [],
        class_texts=CLASS_TEXTS,
        scalar=_scalar,
        json=partial(json.dumps, ensure_ascii=False),
    )


def _scalar(text: str) -> str:
    """A text as a YAML scalar: quoted unless it is plain, since a name or URL may contain anything."""
    return text if _PLAIN.fullmatch(text) and load_yaml(text) == text else json.dumps(text)
