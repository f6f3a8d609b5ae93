"""What a source format offers: recognising, reading, counting and dividing its files; and the samples of any source.

A format is one object. All other code reads sources through it, and never asks which format it is.
"""

from __future__ import annotations

import base64
import contextlib
import glob
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, time
from importlib import import_module
from typing import Any

from reinforce.errors import UserError
from reinforce.source.config import DEFAULT, MODULES, Input, Limits
from reinforce.source.file_types import MANIFEST, METADATA, foreign_name, is_image_name
from reinforce.source.linked_images import Places
from reinforce.source.samples import (
    Item,
    RawSample,
    ReadBudget,
    Refusal,
    UnreadSample,
    as_lines,
    captions_of,
    make_sample,
    refusing_absent,
    texts_of,
    unique_keys,
)
from reinforce.source.urls import Info, canonical, filesystem, list_whole, read_whole
from schemas import Reason


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the table ``file``, a URL: ``rows`` rows from row ``first`` on.

    ``start`` and ``end`` are row groups of Parquet, else bytes of the uncompressed content; the first ``header`` bytes
    have the names of columns.
    """

    file: str
    first: int
    rows: int
    start: int
    end: int
    header: int = 0

    def numbers(self) -> list[int]:
        """The part without its file, for a list."""
        return [self.first, self.rows, self.start, self.end, self.header]


@dataclass(frozen=True)
class Shard:
    """A shard of a source: its URL, its name and the name of its format. Rows without a key get one from the name.

    A shard of a folder has the URL ``FOLDER/<block>``, and ``listing`` is the list of its files: a URL, or the content.
    A shard that is a part of a table has the URL ``TABLE/<part>``, and ``part`` are its rows.
    """

    url: str
    name: str = ""
    format: str = DEFAULT
    listing: str | bytes = ""
    part: Part | None = None

    @property
    def file(self) -> str:
        """The URL of the file that is read; of a folder, that of the shard."""
        return self.part.file if self.part else self.url

    @property
    def folder(self) -> str:
        return self.file.rpartition("/")[0]

    def lines(self) -> list[bytes]:
        """The lines of its list, one for each sample."""
        content = self.listing
        if isinstance(content, str):
            fs, path = filesystem(content)
            content = read_whole(fs, path)
        return content.splitlines()


@dataclass
class ListedSample:
    """The files of one key by extension, each with its path in the folder and its size, and a row of metadata."""

    key: str
    files: dict[str, tuple[str, int]] = field(default_factory=dict)
    row: dict[str, Any] | None = None

    def image(self) -> str:
        """The path of its image, empty if a list that somebody has changed has none."""
        return next((path for extension, (path, _) in self.files.items() if is_image_name(extension)), "")

    def line(self) -> bytes:
        """The sample as a line of JSON, of a list."""
        return json.dumps({"key": self.key, "files": self.files, "row": self.row}, default=str).encode() + b"\n"


def divided(url: str, rows: int, ends: Iterable[tuple[int, int]], last: Part | None, header: int = 0) -> Iterator[Part]:
    """Yield the parts after ``last`` of a table, of at least ``rows`` rows but the last one.

    ``ends`` are the places, as in ``Part.end``, at which the table can be divided, with the rows before each since the
    one before it.
    """
    first, start = (last.first + last.rows, last.end) if last else (0, header)
    count, end = 0, start
    for more, place in ends:
        if place > start:
            count, end = count + more, place
            if count >= rows:
                yield Part(url, first, count, start, end, header)
                first, start, count = first + count, end, 0
    if count:
        yield Part(url, first, count, start, end, header)


class SourceFormat:
    """One format of sources. The defaults are those of files that hold samples and cannot be divided."""

    #: The name in configs, and the word for one of its files in messages.
    name: str
    noun: str
    #: Endings of the names of its files in lower case, and further ones that are read if a config names the format.
    endings: tuple[str, ...] = ()
    other_endings: tuple[str, ...] = ()
    #: Endings of names that several formats share, whose files are of this one if it recognises their content.
    content_endings: tuple[str, ...] = ()
    #: Whether all files of a source are read as this format if one is by its name.
    prevails: bool = False
    #: Whether each row of a file is a sample, with columns. Such a file can be divided into parts.
    is_table: bool = False
    #: Bytes above which a file is worth several shards.
    whole_bytes: int | None = None
    #: Whether a shard is a list of files of a folder, and no file.
    is_listed: bool = False
    #: Whether ``RawSample.offset`` is the place of the image in the file, from which it can be read again.
    has_offsets: bool = False
    #: Whether images can be stored by reference.
    referable: bool = False
    #: Whether ``input.view`` can choose samples of it.
    has_views: bool = False

    def read(self, shard: Shard, spec: Input, budget: ReadBudget | None = None, images: bool = True) -> Iterator[Item]:
        """Yield the samples of a shard in order, each key once, with refusals in between.

        ``budget`` bounds the bytes that are read before the first sample. Without ``images``, samples may lack theirs,
        where that is less work. Damage is yielded as a Refusal without a key. Raises the errors of the storage.
        """
        return unique_keys(self.items(shard, spec), spec.limits)

    def items(self, shard: Shard, spec: Input) -> Iterator[Item]:
        """Yield the samples of a shard, whose keys may come again, as ``read`` does."""
        raise NotImplementedError

    def recognises(self, head: bytes) -> bool:
        """Whether a file begins with ``head``, its first bytes, in this format alone."""
        return False

    def recognises_folder(self, fs: Any, path: str) -> bool:
        """Whether a folder as a whole is a source of this format. Raises the errors of the storage."""
        return False

    def notes(self, url: str) -> list[str]:
        """Possible misreadings of a file, for the user. Raises the errors of the storage."""
        return []

    def foreign(self, url: str) -> str | None:
        """The type of a file whose name has no format's ending; None if it may have this format."""
        kind = foreign_name(url)
        return None if kind is None else f"{kind.partition(',')[0]}, not a {self.noun}"

    def shard_urls(
        self,
        urls: list[str],
        spec: Input,
        read_manifest: Callable[[str], Mapping[str, Any]],
        listed: dict[str, Info] | None = None,
    ) -> list[str]:
        """The URLs of the shards of the entries of ``source``; ``read_manifest`` reads the manifest of a dataset, and
        ``listed`` is as in ``expand``. Raises UserError.
        """
        return urls

    def count(self, url: str, spec: Input) -> int | None:
        """Number of samples of a file, or None if it cannot be read. Raises the errors of the storage.

        Of a table its rows, unless those of one image become one sample.
        """
        keys = {item.key for item in self.read(Shard(url, format=self.name), spec, images=False)}
        return min(len(keys - {None}), spec.limits.shard_samples) or None

    def parts(self, url: str, rows: int, last: Part | None = None) -> Iterator[Part]:
        """Of a table: yield its parts of ``rows`` rows, or more where it cannot be divided there, but the last one.

        With ``last``, the parts of the rows after it. Raises RefusedFile, EOFError and csv.Error for damage, and the
        errors of the storage.
        """
        raise NotImplementedError

    def first_row(self, url: str) -> tuple[list[str], Mapping[str, Any]] | None:
        """The binary columns of a table, and a value of each column of its first row; None if it has no row.

        Raises RefusedFile, EOFError, and the errors of the storage.
        """
        raise NotImplementedError

    def list_folder(
        self, url: str, spec: Input, output: str = "", listed: Sequence[ListedSample] = ()
    ) -> tuple[list[ListedSample], list[str]]:
        """List a folder with all folders in it, but hidden ones and ``output``, a canonical URL. Raises UserError.

        Returns the samples in the order of their paths, without those that are ``listed`` already, and notes on files
        that are left out.
        """
        raise NotImplementedError


