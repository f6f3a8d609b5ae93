"""``reinforce init``: a commented config for the data that it looks at, which ``reinforce plan`` accepts as it is.

Where a shard has its images, keys and captions is guessed by the names and types of its columns or members.
"""

from __future__ import annotations

import glob
import itertools
import json
import os
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import schemas
from reinforce.config import Config
from reinforce.engine.plan.source_shards import overlaps, source_shards
from reinforce.errors import UserError
from reinforce.images.policy import ImageRefused, check_decoder
from reinforce.processes.cores import default_gpus
from reinforce.processes.parallel import nodes_of_run
from reinforce.reports import render_markdown
from reinforce.settings import load_yaml
from reinforce.source.config import Input
from reinforce.source.file_types import is_image_name
from reinforce.source.formats.base import (
    NoColumn,
    Shard,
    SourceFormat,
    files_of_folder,
    find_columns,
    find_format,
    find_several,
    format_of_name,
    read_samples,
)
from reinforce.source.formats.folder import CLASS, class_of, folders_of_one_class
from reinforce.source.parquet_file import RefusedFile
from reinforce.source.samples import RawSample, Refusal, UnreadSample, parse_json, texts_of
from reinforce.source.urls import Info, canonical, filesystem
from reinforce.terminal import first_names, format_bytes, plural

#: Names of captions besides those that are read by default, in the order of preference, in lower case.
_CAPTIONS = (
    *("txt", "text", "caption", "captions", "alt_text", "alt", "description", "title", "prompt"),
    *("sentence", "sentences"),
)
#: Captions of an image in the folder of its class.
CLASS_TEXTS = ("a photo of a {}.", "a photo of the {}.", "a close-up photo of the {}.", "a picture of one {}.")
#: Names of folders that divide images into parts, in lower case.
_PARTS = frozenset({"train", "training", "val", "valid", "validation", "dev", "test", "testing"})
_WORDNET_ID = re.compile(r"n\d{8}")
_KEYS = ("id", "image_id", "sample_id", "hash", "sha256", "md5")
_FIRST_SAMPLES = 16
#: Samples at the beginning of a shard whose texts are read, and bytes of their images.
_TEXTS, _TEXTS_BYTES = 64, 64 * 2**20
#: The name of a text that is a caption by default.
_DEFAULT = ""
_UNMADE = "none"  # folder of an output in which there is no dataset
#: Names of files with captions of images elsewhere, in a folder of images.
_CAPTION_SECTION = ("captions.txt", "captions.csv", "captions*.json", "*/captions.txt", "*/captions*.json")
_PLAIN = re.compile(r"[A-Za-z0-9_./-][A-Za-z0-9_./*-]*(://[A-Za-z0-9_./*-]+)?")
_SCHEME_CHARS = 16
_EXAMPLE_CHARS = 60


@dataclass(frozen=True)
class Fields:
    """What is found: the columns of a table (``image``, ``key``; None: by default), where captions are (None: as by
    default), whether there are any, other names, an example, whether a table has URLs of its images, why no sample can
    be read, if so, the most captions of a first sample, whether they are read only as several, the folder of the images
    that a table names by their files, and the classes whose folders have the images. Of the first ``samples``,
    ``without`` have no caption."""

    image: str | None = None
    captions: tuple[str, ...] | None = None
    has_captions: bool = True
    other_key: str | None = None
    names: tuple[str, ...] = ()
    example: str | None = None
    remote: bool = False
    unread: str | None = None
    several: int = 1
    only_several: bool = False
    images_from: str | None = None
    classes: tuple[str, ...] = ()
    samples: int = 0
    without: int = 0

    def as_input(self) -> dict[str, Any]:
        """The keys of `input` that differ from the default."""
        found: dict[str, Any] = {} if self.image is None else {"image": self.image}
        found |= {} if self.captions is None else {"captions": [*self.captions]}
        found |= {} if self.images_from is None else {"images_from": self.images_from}
        if self.classes:
            found |= {"templates": [*CLASS_TEXTS], "captions_per_sample": len(CLASS_TEXTS)}
        return found | ({"captions_per_sample": self.several} if self.only_several else {})

    def lines(self) -> list[str]:
        if self.unread is not None:
            return [self.unread]
        if self.classes:
            ids = ". They are WordNet ids, which no model knows: rename them to names of classes"
            return [
                f"classes: {len(self.classes)} folders ({first_names(self.classes)}); captions are made of them"
                + (ids if all(map(_WORDNET_ID.fullmatch, self.classes)) else "")
            ]
        if self.example is not None:
            lines = [f"caption of the first sample that has one: {self.example!r}"]
            if self.without:
                lines.append(
                    f"no caption: {self.without} of the first {plural(self.samples, 'sample')}; input.captions is a "
                    "list of places, of which the first with text is used"
                )
            if self.several > 1:
                done = "keeps them" if self.only_several else "would keep them; it is not set"
                lines.append(f"up to {self.several} true captions a sample; input.captions_per_sample {done}")
            return lines
        return ["no caption was found, so images alone are read; set input.captions to where captions are, if any are"]


