"""Folders of images: which files make which sample, and the samples of a list of them.

A sample is an image with the files that have its path up to a dot. Its key is its path without the extension, or with
it where another image has that key. A row of ``metadata.csv``, ``metadata.jsonl`` or ``metadata.parquet`` belongs to
the image that its ``file_name`` names, relative to its folder, as Hugging Face's imagefolder has it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from glob import escape
from typing import Any

from reinforce.errors import UserError
from reinforce.source.config import Input
from reinforce.source.file_types import METADATA, foreign_name, is_image_name, unread_heic
from reinforce.source.formats.base import (
    Columns,
    ListedSample,
    NoColumn,
    Shard,
    SourceFormat,
    add_captions,
    find_columns,
    format_of_name,
    sample_of_row,
)
from reinforce.source.formats.jsonl import BrokenRow, LinesFormat
from reinforce.source.formats.parquet import Parquet, ParquetFile, is_binary
from reinforce.source.formats.tar import sample_of_files, split_name
from reinforce.source.parquet_file import RefusedFile
from reinforce.source.samples import Item, RawSample, Refusal, UnreadSample, as_utf8, parse_json
from reinforce.source.urls import SOURCES, FileReader, UnreadableFile, canonical, filesystem, list_whole, read_ahead
from reinforce.terminal import plural
from schemas import Reason

FILE_NAME = "file_name"
#: Member of a sample that has the name of its class, where `input.captions` names it and the sample has no such member.
CLASS = "class"

_TABLES = (".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet")  # other files that may have captions
_LINE_BYTES = 2**24


class Folder(SourceFormat):
    name = "folder"
    noun = "folder of images"
    is_listed = True
    referable = True

    def recognises_folder(self, fs: Any, path: str) -> bool:
        return not fs.glob(f"{escape(path)}/*.tar*")

    def items(self, shard: Shard, spec: Input) -> Iterator[Item]:
        lines = shard.lines()
        reader = _ListReader(shard.folder.rstrip("/"), lines, spec)
        return itertools.chain.from_iterable(read_ahead(reader.samples, lines, shard.folder))

    def list_folder(
        self, url: str, spec: Input, output: str = "", listed: Sequence[ListedSample] = ()
    ) -> tuple[list[ListedSample], list[str]]:
        root = url.rstrip("/")
        own = f"{output.removeprefix(canonical(root) + '/')}/"
        sizes = {path: size for path, size in _files(root).items() if not path.startswith(own)}
        wanted = {"txt", "json"} | {name.partition(":")[0] for name in spec.caption_fields}
        images: list[str] = []
        sidecars: list[str] = []  # which may belong to an image
        others: list[str] = []
        tables: list[str] = []  # of metadata
        for path in sorted(sizes):
            key, extension = split_name(path)
            if path.rpartition("/")[2].lower() in METADATA:
                tables.append(path)
            elif key and is_image_name(extension):
                images.append(path)
            elif key and (extension in wanted or extension.rpartition(".")[2] in wanted):
                sidecars.append(path)
            else:
                others.append(path)
        if not images:
            shown, rest = canonical(root), others + sidecars + tables
            if not rest:
                patterns = f"Name one with images, or files by a pattern such as {shown}/*.tar."
                raise UserError(f"source: {shown} is an empty folder. {patterns}")
            remedy = unread_heic(rest) or foreign_name(rest[0]) or f"name what is read: {SOURCES}"
            count = f"it has {plural(len(rest), 'other file')}, such as {rest[0]}"
            raise UserError(f"source: {shown} is a folder without images; {count}: {remedy}.")
        before = {sample.image(): sample for sample in listed}
        keys = _keys_of(images, {path: sample.key for path, sample in before.items()})
        samples = [ListedSample(keys[path], {_split(path)[1]: (path, sizes[path])}) for path in images]
        others += _add_sidecars(samples, sidecars, sizes)
        known = {path for sample in listed for path, _ in sample.files.values()}
        notes = _notes(root, [path for path in others if path not in known], tables, samples)
        notes += [note for path in tables if (note := _add_rows(root, path, samples, spec))]
        folders = [path.partition("/")[0] for path in images if "/" in path]
        if CLASS in spec.caption_fields and (same := folders_of_one_class(folders)):
            notes.append(f"warning: source: {same}")
        new = [sample for sample, path in zip(samples, images, strict=True) if path not in before]
        return new, notes


def _split(path: str) -> tuple[str, str]:
    """A path without its extension, and that in lower case."""
    stem, _, extension = path.rpartition(".")
    return stem, extension.lower()


def _keys_of(images: Iterable[str], listed: Mapping[str, str]) -> dict[str, str]:
    """The keys of images by their paths; those that are ``listed`` keep theirs, and no other image gets one of them."""
    stems = Counter(_split(path)[0] for path in images)
    keys, taken = dict(listed), {*listed.values()}
    for path in sorted(images, key=len):  # the path that a key can equal is shorter than that of its image
        if path not in keys:
            stem, _ = _split(path)
            keys[path] = path if stems[stem] > 1 or stem in taken else stem
            taken.add(keys[path])
    return keys


def _add_sidecars(samples: Sequence[ListedSample], sidecars: Iterable[str], sizes: Mapping[str, int]) -> list[str]:
    """Add each file to the samples whose key, or path without its extension, it begins with, up to its last such dot.

    ``a.b.txt`` is the member ``txt`` of ``a.b.jpg``, or else ``b.txt`` of ``a.jpg``. Returns those of no sample.
    """
    owners: dict[str, list[ListedSample]] = {}
    for sample in samples:
        [(path, _)] = sample.files.values()
        for name in {sample.key, _split(path)[0]}:
            owners.setdefault(name, []).append(sample)
    found = []
    for path in sidecars:
        folder, slash, start = path.rpartition("/")
        while "." in start:
            start = start.rpartition(".")[0]
            if folder + slash + start in owners:
                found.append((folder + slash + start, path))
                break
        else:
            found.append(("", path))
    used = set()
    for start, path in sorted(found, key=lambda one: -len(one[0])):
        extension = path[len(start) + 1 :].lower()
        for sample in owners.get(start, ()):
            if sample.files.setdefault(extension, (path, sizes[path]))[0] == path:
                used.add(path)
    for sample in samples:
        sample.files = dict(sorted(sample.files.items(), key=lambda file: file[1]))
    return [path for _, path in found if path not in used]


def _notes(root: str, others: Sequence[str], tables: Sequence[str], samples: Iterable[ListedSample]) -> list[str]:
    """A note on files that are not read, if there are some."""
    if not others:
        return []
    captioned = tables or any(sample.files.keys() & {"txt", "json"} for sample in samples)
    table = None if captioned else next((path for path in others if path.lower().endswith(_TABLES)), None)
    hint = "; captions are read from metadata.csv or .jsonl beside the images (file_name, text)" if table else ""
    shown = canonical(f"{root}/{table or others[0]}")
    heic = f"; {unread}" if (unread := unread_heic(others)) else ""
    return [f"source: {plural(len(others), 'other file')} not read, such as {shown}{hint}{heic}"]


class _ListReader:
    """Reads the samples of the lines of a list, which are those of ``ListedSample``."""

    def __init__(self, folder: str, lines: Sequence[bytes], spec: Input) -> None:
        self._folder, self._lines, self._spec = folder, lines, spec
        self._files = FileReader(self._spread)

    def _spread(self) -> Iterator[str]:
        """The URLs of some files, from all over the list, the last one first."""
        for line in self._lines[:: -(len(self._lines) // 8 or 1)]:
            for path, _ in parse_json(line)["files"].values():
                yield f"{self._folder}/{path}"

    def samples(self, line: bytes) -> list[RawSample | Refusal]:
        entry = parse_json(line)
        key, files, row = entry["key"], entry["files"], entry.get("row")
        if any(".." in path.split("/") or path.startswith("/") for path, _ in files.values()):
            return [Refusal(key, Reason.IMAGE_PLACE, "it is not in the folder")]
        opened: list[tuple[str, _LocalFile]] = []
        refusals = []
        for extension, (path, size) in files.items():
            file = _LocalFile(self._files, f"{self._folder}/{path}", size)
            try:
                if not is_image_name(extension):
                    file.data = file.read(self._spec.limits.sidecar_bytes) or b""
                opened.append((extension, file))
            except UnreadableFile as error:
                refusals.append(Refusal(key, Reason.SIDECAR_BROKEN, f".{extension}: {error}"))
        try:
            items = [*sample_of_files(key, opened, self._spec.limits), *refusals]
        except UnreadableFile as error:
            return [Refusal(key, Reason.IMAGE_MISSING, str(error))]
        return [_complete(item, row, self._spec) if isinstance(item, RawSample) else item for item in items]


def _complete(item: RawSample, row: Mapping[str, Any] | None, spec: Input) -> RawSample:
    """A sample with its row of metadata, before which its own files take precedence, and with its class."""
    if row:
        with contextlib.suppress(NoColumn):
            columns = _columns(row, spec)
            columns = replace(columns, metadata=tuple(name for name in columns.metadata if name != FILE_NAME))
            place = sample_of_row("", 0, {FILE_NAME: "x.png", **row}, columns, spec)
            assert isinstance(place, UnreadSample)
            members = tuple(dict.fromkeys((*item.members, *place.sidecars)))
            item = replace(item, sidecars={**place.sidecars, **item.sidecars}, members=members)
    if CLASS in spec.caption_fields and CLASS not in item.sidecars and (name := class_of(item.key)):
        # The name of the class becomes a member, and is in the metadata.
        stated = parse_json(item.sidecars.get("json", b"{}"))
        sidecars = {**item.sidecars, CLASS: name.encode()}
        if isinstance(stated, dict):
            sidecars["json"] = json.dumps({**stated, CLASS: name}, ensure_ascii=False).encode()
        item = replace(item, sidecars=sidecars, members=(*item.members, CLASS))
    return item


def class_of(path: str) -> str | None:
    """The name of an image's class: the first folder of its path, with spaces for underscores; None without one."""
    folder, slash, _ = path.partition("/")
    return as_utf8(folder).replace("_", " ").strip() or None if slash else None