_MOST_CAPTIONS = 64  # of a sample, as in the config
_FIRST_ROWS = 8


def read_samples(shard: Shard, spec: Input, budget: ReadBudget | None = None) -> Iterator[RawSample | Refusal]:
    """Yield the samples of a shard in order, with refusals in between, as ``read_shard`` does for tars.

    In tables each row is a sample; a key that occurs again is refused. ``budget`` bounds what is read of a tar; of the
    other formats little is read before the first sample.
    """
    format_ = find_format(shard.format)
    samples = format_.read(shard, spec, budget)
    if format_.is_table:
        samples = _with_images(samples, shard.file, spec)
    return refusing_absent(shard.file, samples)  # type: ignore[arg-type]  # only tables name files of images


@dataclass(frozen=True)
class SeveralCaptions:
    """True captions of the first samples of a shard: of each the texts at the first place that has some.

    ``rows`` is whether several rows of a table name one image, and are a sample each unless captions are kept together;
    ``most`` is the largest number of texts of a sample.
    """

    texts: Sequence[Sequence[str]]
    rows: bool
    most: int


def find_several(shard: Shard, spec: Input, samples: Sequence[RawSample]) -> SeveralCaptions:
    """Find the captions of ``samples``, the first ones of a shard; of a table those of more, without their images.

    Raises the errors of the storage.
    """
    items: Iterable[Item] = samples
    rows = False
    format_ = find_format(shard.format)
    if format_.is_table:
        wide = spec.model_copy(update={"captions_per_sample": _MOST_CAPTIONS})
        items = [*itertools.islice(format_.read(shard, wide), _FIRST_ROWS)]
        apart = spec.model_copy(update={"captions_per_sample": None, "key": None})
        images = [
            None if isinstance(item, Refusal) else item.image if isinstance(item, RawSample) else item.location
            for item in itertools.islice(format_.read(shard, apart), 2)
        ]
        rows = images[1:] == images[:1] != [None]
    texts = []
    for item in items:
        if not isinstance(item, Refusal):
            sidecars = item.all_sidecars if isinstance(item, RawSample) else item.sidecars
            found = (captions_of(sidecars, [place], spec.limits, _MOST_CAPTIONS) for place in spec.caption_fields)
            texts.append(next(filter(None, found), []))
    return SeveralCaptions(texts, rows, max(map(len, texts), default=0))