def find_fields(shard: Shard, spec: Input) -> Fields:
    """Look at the beginning of a shard. Raises UserError if it has no image that can be read."""
    if find_format(shard.format).is_table:
        return _with_example(shard, _table_fields(shard, spec))
    samples = _first_samples(shard, spec)
    documents = [_json_of(sample) for sample in samples]
    texts = [_texts_of(document) for document in documents]
    one = spec.model_copy(update={"captions_per_sample": 1})
    for sample, own in zip(samples, texts, strict=True):
        own.update((_DEFAULT, caption) for caption in sample.captions(one))
    names = (*samples[0].members, *dict.fromkeys(name for document in documents for name in document))
    found = _with_captions(Fields(names=names), texts, _known_captions(texts), "json:{}".format)
    if not found.has_captions:
        classes = class_folders(shard)
        return Fields(captions=(CLASS,), names=samples[0].members, classes=classes) if classes else found
    first = next(number for number, own in enumerate(texts) if found.example in own.values())
    return _with_example(shard, found, [samples[first], *samples[:first], *samples[first + 1 :]])


def _known_captions(texts: Sequence[Mapping[str, str]]) -> list[str]:
    """The first of the known names of captions with a text, and those with one where the names before have none.

    ``texts`` are those of the first samples by name.
    """
    chosen: list[str] = []
    names = {name.lower(): name for own in texts for name in own}
    for name in (names[known] for known in (_DEFAULT, *_CAPTIONS) if known in names):
        if any(name in own and own.keys().isdisjoint(chosen) for own in texts):
            chosen.append(name)
    return chosen


def _with_captions(
    fields: Fields, texts: Sequence[Mapping[str, str]], chosen: Sequence[str], field: Callable[[str], str]
) -> Fields:
    """The fields with captions at the ``chosen`` names, of which ``field`` makes entries of `input.captions`."""
    captions = [text for own in texts for text in [own[name] for name in chosen if name in own][:1]]
    if not captions:
        return replace(fields, captions=(), has_captions=False)
    others = tuple(field(name) for name in chosen if name != _DEFAULT)
    default = tuple(Input().caption_fields) if _DEFAULT in chosen else ()
    return replace(
        fields,
        captions=(*default, *others) if others else None,
        example=captions[0],
        samples=len(texts),
        without=len(texts) - len(captions),
    )


def _texts_of(document: Mapping[str, Any]) -> dict[str, str]:
    """The first text of each field that has one that is not blank."""
    found = {name: [text for text in texts_of(value) if text.strip()] for name, value in document.items()}
    return {name: texts[0] for name, texts in found.items() if texts}


def _table_fields(shard: Shard, spec: Input) -> Fields:
    try:
        found = find_format(shard.format).first_row(shard.url)
    except (RefusedFile, OSError, EOFError) as error:
        raise UserError(f"{canonical(shard.url)} cannot be read: {error}") from error
    if found is None:
        raise UserError(f"{canonical(shard.url)} has no row. Name another file.")
    binary, rows = found  # the binary columns, and a value of each column of the first row
    names = tuple(rows)
    image: str | None = None
    try:
        columns = find_columns(names, spec)
    except NoColumn as error:
        image = next(iter(binary), None) or next((n for n in names if _is_place(rows[n])), None)
        if image is None:
            raise UserError(f"{canonical(shard.url)}: {error}") from None
        columns = find_columns(names, spec.model_copy(update={"image": image}))
    lower = {name.lower(): name for name in reversed(names)}
    other = None if columns.key else next((lower[name] for name in _KEYS if name in lower), None)
    remote = "://" in str(rows[columns.image] or "")[:_SCHEME_CHARS]
    fields = Fields(image, other_key=other, names=names, remote=remote)
    # The first rows that can be read, without binary columns.
    whole = Input(image=columns.image, captions=[f"json:{name}" for name in names])
    items = itertools.islice(find_format(shard.format).read(shard, whole, images=False), _TEXTS)
    documents = [row for item in items if not isinstance(item, Refusal) and (row := _json_of(item))] or [dict(rows)]
    texts = [
        _texts_of({name: row[name] for name in row if name not in (columns.image, columns.key)}) for row in documents
    ]
    for own, row in zip(texts, documents, strict=True):
        default = ("caption", "txt" if "txt" in names else "text")
        own.update((_DEFAULT, own.pop(name)) for name in default if name in own and isinstance(row[name], str))
    others = [name for own in texts for name, text in own.items() if " " in text and not _is_place(text)]
    return _with_captions(fields, texts, _known_captions(texts) or others[:1], str)


def _first_samples(shard: Shard, spec: Input, most: int = _TEXTS) -> list[RawSample]:
    """The first samples of a shard, one or more. Raises UserError if none of the first items is one."""
    faults, samples, size = [], list[RawSample](), 0
    for number, item in enumerate(read_samples(shard, spec)):
        if isinstance(item, RawSample):
            try:
                check_decoder(item.image)
                samples.append(item)
                size += len(item.image)
            except ImageRefused as refused:
                faults.append(f"{item.key}: {refused.detail}")
        else:
            faults.append(f"{item.key}: {item.detail}" if item.key else item.detail)
        if len(samples) == most or size > _TEXTS_BYTES or number == _FIRST_SAMPLES + len(samples):
            break
    if not samples:
        raise UserError(f"{canonical(shard.url)}: no sample can be read. {'; '.join(faults[:1]) or 'It is empty.'}")
    return samples


def _with_example(shard: Shard, fields: Fields, samples: Sequence[RawSample] = ()) -> Fields:
    """The fields with the caption of the first of ``samples`` and how many true captions they have, or why none can be
    read. Without ``samples``, those of a table are read."""
    spec = Input(**fields.as_input())
    try:
        samples = samples or _first_samples(shard, spec, 1)
    except UserError as error:
        folder = None if fields.images_from else _folder_of_images(shard, spec)
        if folder is None:
            return replace(fields, unread=str(error))
        return _with_example(shard, replace(fields, images_from=folder))
    several = find_several(shard, spec, samples)
    captions = [sample.caption(spec.caption_fields, spec.limits) for sample in samples]
    lists = [found for one, found in zip(captions, several.texts, strict=False) if found and one is None]
    only_several = several.most > 0 and (several.rows or bool(lists))
    fields = replace(fields, several=max(1, several.most), only_several=only_several)
    first = next(iter(several.texts[0]), None) if lists else None
    example = captions[0] or first or fields.example
    if example is not None and len(example) > _EXAMPLE_CHARS:
        example = f"{example[:_EXAMPLE_CHARS]} ..."
    return replace(fields, example=example)


def _folder_of_images(shard: Shard, spec: Input) -> str | None:
    """The folder beside a table, or beside its folder, that has the first image that the table names."""
    format_, folder = find_format(shard.format), canonical(shard.file).rpartition("/")[0]
    items = itertools.islice(format_.read(shard, spec), _FIRST_SAMPLES)
    place = next((item.location for item in items if isinstance(item, UnreadSample)), "://")
    if not format_.is_table or "://" in place or place.startswith("/") or ".." in place.split("/"):
        return None
    for parent in (folder, folder.rpartition("/")[0]):
        fs, path = filesystem(parent)
        entries = fs.ls(path, detail=True) if fs.isdir(path) else []
        names = [str(one["name"]).rstrip("/").rpartition("/")[2] for one in entries if one["type"] == "directory"]
        for name in sorted(names, key=lambda name: (name not in shard.file, name)):  # captions_val2017.json: val2017
            if fs.isfile(f"{path.rstrip('/')}/{name}/{place}"):
                return f"{parent}/{name}"
    return None


def _json_of(sample: RawSample | UnreadSample) -> dict[str, Any]:
    found = parse_json(sample.sidecars.get("json", b""))
    return found if isinstance(found, dict) else {}


def first_folders(shard: Shard) -> list[str]:
    """The folders of a listed folder that its images are in, sorted; the empty name for images in none."""
    keys = (str(json.loads(line)["key"]) for line in shard.lines())
    return sorted({folder if slash else "" for folder, slash, _ in (key.partition("/") for key in keys)})


def class_folders(shard: Shard) -> tuple[str, ...]:
    """The classes of a folder whose images are all in folders of it, two or more; none if these are its parts."""
    if not find_format(shard.format).is_listed:
        return ()
    found = {class_of(f"{folder}/") if folder else None for folder in first_folders(shard)}
    if None in found or len(found) < 2 or {str(name).lower() for name in found} <= _PARTS:
        return ()
    return tuple(sorted(map(str, found)))


def _is_place(value: Any) -> bool:
    return isinstance(value, str) and ("://" in value or is_image_name(value))


def make_starter(data: str, config_path: Path) -> tuple[str, list[str]]:
    """Look at ``data`` -> the text of the config that will be written to ``config_path``, and lines about the data.

    Raises UserError.
    """
    output = f"{_name(data)}-reinforced"
    look = look_at(data, output)
    gpu = bool(default_gpus(nodes_of_run()))
    # Where the schema of the config is, relative to the config if both are in one checkout.
    file, folder = Path(schemas.__file__).parent / "json" / "run.json", config_path.absolute().parent
    schema = os.path.relpath(file, folder) if folder.is_relative_to(file.parents[2]) else str(file)
    for _ in Path.cwd().parents:  # the nearest folder above this one where the dataset is not in its source
        if not any(overlaps(Config(source=look.source, output=output))):
            break
        output = f"../{output}"
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


def _captions_beside(folder: str) -> list[str]:
    """Tables in a folder of images, or one folder below, that are named as Flickr and COCO name captions."""
    fs, path = filesystem(folder)
    if not fs.isdir(path):
        return []
    root, top = folder.rstrip("/"), path.rstrip("/")
    found = [one for pattern in _CAPTION_SECTION for one in sorted(fs.glob(f"{glob.escape(top)}/{pattern}"))]
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
    size = f", {format_bytes(sum(sizes))}" if len(sizes) == len(shards.urls) else ""
    found = f"{plural(len(shards.urls), 'shard')} ({shards.format.noun.removesuffix(' file')}{size})"
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