def folders_of_one_class(folders: Iterable[str]) -> str | None:
    """Two folders whose classes no text can tell apart, as their names differ in case, spaces and underscores alone.

    Returns what to say of them; None if there are none.
    """
    first: dict[str, str] = {}
    for folder in folders:
        name = class_of(f"{folder}/") or ""
        if (other := first.setdefault(" ".join(name.lower().split()), folder)) != folder:
            return f"folders {other!r} and {folder!r} are one class, {name!r}, to every text: rename or join them"
    return None


class _LocalFile:
    """A file of a folder; ``data`` is its content where it is read in advance."""

    def __init__(self, files: FileReader, url: str, size: int) -> None:
        self.url: str | None = url
        self.offset, self.size, self.is_link = 0, size, False
        self.data: bytes | None = None
        self._files, self._url = files, url

    def read(self, limit: int) -> bytes | None:
        if self.data is not None:
            return self.data
        data = self._files.read(self._url, limit)
        self.size = len(data)
        return None if len(data) > limit else data


def _files(root: str) -> dict[str, int]:
    """The sizes of all files of a folder by their paths in it, without hidden ones. Raises UserError."""
    try:
        fs, top = filesystem(root)
        found = list_whole(lambda: fs.find(top, detail=True))
    except Exception as error:  # each driver has its own exceptions
        raise UserError(f"source {canonical(root)}: cannot be listed ({type(error).__name__}: {error}).") from error
    start = f"{top.rstrip('/')}/"
    paths = {path.removeprefix(start): info for path, info in found.items() if path.startswith(start)}
    return {
        path: int(info.get("size") or 0)
        for path, info in paths.items()
        if not any(part.startswith(".") for part in path.split("/"))
    }


