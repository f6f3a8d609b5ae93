"""The shards of a source: its format, its files, the names of its shards, and lists that freeze them.

``lists/<shard>.jsonl`` in the dataset has the files of a shard of a folder of images. Where ``input.rows_per_shard``
is set, ``lists/parts-<number>.jsonl`` has a line for each table with new rows, which are divided into parts. A list
is written before its shards are computed, and never changes. Files and rows that are added later form new shards, so
finished shards stay valid. The lists are deleted with the layer of samples.

A dataset is not written where a run reads its source: its files would be taken for those of the source.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import PurePath, PurePosixPath
from typing import Any, TypeVar

import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from reinforce.config import Config
from reinforce.dataset.manifest import read_manifest
from reinforce.dataset.store import LISTS, Store
from reinforce.dataset.view import View, open_view
from reinforce.errors import UserError
from reinforce.source.formats.base import ListedSample, Part, SourceFormat, expand_folders, find_format, source_format
from reinforce.source.parquet_file import RefusedFile
from reinforce.source.references import former_url, former_urls
from reinforce.source.samples import parse_json
from reinforce.source.urls import (
    Info,
    canonical,
    expand,
    expand_braces,
    filesystem,
    find_unreferable,
    has_glob,
    shard_name,
    shard_names,
    split_view,
    with_fingerprint,
)
from reinforce.storage import JOB_VARIABLE, is_job_folder

_SPECIAL = re.compile(r"[*?\[{]")
_WRITTEN = ("parquet", "json", "jsonl")

T = TypeVar("T")
#: Samples of a shard of a folder.
BLOCK = 2048
_PARTS = "parts-"
_LIST_BYTES = 2**28  # that are read
_THREADS = 16


def check_output(config: Config) -> None:
    """Raise UserError if ``output`` is, contains, or is in what the config names to be read."""
    for relation, read in overlaps(config):
        raise UserError(
            f"output: {canonical(config.output)} {relation} {read}, so that a run would write among the files that it "
            "reads. Set `output` to a folder that is neither in nor above them."
        )


def overlaps(config: Config) -> Iterator[tuple[str, str]]:
    """How ``output`` overlaps each entry of the config that it is not apart from, in words, and the entry after its
    key."""
    output = _place(config.output)
    named: list[tuple[str, str]] = []
    for key, value in (("source", config.source), ("reinforcements", config.reinforcements)):
        named += [(key, entry.strip()) for entry in ([value] if isinstance(value, str) else value or ())]
    named += [(f"labels.{name}.url", labels.url) for name, labels in config.labels.items()]
    for key, entry in named:
        relation = next(filter(None, (_relation(output, url) for url in _urls_of(entry, output))), None)
        if relation is not None:
            yield relation, f"{key} {canonical(entry)}"


def _urls_of(entry: str, output: PurePath) -> Iterator[str]:
    """The URLs and patterns that an entry stands for; the entry itself where none of them can be in ``output``."""
    folder = _SPECIAL.split(entry, maxsplit=1)[0].rpartition("/")[0]
    if entry.partition("?")[0].endswith(".txt"):
        yield from _decisive(expand(entry, None, find_format("csv").recognises), output)
        return
    above = _place(folder or ".")
    if "{" in entry and (folder.endswith(":/") or above.is_relative_to(output) or output.is_relative_to(above)):
        yield from _decisive(expand_braces(entry, entry), output)
    else:
        yield entry


def _decisive(urls: Iterable[str], output: PurePath) -> Iterator[str]:
    """One URL of each folder, as they are in ``output`` together, and those that may be a folder above it by name."""
    folders, names = set(), {*output.parts}
    for url in urls:
        folder, _, name = url.rstrip("/").rpartition("/")
        if folder not in folders or name in names or "**" in name:
            folders.add(folder)
            yield url


def _relation(output: PurePath, url: str) -> str | None:
    """How the place of a dataset overlaps a URL or pattern that is read, in words; None if they are apart."""
    read = _place(url)
    patterns = next((n for n, part in enumerate(read.parts) if has_glob(url) and has_glob(part)), None)
    if patterns is not None:
        if PurePosixPath(*read.parts[:patterns]).is_relative_to(output):
            return "contains the files of"
        return "is among the files of" if _matches_inside(read.parts, output.parts) else None
    if output == read:
        return "is the same as"
    if output.is_relative_to(read):
        return "is inside"
    return "contains" if read.is_relative_to(output) else None


def _matches_inside(pattern: Sequence[str], folder: Sequence[str]) -> bool:
    """Whether a pattern can match files of a dataset in a folder; both are the parts of paths."""
    for n, name in enumerate(folder):
        if n < len(pattern) and "**" in pattern[n]:
            return True
        if n >= len(pattern) - 1 or not fnmatchcase(name, pattern[n]):
            return False
    extension = pattern[-1].rpartition(".")[2]
    return has_glob(extension) or extension in _WRITTEN


def _place(url: str) -> PurePath:
    """Protocol and path of a URL or pattern, without links of local disks."""
    fs, path = filesystem(canonical(url).rpartition("::")[2])
    if isinstance(fs, LocalFileSystem):
        return PurePosixPath(os.path.realpath(path))
    protocol = fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0]
    return PurePosixPath(f"{protocol}://{path.strip('/')}")


def source_shards(config: Config, listed: dict[str, Info] | None = None) -> SourceShards:
    """Names and URLs of the source's shards; ``listed`` as in ``expand``.

    Raises UserError if the source is empty, two shards have the same name, or Ray deletes a shard after the job.
    """
    source, notes = expand_folders(config.source, config.input.format)
    urls = expand(source, listed, find_format("csv").recognises)
    for url in urls if JOB_VARIABLE in os.environ else ():
        path = canonical(url)
        if path.startswith(os.sep) and (is_job_folder(url) or is_job_folder(path)):
            raise UserError(  # in the next job the shard would have another name
                f"source {path} is in the temporary folder of a Ray job. Shards are named after their paths, "
                "so every job would compute them again. Set `source` to an absolute path that every node reaches, or "
                "to a URL such as s3://BUCKET/FOLDER."
            )
    format_ = source_format(urls, config.input.format)
    if not config.embeds_images:
        if not format_.referable:
            raise UserError(
                "source: images: reference needs files that hold the images as they are: uncompressed tars, or images; "
                f"{canonical(urls[0])} is a {format_.noun}; set images: embed"
            )
        packed, private = find_unreferable(urls)
        if format_.has_offsets and packed:
            raise UserError(
                f"source: images: reference needs uncompressed .tar shards, and {canonical(packed)} is compressed; set "
                "images: embed"
            )
        if private:
            raise UserError(
                f"source: images: reference stores URLs without user, password and query, and {canonical(private)} "
                "cannot be read without them; give credentials by the environment (AWS_ACCESS_KEY_ID, or fsspec's "
                "configuration), or set images: embed"
            )
    urls = format_.shard_urls(urls, config.input, lambda url: _manifest_of_source(url, config), listed)
    if config.input.view is not None:
        kept = _view_of_source(config).kept
        names = [url.rpartition("/")[2].removesuffix(".parquet") for url in urls]
        if newer := sum(name not in kept for name in names):
            seen = f"{newer:,} of {len(urls):,} shards are newer than view {config.input.view} and are not read"
            notes = [*notes, f"source: {seen}"]
        urls = [url for url, name in zip(urls, names, strict=True) if any(kept.get(name, ()))]
    if config.input.rows_per_shard is not None and format_.is_table:
        found = _table_shards(urls, config, format_, listed or {})
    else:
        found = _folder_shards(urls, config, format_) if format_.is_listed else SourceShards(format_, urls)
    found.names = pa.array(shard_names(former_urls(found.urls, config.moved)), pa.string())
    found.notes = [*notes, *found.notes]
    return found


def with_view(config: Config) -> Config:
    """The config with the fingerprint of ``input.view``, on which the samples depend.

    Raises UserError if ``source`` is no dataset with this view, or the view is not what it was made as.
    """
    if config.input.view is None:
        return config
    view = _view_of_source(config)
    found = config.input.model_copy(update={"view": with_fingerprint(view.name, view.fingerprint)})
    return config.model_copy(update={"input": found})


def _view_of_source(config: Config) -> View:
    urls = expand(config.source)
    if urls[1:] or not source_format(urls, config.input.format).has_views:
        raise UserError(
            f"input.view: a view is of one reinforced dataset, and source has {canonical(urls[0])}"
            f"{f' and {len(urls) - 1:,} more' if urls[1:] else ''}. Set source to a dataset, or remove input.view."
        )
    name, fingerprint = split_view(str(config.input.view))
    view = open_view(Store(urls[0]), _manifest_of_source(urls[0], config), name)
    if fingerprint not in ("", view.fingerprint):
        raise UserError(
            f"input.view: view {name} of {canonical(urls[0])} was made again: it has fingerprint {view.fingerprint} "
            f"now. Set input.view to {name}, and another output."
        )
    return view


def _manifest_of_source(url: str, config: Config) -> Mapping[str, Any]:
    """The manifest of a reinforced dataset that is a source. Raises UserError."""
    if canonical(url) == canonical(config.output):
        raise UserError(f"source: {canonical(url)} is the output of this run, too. Set another `output`.")
    return read_manifest(Store(url))


@dataclass
class SourceShards:
    """The shards of a source in order: their format, their URLs and their names.

    ``parts`` are those of tables that are divided, None for a whole file, ``lists`` those that are not written yet, by
    name, and ``notes`` are for the user.
    """

    format: SourceFormat
    urls: list[str] = field(default_factory=list)
    parts: list[Part | None] = field(default_factory=list)
    lists: dict[str, bytes] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    names: pa.StringArray = field(default_factory=lambda: pa.array([], pa.string()))


def write_lists(store: Store, lists: Mapping[str, bytes]) -> None:
    """Write new lists. Raises UserError if another run has written one in the meantime."""
    for name, content in lists.items():
        if not store.create(content, LISTS, f"{name}.jsonl"):
            raise UserError(f"{store.path(LISTS, name)}.jsonl was written by another run. Run the same command again.")


def list_url(config: Config, shard: str) -> str:
    return f"{config.output.rstrip('/')}/{LISTS}/{shard}.jsonl"


def _folder_shards(folders: Sequence[str], config: Config, format_: SourceFormat) -> SourceShards:
    """List folders, and form shards of the files that are in no list of the dataset. Raises UserError."""
    store, result = Store(config.output), SourceShards(format_)
    written = {name.removesuffix(".jsonl") for name in store.names(LISTS)}

    def block(url: str, number: int) -> tuple[str, str]:
        """The URL and the name of a shard of a folder."""
        shard = f"{url.rstrip('/')}/block-{number:06d}"
        return shard, shard_name(former_url(shard, config.moved))

    for url in folders:
        numbered = (block(url, number) for number in itertools.count())
        known = [*itertools.takewhile(lambda one: one[1] in written, numbered)]
        listed = [sample for _, name in known for sample in _entries(store, name, _sample_of)]
        samples, notes = format_.list_folder(url, config.input, canonical(config.output), listed)
        result.notes.extend(notes)
        result.urls += [shard for shard, _ in known]
        for first in range(0, len(samples), BLOCK):
            shard, name = block(url, len(known) + first // BLOCK)
            result.urls.append(shard)
            result.lists[name] = b"".join(sample.line() for sample in samples[first : first + BLOCK])
    return result


def _entries(store: Store, name: str, read: Callable[[Any], T]) -> Iterator[T]:
    """What ``read`` makes of the JSON of each line of a list. Raises UserError if the list is damaged."""
    for line in store.read_bytes(LISTS, f"{name}.jsonl", limit=_LIST_BYTES).splitlines():
        try:
            yield read(parse_json(line))
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            where = store.path(LISTS, name)
            raise UserError(f"{where}.jsonl is damaged. Restore it from a backup or another copy.") from error


def _sample_of(entry: Any) -> ListedSample:
    files = {str(extension): (str(path), int(size)) for extension, (path, size) in entry["files"].items()}
    return ListedSample(str(entry["key"]), files)


@dataclass(frozen=True)
class _Table:
    """A file as it was listed: its bytes, and its parts."""

    size: int | None
    parts: tuple[Part, ...] = ()


_NEW = _Table(None)


def _table_of(entry: Any) -> tuple[str, _Table]:
    """The place of a file, and what a list has of it."""
    parts = tuple(Part(entry["file"], *map(int, numbers)) for numbers in entry["parts"])
    return entry["file"], _Table(int(entry["size"]), parts)


def _table_shards(
    urls: Sequence[str], config: Config, format_: SourceFormat, listed: Mapping[str, Info]
) -> SourceShards:
    """Divide tables into parts; a file that cannot be read is one shard, which is refused when it is read.

    Only files that are new or have grown are looked into. Raises UserError for a file that has become shorter.
    """
    assert config.input.rows_per_shard is not None
    store, result = Store(config.output), SourceShards(format_)
    names = sorted(name.removesuffix(".jsonl") for name in store.names(LISTS) if name.startswith(_PARTS))
    known: dict[str, _Table] = {}
    for name in names:
        for place, table in _entries(store, name, _table_of):
            known[place] = _Table(table.size, (*known.get(place, _NEW).parts, *table.parts))
    places = [former_url(url, config.moved) for url in urls]
    rows = config.input.rows_per_shard
    with ThreadPoolExecutor(_THREADS) as pool:
        befores, infos = [known.get(place, _NEW) for place in places], map(listed.get, urls)
        divided = [*pool.map(_divided, urls, itertools.repeat(format_), itertools.repeat(rows), befores, infos)]
    lines = []
    for url, place, found in zip(urls, places, divided, strict=True):
        if found is None:
            result.urls.append(url)
            result.parts.append(None)
            continue
        before = known.get(place, _NEW).parts
        if found.parts != (*_at(before, url),):
            new = [part.numbers() for part in found.parts[len(before) :]]
            lines.append(json.dumps({"file": place, "size": found.size, "parts": new}))
        file = place.rpartition("/")[2]
        endings = (ending for ending in format_.endings if file.lower().endswith(ending))
        stem = file[: len(file) - max(map(len, endings), default=0)]
        result.urls += [f"{url}/{stem}-{number:06d}" for number in range(len(found.parts))]
        result.parts += found.parts
    if lines:
        result.lists[f"{_PARTS}{len(names):06d}"] = "".join(f"{line}\n" for line in lines).encode()
    return result


def _divided(url: str, format_: SourceFormat, rows: int, before: _Table, info: Info | None) -> _Table | None:
    """A file with its parts: those of ``before``, then new ones. None if it cannot be read."""
    try:
        fs, path = filesystem(url)
        size = int((info or fs.info(path)).get("size") or 0)
        if before.size is not None and size < before.size:
            raise UserError(
                f"source: {canonical(url)} has {size:,} bytes, and had {before.size:,} when its shards were formed. "
                "Rows may be added at its end only. Restore it, or write to another `output`."
            )
        old = _at(before.parts, url)
        new = [] if size == before.size else [*format_.parts(url, rows, old[-1] if old else None)]
        return _Table(size, (*old, *new)) if old or new else None
    except UserError:
        raise
    except RefusedFile as error:
        if before.parts:
            raise UserError(f"source: {canonical(url)}: {error}. Restore it, or write to another `output`.") from error
        return None
    except (csv.Error, EOFError, OSError):
        if before.parts:
            return _Table(before.size, (*_at(before.parts, url),))  # each shard reports the error
        return None


def _at(parts: Sequence[Part], url: str) -> list[Part]:
    """Parts of a file that is now at ``url``."""
    return [replace(part, file=url) for part in parts]