def _with_images(items: Iterator[Item], table: str, spec: Input) -> Iterator[RawSample | Refusal]:
    """Yield the items; images in files of their own are read."""
    for item in items:
        if isinstance(item, UnreadSample):
            yield from Places(table, spec).samples(itertools.chain([item], items))
            return
        yield item


#: Names of columns with images, with their places, and with keys: upper or lower case, in the order of preference.
IMAGES = ("image", "jpg", "jpeg", "png", "webp", "img", "image_bytes", "image_base64")
PLACES = ("file_name", "filename", "image_path", "filepath", "path", "image_url", "url", "image_name")
KEYS = ("key", "__key__", "uid")

_SHOWN_COLUMNS = 30
_LONGEST_PLACE = 4096


class NoColumn(ValueError):
    """A table that lacks a column that is needed, or has it with another type."""


@dataclass(frozen=True)
class Columns:
    """The columns of a table that are read. ``texts`` maps caption fields without ``json:`` to their columns;
    ``metadata`` are those of the json member, which has that of the image where it is a path or URL, ``all`` names all
    columns, for messages, and ``captions`` those with captions."""

    image: str
    key: str | None
    texts: Mapping[str, str]
    metadata: tuple[str, ...]
    all: tuple[str, ...]
    captions: tuple[str, ...] = ()

    @property
    def read(self) -> set[str]:
        """Every column that is needed."""
        return {self.image, *self.texts.values(), *self.metadata} | ({self.key} if self.key else set())


def find_columns(names: Sequence[str], spec: Input, plain: Sequence[str] | None = None) -> Columns:
    """The columns of a table with these ``names`` by a config; ``plain`` are those that metadata can be read from.

    Raises NoColumn.
    """
    image = _named(names, spec.image, "input.image", (*IMAGES, *PLACES))
    if image is None:
        raise NoColumn(f"no column has images: it has {_listed(names)}; name one in input.image")
    key = _named(names, spec.key, "input.key", KEYS)
    fields = [place.partition(":") for place in spec.caption_fields]
    texts = {}
    for place in (name for name, is_json, _ in fields if not is_json):
        column = next((c for c in (place, "text" if place == "txt" else "") if c in names and c != image), None)
        if column is not None:
            texts[place] = column
    wanted = {name for extension, is_json, name in fields if is_json and extension == "json"}
    if spec.metadata == "all":
        wanted |= {*names}
    elif spec.metadata != "none":
        wanted |= {*spec.metadata}
    metadata = tuple(name for name in (names if plain is None else plain) if name in wanted)
    captions = (*texts.values(), *(name for _, is_json, name in fields if is_json and name in metadata))
    return Columns(image, key, texts, metadata, tuple(names), captions)


