"""Where images of evaluation sets come from: folders of classes, WebDataset shards, reinforced datasets."""

from __future__ import annotations

import json
import os
import posixpath
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fsspec.implementations.local import LocalFileSystem

from reinforce.config import Limits
from reinforce.dataset.reader import Dataset
from reinforce.dataset.store import MANIFEST
from reinforce.errors import UserError
from reinforce.source.shards import IMAGE_EXTENSIONS, RawSample, Refusal, read_shard
from reinforce.source.text import caption_of, metadata_of
from reinforce.source.urls import COMPRESSIONS, canonical, expand, filesystem
from schemas import Reason

_JSON, _LINES = "json:", "lines:"


@dataclass(frozen=True)
class Example:
    """One image of a set. ``target`` is a label, or the captions that describe it."""

    key: str
    load: Callable[[], bytes]  # the encoded image
    target: Any


@dataclass(frozen=True)
class File:
    """An image in a folder of a class."""

    key: str  # path below the folder of classes
    path: str  # as its file system spells it
    size: int


def kind_of(urls: str | Sequence[str]) -> Literal["folder", "dataset", "shards"]:
    """What a set's URL means: a directory is a reinforced dataset or has a folder for each class; else shards.

    Raises UserError where the storage cannot be asked.
    """
    if not isinstance(urls, str) or canonical(urls).lower().endswith((*COMPRESSIONS, ".txt")):
        return "shards"
    fs, path = filesystem(urls)
    try:
        if not fs.isdir(path):
            return "shards"
        return "dataset" if fs.isfile(posixpath.join(path, MANIFEST)) else "folder"
    except Exception as error:  # each driver has its own exceptions
        raise UserError(
            f"{canonical(urls)} cannot be looked at: {type(error).__name__}: {error}. Check the address and your "
            "credentials for it."
        ) from error


def class_folders(url: str, where: str) -> dict[str, list[File]]:
    """Images by class folder, both sorted, at any depth below; hidden names are skipped. Raises UserError."""
    fs, root = filesystem(url)
    names, files = _local_tree(root) if isinstance(fs, LocalFileSystem) else _remote_tree(fs, root.rstrip("/"))
    folders: dict[str, list[File]] = {name: [] for name in sorted(names) if not name.startswith(".")}
    loose = 0
    for file in sorted(files, key=lambda file: file.key):
        name, below, _ = file.key.partition("/")
        if any(part.startswith(".") for part in file.key.split("/")) or not _is_image(file.key):
            continue
        if below:
            folders[name].append(file)
        else:
            loose += 1
    shown = canonical(url)
    if not folders:
        raise UserError(f"{where}: {shown} holds no folder of a class; to read shards in it write {shown}/*.tar.")
    if loose:
        raise UserError(f"{where}: {loose} images lie in {shown} itself: move them into the folder of their class.")
    empty = [name for name, files in folders.items() if not files]
    if empty:
        raise UserError(
            f"{where}: {len(empty)} of {len(folders)} class folders in {shown} hold no image, such as {empty[0]!r}: "
            "remove them, or add their images."
        )
    return folders


def _local_tree(root: str) -> tuple[list[str], list[File]]:
    """Folders in ``root`` and all files below; links are followed, as sets are often made of them."""
    names: list[str] = []
    files = []
    for folder, below, inside in os.walk(root, followlinks=True):
        names = names or below
        for name in inside:
            path = os.path.join(folder, name)
            size = os.path.getsize(path) if os.path.exists(path) else 0  # a broken link fails when it is read
            files.append(File(os.path.relpath(path, root).replace(os.sep, "/"), path, size))
    return names, files


def _remote_tree(fs: Any, root: str) -> tuple[list[str], list[File]]:
    entries = fs.ls(root, detail=True)
    names = [posixpath.basename(str(e["name"]).rstrip("/")) for e in entries if e["type"] == "directory"]
    found = fs.find(root, detail=True).items()
    return names, [File(path[len(root) :].lstrip("/"), path, int(info["size"] or 0)) for path, info in found]