def _add_rows(root: str, table: str, samples: list[ListedSample], spec: Input) -> str | None:
    """Add the rows of a metadata file to the samples of its folder; returns a note on rows without an image."""
    folder = table.rpartition("/")[0]
    by_path = {path: sample for sample in samples for path, _ in sample.files.values()}
    strays, count = 0, 0
    try:
        for row in _rows(f"{root}/{table}"):
            name = str(row.get(FILE_NAME))
            sample = by_path.get(f"{folder}/{name}" if folder else name)
            count += 1
            if sample is None:
                strays += 1
            elif sample.row is None:
                sample.row = {key: value for key, value in row.items() if key != FILE_NAME}
            elif spec.captions_per_sample:
                add_captions(sample.row, row, _columns(row, spec).captions, spec.captions_per_sample)
    except (EOFError, RefusedFile, ValueError) as error:
        raise UserError(f"source: {canonical(root)}/{table} cannot be read: {error}. Correct or remove it.") from error
    if count and strays == count:
        where = f"source: {canonical(root)}/{table}"
        raise UserError(f"{where}: no row has the path of an image, relative to its folder, in `{FILE_NAME}`.")
    return f"source: {plural(strays, 'row')} of {table} without an image that is there" if strays else None


def _columns(row: Mapping[str, Any], spec: Input) -> Columns:
    """The columns of a row of metadata. Raises NoColumn."""
    names = [FILE_NAME, *(name for name in row if name != FILE_NAME)]
    return find_columns(names, spec.model_copy(update={"image": FILE_NAME, "key": None}))


def _rows(url: str) -> Iterator[Mapping[str, Any]]:
    table = format_of_name(url)
    if isinstance(table, Parquet):
        with ParquetFile(url) as file:
            names = [name for name, type_ in file.types.items() if not is_binary(type_)]
            for found in file.rows(find_columns(names, Input(image=FILE_NAME))):
                if isinstance(found, RefusedFile):
                    raise found
                yield found[1]
        return
    assert isinstance(table, LinesFormat)
    for _, row in table.rows(url, _LINE_BYTES):
        if isinstance(row, BrokenRow):
            raise row
        yield row


FORMAT = Folder()
