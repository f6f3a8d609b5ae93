"""Lists that freeze the shards of a source: ``lists/<name>.jsonl`` in the dataset.

``lists/<shard>.jsonl`` has the files of a shard of a folder of images. Where ``input.rows_per_shard`` is set,
``lists/parts-<number>.jsonl`` has a line for each table with new rows, which are divided into parts. A list is written
before its shards are computed, and never changes. Files and rows that are added later form new shards, so finished
shards stay valid.
"""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import pyarrow as pa

from reinforce.config import Config
from reinforce.dataset.files.store import Store
from reinforce.errors import UserError
from reinforce.parquet.footers import RefusedFile
from reinforce.source.captions import parse_json
from reinforce.source.formats.base import ListedSample, Part, SourceFormat
from reinforce.source.identity import former_url
from reinforce.source.urls import Info, canonical, filesystem, shard_name

T = TypeVar("T")
#: Samples of a shard of a folder.
BLOCK = 2048
_LISTS = "lists"
_PARTS = "parts-"
_LIST_BYTES = 2**28  # that are read
_THREADS = 16


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

    def part(self, row: int) -> Part | None:
        """The part of a table that a shard is, None if it is a whole file."""
        return self.parts[row] if self.parts else None


def write_lists(store: Store, lists: Mapping[str, bytes]) -> None:
    """Write new lists. Raises UserError if another run has written one in the meantime."""
    for name, content in lists.items():
        if not store.create(content, _LISTS, f"{name}.jsonl"):
            raise UserError(f"{store.path(_LISTS, name)}.jsonl was written by another run. Run the same command again.")


def list_url(config: Config, shard: str) -> str:
    return f"{config.output.rstrip('/')}/{_LISTS}/{shard}.jsonl"


def _written_lists(store: Store) -> set[str]:
    return {name.removesuffix(".jsonl") for name in store.names(_LISTS)}


def folder_shards(folders: Sequence[str], config: Config, format_: SourceFormat) -> SourceShards:
    """List folders, and form shards of the files that are in no list of the dataset. Raises UserError."""
    store, result = Store(config.output), SourceShards(format_)
    written = _written_lists(store)

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
    for line in store.read_bytes(_LISTS, f"{name}.jsonl", limit=_LIST_BYTES).splitlines():
        try:
            yield read(parse_json(line))
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            where = store.path(_LISTS, name)
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


def table_shards(
    urls: Sequence[str], config: Config, format_: SourceFormat, listed: Mapping[str, Info]
) -> SourceShards:
    """Divide tables into parts; a file that cannot be read is one shard, which is refused when it is read.

    Only files that are new or have grown are looked into. Raises UserError for a file that has become shorter.
    """
    assert config.input.rows_per_shard is not None
    store, result = Store(config.output), SourceShards(format_)
    names = sorted(name for name in _written_lists(store) if name.startswith(_PARTS))
    known: dict[str, _Table] = {}
    for name in names:
        for place, table in _entries(store, name, _table_of):
            known[place] = _Table(table.size, (*known.get(place, _NEW).parts, *table.parts))
    places = [former_url(url, config.moved) for url in urls]
    rows = config.input.rows_per_shard

    def divide(url: str, place: str) -> _Table | None:
        return _divided(url, format_, rows, known.get(place, _NEW), listed.get(url))

    with ThreadPoolExecutor(_THREADS) as pool:
        divided = [*pool.map(divide, urls, places)]
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
        stem = _stem(place, format_)
        result.urls += [f"{url}/{stem}-{number:06d}" for number in range(len(found.parts))]
        result.parts += found.parts
    if lines:
        result.lists[f"{_PARTS}{len(names):06d}"] = "".join(f"{line}\n" for line in lines).encode()
    return result


def _stem(place: str, format_: SourceFormat) -> str:
    """The name of a file without its ending."""
    name = place.rpartition("/")[2]
    endings = (ending for ending in format_.endings if name.lower().endswith(ending))
    return name[: len(name) - max(map(len, endings), default=0)]


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