def loader(url: str) -> Callable[[str], bytes]:
    """Reads a file by its path in the file system of a URL. Thread-safe. Raises UserError."""
    fs, _ = filesystem(url)

    def load(path: str) -> bytes:
        try:
            return bytes(fs.cat_file(path))
        except Exception as error:  # each driver has its own exceptions
            raise UserError(
                f"{path} cannot be read: {type(error).__name__}: {error}. Check that it is there."
            ) from error

    return load


def samples(urls: str | Sequence[str], limits: Limits, where: str) -> Iterator[RawSample | Refusal]:
    """Samples of shards or of a reinforced dataset in their order, with what is refused of them.

    A dataset's samples have their true caption as ``txt`` and their metadata as ``json``. Raises UserError for a
    shard that cannot be read to its end: what is measured on part of a set is no measure of the set.
    """
    if kind_of(urls) == "dataset":
        assert isinstance(urls, str)
        yield from _whole(_stored(urls), urls, where)
        return
    for url in expand(urls):
        yield from _whole(read_shard(url, limits), url, where)


def _whole(items: Iterator[RawSample | Refusal], url: str, where: str) -> Iterator[RawSample | Refusal]:
    mend = "Check the path, or fetch it again."
    try:
        for item in items:
            if isinstance(item, Refusal) and item.key is None:
                raise UserError(f"{where}: {canonical(url)}: {item.reason.value}: {item.detail}. {mend}")
            yield item
    except UserError:
        raise
    except Exception as error:  # each driver has its own exceptions
        raise UserError(f"{where}: {canonical(url)} cannot be read: {type(error).__name__}: {error}. {mend}") from error


def _stored(url: str) -> Iterator[RawSample]:
    for sample in Dataset(url, teachers=[], captioners=[]):
        sidecars = {}
        if sample.caption is not None:
            sidecars["txt"] = sample.caption.encode()
        if sample.metadata is not None:
            sidecars["json"] = json.dumps(sample.metadata, ensure_ascii=False).encode()
        yield RawSample(sample.key, sample.image, 0, len(sample.image), sidecars)


def label_of(sidecars: Mapping[str, bytes], field: str) -> int | str | None:
    """A class's index or name at a member's extension or ``json:FIELD``; None where there is none.

    A member that is an integer is an index, whatever the classes are called; JSON says itself which it is.
    """
    if field.startswith(_JSON):
        value = json_field(sidecars, field)
        return value if isinstance(value, (int, str)) and not isinstance(value, bool) else None
    text = sidecars.get(field, b"").decode("utf-8-sig", "replace").strip()
    try:
        return int(text)
    except ValueError:
        return text or None


def captions_of(sidecars: Mapping[str, bytes], fields: Sequence[str], limits: Limits) -> tuple[str, ...]:
    """The distinct captions of an image at the first field that has any, cleaned by the caption policy."""
    for field in fields:
        texts: list[bytes] = []
        if field.startswith(_LINES):
            texts = sidecars.get(field.removeprefix(_LINES), b"").splitlines()
        elif field.startswith(_JSON):
            value = json_field(sidecars, field)
            values = value if isinstance(value, list) else [value]
            texts = [text.encode("utf-8", "replace") for text in values if isinstance(text, str)]
        elif field in sidecars:
            texts = [sidecars[field]]
        cleaned = (caption_of({"txt": text}, ["txt"], limits) for text in texts)
        captions = tuple(dict.fromkeys(caption for caption in cleaned if caption))
        if captions:
            return captions
    return ()


def json_field(sidecars: Mapping[str, bytes], field: str) -> Any:
    """The value at ``json:FIELD``; None where there is none."""
    name = field.removeprefix(_JSON)
    found = metadata_of(sidecars, [name])
    return None if found is None else json.loads(found)[name]


def too_large(file: File, limits: Limits) -> Refusal | None:
    """A file above the limit is refused before it is read."""
    if file.size <= limits.image_bytes:
        return None
    return Refusal(file.key, Reason.IMAGE_BYTES, f"{file.size} bytes, above limits.image_bytes of {limits.image_bytes}")


def _is_image(name: str) -> bool:
    return name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS
