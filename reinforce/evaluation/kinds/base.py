"""The interface of a kind of evaluation sets, and the files of published sets below ROOT, with what they hold."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fsspec.implementations.local import LocalFileSystem
from pydantic import Field

from reinforce.errors import UserError
from reinforce.evaluation.images import ImageBatches
from reinforce.evaluation.reading import SetReader, Table, storage_errors
from reinforce.evaluation.registry import HUB, SuiteSet
from reinforce.evaluation.report import Outcome
from reinforce.images.policy import IMAGE_POLICY
from reinforce.settings import Section
from reinforce.source.formats.base import Columns
from reinforce.source.formats.parquet import ParquetFile
from reinforce.source.parquet_file import RefusedFile
from reinforce.source.references import listed_state
from reinforce.source.urls import Info, canonical, filesystem, read_whole

if TYPE_CHECKING:
    from reinforce.evaluation.encoding import Models

CLASSES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"
_SHARDS = "test/nshards.txt"
#: The file of a layout that names its images, and their folder, below the folder of the set.
_ANNOTATIONS = {
    "sugarcrepe": ("data/{}.json", "val2017"),
    "xm3600": ("captions.jsonl", "images"),
    "sharegpt4v": ("share-captioner_coco_lcs_sam_1246k_1107.json", "sam/images"),
}
_ENDINGS = {"tables": ".parquet", "pairs": ".txt"}


@dataclass(frozen=True)
class SetFiles:
    """The files of a set: its ``folder`` and ``shards`` as URLs, and their ``state``.

    ``shards`` are tars or tables, the captions of layout ``pairs``, or the file that names the images; those of masks
    are listed when the set is opened. Equal states
    have equal content: a hash of names, sizes, and modification times or ETags, and of class names and templates. It is
    empty where a storage lists neither times nor ETags. Other states may have equal content, too.
    """

    folder: str
    shards: list[str]
    state: str


def find_files(one: SuiteSet, root: str) -> SetFiles | None:
    """Find the files of a set; None if there are none. Raises UserError for a part of a set."""
    if root == HUB and not one.on_hub:
        return None
    folder = one.place(root)
    fs, path = filesystem(folder)
    top = path.rstrip("/")
    fs.invalidate_cache()  # files may have changed since this process listed them
    with storage_errors(f"{canonical(folder)} cannot be listed", "Check the address."):
        try:
            shards: list[str] = []
            if one.layout in _ANNOTATIONS:
                name, images = _ANNOTATIONS[one.layout]
                name = name.format(one.key.rpartition("sugarcrepe_")[2])
                shards = [f"{folder}/{name}"]
                used = {f"{top}/{name}": fs.info(f"{top}/{name}")} | fs.find(f"{top}/{images}", detail=True)
            else:
                used = fs.find(path, detail=True)
                if not used:
                    return None
                if one.layout != "masks":
                    shards, used = _list_files(one, fs, used, top, folder)
            return SetFiles(folder, shards, _state(fs, path, used))
        except FileNotFoundError:
            return None


def find_set(one: SuiteSet, root: str) -> SetFiles:
    """The files of a set below ``root``. Raises UserError if there are none."""
    files = find_files(one, root)
    if files is None:
        raise UserError(f"{one.name} is {where_expected(one, root)}. Copy it there, or leave it out of `sets`.")
    return files


def where_expected(one: SuiteSet, root: str) -> str:
    """Where the files of a set should be, and where they are published."""
    return f"expected at {canonical(one.place(root))}; published at {one.page}"


def _list_files(
    one: SuiteSet, fs: Any, found: dict[str, Info], top: str, folder: str
) -> tuple[list[str], dict[str, Info]]:
    """The URLs of tars, tables or captions, and what is listed of the set's files. ``top`` is the path of ``folder``.

    Raises UserError if some are missing.
    """
    shown = canonical(folder)
    if one.layout != "tars":
        files = sorted(path for path in found if path.endswith(_ENDINGS[one.layout]))
        if not files:
            raise UserError(f"{shown} has no file that ends with {_ENDINGS[one.layout]}. {one.page} has the set.")
        tables = one.layout == "tables"  # captions are beside the images that they belong to
        urls = [str(fs.unstrip_protocol(path)) for path in files]
        return urls, {path: found[path] for path in files} if tables else found
    if f"{top}/{_SHARDS}" not in found:
        raise UserError(f"{shown} has no {_SHARDS}, which has the number of shards. Download it.")
    text = read_whole(fs, f"{top}/{_SHARDS}").decode("utf-8", "replace").strip()
    if not text.isdecimal() or not 0 < int(text) < 100_000:
        raise UserError(f"{shown}/{_SHARDS} is {text[:40]!r}, not the number of shards. Download it again.")
    names = [f"test/{number}.tar" for number in range(int(text))]
    paths = {f"{top}/{name}": name for name in (CLASSES, TEMPLATES, *names)}
    if missing := [name for path, name in paths.items() if path not in found]:
        raise UserError(f"{shown} has no {missing[0]}. Download the whole set.")
    return [f"{folder}/{name}" for name in names], {path: found[path] for path in paths}


def _state(fs: Any, path: str, used: Mapping[str, Info]) -> str:
    """``SetFiles.state`` of the files that are ``used``, by their paths in the file system."""
    versions = {}
    for name, info in used.items():
        version = _version(fs, name, info)
        if version is None:
            return ""
        small = name.endswith((CLASSES, TEMPLATES))
        versions[name[len(path) :]] = [*version, read_whole(fs, name).hex() if small else None]
    text = json.dumps(versions, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _version(fs: Any, path: str, info: Info) -> list[int | str | None] | None:
    """A value that changes with a file's content; None where the storage lists none."""
    if isinstance(fs, LocalFileSystem):
        try:
            found = os.stat(path)  # of the file that a link leads to
        except OSError:
            return None
        return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]
    stamps = [listed_state(info).stamp, info.get("blob_id")]  # the second is the Hub's, a hash of the content
    return [info.get("size"), *stamps] if any(stamps) else None


def read_tables(one: SuiteSet, files: SetFiles, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the key and the ``columns`` of each row of the set's tables. Raises UserError for damage."""
    for url in files.shards:
        shown = canonical(url)
        with storage_errors(f"{one.name}: {shown} cannot be read", "Download it again."), ParquetFile(url) as file:
            missing = [name for name in columns if name not in file.types]
            if missing:
                raise UserError(f"{one.name}: {shown} has no column {missing[0]}; it has {', '.join(file.types)}.")
            first, *others = columns
            for item in file.rows(Columns(first, None, {}, tuple(others), tuple(file.types))):
                if isinstance(item, RefusedFile):
                    raise UserError(f"{one.name}: {shown}: {item}. Download it again.")
                number, row = item
                yield f"{url.rpartition('/')[2]}:{number}", dict(row)


def image_bytes(image: object, key: str, where: str) -> bytes:
    """The encoded image in a column of Hugging Face. Raises UserError if it is not there."""
    data = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(data, bytes):
        raise UserError(f"{where}: {key} has no image bytes; the published tables store each image.")
    return data


@dataclass(frozen=True)
class ImageSet:
    """A set that models can be evaluated on, with its name in messages.

    ``score`` gives the metrics of models on the images of ``examples``; none if no example can be used. ``count`` is
    the number of examples, with those that are refused, or 0 where it is not known before they are read. ``policy`` is
    the image policy of a set of the user.
    """

    name: str
    examples: SetReader
    score: Callable[[Models, ImageBatches], Outcome]
    count: int = 0
    policy: str = IMAGE_POLICY
    parts: Any = None  # of a set with a `source`: what another set of this source is opened with


class OwnSet(Section):
    """The config of a set of the user."""

    @property
    def source(self) -> str | None:
        """Sets of one source have the same images and targets, and are encoded once; None: of no other set."""
        return None

    @property
    def scores(self) -> list[str]:
        """Names of the metrics, in order; all are between 0 and 1, and higher is better."""
        raise NotImplementedError

    @property
    def size(self) -> int | None:
        """Images at most, or None where this is not known before the set is opened."""
        raise NotImplementedError


class SetSource(Table):
    """Where the images of a set, or of a part of one, are."""

    limit: int | None = Field(None, ge=1, description="images to use, the first ones")

    @property
    def size(self) -> int | None:
        return self.limit


@dataclass(frozen=True)
class SetKind:
    """A kind of sets: its ``name`` in sets.csv, and ``open``, for a published set; None if no suite has such sets.

    Increase ``version`` with a change of the metrics after which a kept result would be another. If users have sets of
    the kind, ``section`` is the one of a config that has them by name, and ``open_own`` checks such a set and counts
    its images. Its arguments are the config of the set, its name in messages, limits, the folders from which images
    that are stored by reference may be read, and a set of the same source, if one is open.
    """

    name: str
    open: Callable[[SuiteSet, SetFiles], ImageSet] | None
    version: int = 1
    section: str = ""
    open_own: Callable[..., ImageSet] | None = None
