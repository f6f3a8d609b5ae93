"""Where a shard has its images, keys and captions, guessed by the names and types of its columns or members."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from reinforce.errors import UserError
from reinforce.input_config import Input
from reinforce.parquet.footers import RefusedFile
from reinforce.source.captions import texts_of
from reinforce.source.file_types import is_image_name
from reinforce.source.formats.base import Shard
from reinforce.source.formats.columns import NoColumn, find_columns
from reinforce.source.formats.folder import CLASS, class_of
from reinforce.source.formats.recognise import find_format
from reinforce.source.reading import find_several, read_samples
from reinforce.source.samples import RawSample, UnreadSample
from reinforce.source.urls import canonical, filesystem
from reinforce.terminal import first_names

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
_SCHEME_CHARS = 16


@dataclass(frozen=True)
class Fields:
    """What is found: the columns of a table (``image``, ``key``; None: by default), where captions are (None: as by
    default), whether there are any, other names, an example, whether a table has URLs of its images, why no sample can
    be read, if so, the most captions of a first sample, whether they are read only as several, the folder of the images
    that a table names by their files, and the classes whose folders have the images."""

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
            lines = [f"caption of the first sample: {self.example!r}"]
            if self.several > 1:
                done = "keeps them" if self.only_several else "would keep them; it is not set"
                lines.append(f"up to {self.several} true captions a sample; input.captions_per_sample {done}")
            return lines
        return ["no caption was found; set input.captions to where captions are, or name a captioner"]


def find_fields(shard: Shard, spec: Input) -> Fields:
    """Look at the beginning of a shard. Raises UserError if it has no image that can be read."""
    if find_format(shard.format).is_table:
        return _with_example(shard, _table_fields(shard, spec))
    sample = _first_sample(shard, spec)
    if sample.captions(spec.model_copy(update={"captions_per_sample": 1})):
        return _with_example(shard, Fields(names=sample.members), sample)
    document = _json_of(sample)
    texts = [name for name in document if texts_of(document[name])]
    chosen = _named(texts, _CAPTIONS)
    if chosen is None:
        if classes := class_folders(shard):
            return Fields(captions=(CLASS,), names=sample.members, classes=classes)
        return Fields(captions=(), has_captions=False, names=(*sample.members, *document))
    found = Fields(captions=(f"json:{chosen}",), names=(*sample.members, *document))
    return _with_example(shard, found, sample)


def _table_fields(shard: Shard, spec: Input) -> Fields:
    binary, rows = _columns(shard)
    names = tuple(rows)
    image: str | None = None
    try:
        columns = find_columns(names, spec)
    except NoColumn as error:
        image = next(iter(binary), None) or next((n for n in names if _is_place(rows[n])), None)
        if image is None:
            raise UserError(f"{canonical(shard.url)}: {error}") from None
        columns = find_columns(names, spec.model_copy(update={"image": image}))
    texts = [name for name in names if name not in (columns.image, columns.key) and _is_text(rows[name])]
    defaults = {"txt", "text", "caption"} & {name for name in texts if isinstance(rows[name], str)}
    other = None if columns.key else _named(names, _KEYS)
    remote = "://" in str(rows[columns.image] or "")[:_SCHEME_CHARS]
    if defaults:
        return Fields(image, None, True, other, names, remote=remote)
    chosen = _named(texts, _CAPTIONS) or next(
        (t for t in texts if " " in str(rows[t]) and not _is_place(rows[t])), None
    )
    return Fields(image, () if chosen is None else (chosen,), chosen is not None, other, names, remote=remote)


def _columns(shard: Shard) -> tuple[list[str], Mapping[str, Any]]:
    """The binary columns of a table, and a value of each column of its first row."""
    try:
        found = find_format(shard.format).first_row(shard.url)
    except (RefusedFile, OSError, EOFError) as error:
        raise UserError(f"{canonical(shard.url)} cannot be read: {error}") from error
    if found is None:
        raise UserError(f"{canonical(shard.url)} has no row. Name another file.")
    return found


def _first_sample(shard: Shard, spec: Input) -> RawSample:
    faults = []
    for number, item in enumerate(read_samples(shard, spec)):
        if isinstance(item, RawSample):
            return item
        faults.append(f"{item.key}: {item.detail}" if item.key else item.detail)
        if number == _FIRST_SAMPLES:
            break
    raise UserError(f"{canonical(shard.url)}: no sample can be read. {'; '.join(faults[:1]) or 'It is empty.'}")


def _with_example(shard: Shard, fields: Fields, sample: RawSample | None = None) -> Fields:
    """The fields with the caption of the first sample and how many true captions the first samples have, or why none
    can be read."""
    spec = Input(**fields.as_input())
    try:
        sample = sample or _first_sample(shard, spec)
    except UserError as error:
        folder = None if fields.images_from else _folder_of_images(shard, spec)
        if folder is None:
            return replace(fields, unread=str(error))
        return _with_example(shard, replace(fields, images_from=folder))
    several, caption = find_several(shard, spec, [sample]), sample.caption(spec.captions, spec.limits)
    fields = replace(fields, several=max(1, several.most))
    if several.most and (several.rows or caption is None):
        fields, caption = replace(fields, only_several=True), next(iter(several.texts[0]), None)
    return replace(fields, example=None if caption is None else _shorten(caption))


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


def _json_of(sample: RawSample) -> dict[str, Any]:
    try:
        found = json.loads(sample.sidecars.get("json", b"{}"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def class_folders(shard: Shard) -> tuple[str, ...]:
    """The classes of a folder whose images are all in folders of it, two or more; none if these are its parts."""
    if not find_format(shard.format).is_listed:
        return ()
    found = {class_of(json.loads(line)["key"]) for line in shard.lines()}
    if None in found or len(found) < 2 or {str(name).lower() for name in found} <= _PARTS:
        return ()
    return tuple(sorted(map(str, found)))


def _named(names: Sequence[str], known: Sequence[str]) -> str | None:
    lower = {name.lower(): name for name in reversed(names)}
    return next((lower[name] for name in known if name in lower), None)


def _is_text(value: Any) -> bool:
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, str)


def _is_place(value: Any) -> bool:
    return isinstance(value, str) and ("://" in value or is_image_name(value))


def _shorten(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:60]} ..."