def joined_rows(rows: Iterable[Any], find: Callable[[Sequence[str]], Columns], spec: Input) -> Iterator[Any]:
    """Make one row of rows with equal images that follow one another, with a list of their captions in each column.

    ``rows`` are (number, row) and faults; ``find`` finds the columns of a row by their names. Faults and rows without
    an image divide no others: they are yielded at once, before the row that is being made. Without
    ``captions_per_sample``, the rows as they are.
    """
    most = spec.captions_per_sample
    if most is None:
        yield from rows
        return
    held: tuple[int, dict[str, Any]] | None = None
    image_of_held: Any = None
    for item in rows:
        row = item[1] if isinstance(item, tuple) and isinstance(item[1], Mapping) else None
        columns: Columns | None = None
        with contextlib.suppress(NoColumn):  # which reading the row refuses
            columns = find([*row]) if row is not None else None
        image = row.get(columns.image) if row is not None and columns else None
        if row is None or columns is None or not (any(image.values()) if isinstance(image, dict) else image):
            yield item
        elif held and image == image_of_held:
            add_captions(held[1], row, columns.captions, most)
        else:
            if held:
                yield held
            held, image_of_held = (item[0], dict(row)), image
    if held:
        yield held


def add_captions(row: dict[str, Any], other: Mapping[str, Any], names: Sequence[str], most: int) -> None:
    """Add the captions of another row to a row, up to ``most`` in a column."""
    for name in names:
        known = texts_of(row.get(name))
        row[name] = [*known, *(text for text in texts_of(other.get(name)) if text not in known)][
            : max(most, len(known))
        ]


def sample_of_row(
    shard: str, number: int, row: Mapping[str, Any], columns: Columns, spec: Input
) -> RawSample | UnreadSample | Refusal:
    """The sample of row ``number`` of a shard, of whose name the key of a row without one is made."""
    value = row.get(columns.key) if columns.key else None
    key = f"{shard}-{number:08d}" if value is None or value == "" else str(value)
    image, named = row.get(columns.image), columns.image.lower() in PLACES
    if isinstance(image, dict):
        named = image.get("bytes") is None
        image = image.get("path") if named else image.get("bytes")
    place = None
    if isinstance(image, str) and not image.startswith("data:") and (named or is_place(image)):
        place = image  # and no URL that holds the image itself
    sidecars, left_out = _sidecars(key, row, columns, place, spec)
    if place is not None:
        return UnreadSample(key, place, sidecars, left_out, columns.all)
    if isinstance(image, str):
        image = _from_base64(image, spec.limits)
    if isinstance(image, Refusal):
        return Refusal(key, image.reason, f"column {columns.image}: {image.detail}")
    if not isinstance(image, bytes):
        what = "null" if image is None else f"of type {type(image).__name__}"
        return Refusal(key, Reason.NO_IMAGE, f"column {columns.image} is {what}")
    return make_sample(UnreadSample(key, "", sidecars, left_out, columns.all), image, spec.limits)


def _sidecars(
    key: str, row: Mapping[str, Any], columns: Columns, place: str | None, spec: Input
) -> tuple[dict[str, bytes], dict[str, Refusal]]:
    """The texts and the metadata of a row, and what is above the limit of them."""
    found: dict[str, bytes] = {}
    for text_field, column in columns.texts.items():
        value = row.get(column)
        if spec.captions_per_sample is not None:
            value = as_lines(value)
        elif isinstance(value, list):  # several captions
            value = next((one for one in value if isinstance(one, str) and one.strip()), None)
        if isinstance(value, str):
            found[text_field] = value.encode("utf-8", "replace")
    document = {name: row[name] for name in columns.metadata if name in row and name != columns.image}
    if place is not None and columns.image in columns.metadata:
        document[columns.image] = place
    if document:
        found["json"] = json.dumps(document, default=_plain).encode()  # lone surrogates stay, as escapes
    limit = spec.limits.sidecar_bytes
    left_out = {
        name: Refusal(key, Reason.SIDECAR_BYTES, f"{name}: {len(data)} bytes, above limits.sidecar_bytes of {limit}")
        for name, data in found.items()
        if len(data) > limit
    }
    return {name: data for name, data in found.items() if name not in left_out}, left_out


def is_place(text: str) -> bool:
    """Whether a text is a path or URL, and not a base64 image: these contain neither a dot nor ``://``."""
    head = text[:_LONGEST_PLACE]
    return not head.startswith("data:") and ("." in head or "://" in head)


def _named(names: Sequence[str], configured: str | None, key: str, known: Sequence[str]) -> str | None:
    """The configured column, else the first of the known ones. Raises NoColumn if the configured one is missing."""
    if configured is not None:
        if configured not in names:
            raise NoColumn(f"{key}: there is no column {configured!r}; it has {_listed(names)}")
        return configured
    lower = {name.lower(): name for name in reversed(names)}
    return next((lower[name] for name in known if name in lower), None)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN_COLUMNS} more" if len(names) > _SHOWN_COLUMNS else ""
    return ", ".join(name[:100] for name in names[:_SHOWN_COLUMNS]) + more


def _from_base64(text: str, limits: Limits) -> bytes | Refusal:
    if text.startswith("data:"):
        text = text.partition(",")[2]
    if len(text) * 3 // 4 > limits.image_bytes + 2:
        detail = f"{len(text)} base64 characters, above limits.image_bytes of {limits.image_bytes} bytes"
        return Refusal(None, Reason.IMAGE_BYTES, detail)
    with contextlib.suppress(ValueError):
        return base64.b64decode(text, validate=True)
    if text.isascii():
        with_others = text.translate({ord("-"): "+", ord("_"): "/", ord("\n"): None, ord("\r"): None})
        with contextlib.suppress(ValueError):
            return base64.b64decode(with_others + "=" * (-len(with_others) % 4), validate=True)
    return Refusal(None, Reason.IMAGE_BROKEN, f"neither base64 nor a path or URL: {text[:40]!r}")


def _plain(value: Any) -> Any:
    """A value that JSON has no type for."""
    if isinstance(value, date | time):
        return value.isoformat()
    return None if isinstance(value, bytes | bytearray) else str(value)


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
    """The format of all files of a source, by the config, the names of the files, or the content of the first one.

    It is the default if the first file or folder is not recognised or cannot be read.
    """
    if named is not None:
        return find_format(named)
    known = all_formats()
    first = None
    for url in urls:
        found = format_of_name(url, known)
        if found and found.prevails:
            return found
        first = first or found
    if first:
        return first
    url = urls[0]
    is_foreign = foreign_name(url) is not None
    known = [one for one in known if not is_foreign or _name(url).endswith(one.content_endings)]
    if known:
        try:
            fs, path = filesystem(url)
            if fs.isfile(path):
                head = fs.read_block(path, 0, _FIRST_BYTES)
                first = next((one for one in known if one.recognises(head)), None)
            elif fs.isdir(path) and not is_foreign:
                first = format_of_folder(fs, path.rstrip("/"))
        except Exception:  # each driver has its own exceptions; reading reports them
            first = None
    return first or find_format(DEFAULT)


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
        is_hidden = any(part.startswith((".", "_")) for part in file.split("/"))
        if is_hidden or name in METADATA or file.startswith(tuple(inner)):
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
    folders, endings = set(), set()
    for file in files:
        folder, _, name = file.rpartition("/")
        parts = name.split(".")
        is_packed = len(parts) > 2 and parts[-1] in ("gz", "xz", "bz2", "zst", "zstd")
        folders.add(folder)
        endings.add("." + ".".join(parts[-2:]) if is_packed else os.path.splitext(name)[1])
    ending = min(endings, key=len)  # the extensions that all names have, such as .tar or .jsonl.gz
    if len(endings) > 1:
        ending = f"{ending}*" if all(one.startswith(ending) for one in endings) else ".*"
    pattern = f"{'train' if train else ''}*{ending}"
    if len(folders) > 1:
        return f"**/{pattern}"
    only = folders.pop()
    return f"{glob.escape(only)}/{pattern}" if only else pattern
