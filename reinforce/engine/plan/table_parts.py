"""Shards that are parts of tables, where ``input.rows_per_shard`` is set: ``lists/parts-<number>.jsonl``.

A list has a line for each file with new rows, and never changes. Rows that are added at the end of a file form new
shards, so finished shards stay valid.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from reinforce.config import Config
from reinforce.dataset.files.store import Store
from reinforce.engine.plan.folder_lists import LIST_BYTES, LISTS, written_lists
from reinforce.errors import UserError
from reinforce.parquet.footers import RefusedFile
from reinforce.source.captions import parse_json
from reinforce.source.formats.base import Part, SourceFormat
from reinforce.source.identity import former_url
from reinforce.source.urls import Info, canonical, filesystem

_THREADS = 16
_PREFIX = "parts-"


@dataclass
class TableShards:
    """The shards of tables: their URLs and parts, None for a whole file, and the list that is not written yet."""

    urls: list[str] = field(default_factory=list)
    parts: list[Part | None] = field(default_factory=list)
    lists: dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class _Table:
    """A file as it was listed: its bytes, and its parts."""

    size: int | None
    parts: tuple[Part, ...] = ()


def table_shards(urls: Sequence[str], config: Config, format_: SourceFormat, listed: Mapping[str, Info]) -> TableShards:
    """Divide tables into parts; a file that cannot be read is one shard, which says so when it is read.

    Only files that are new or have grown are looked into. Raises UserError for a file that has become shorter.
    """
    assert config.input.rows_per_shard is not None
    store, result = Store(config.output), TableShards()
    names = sorted(name for name in written_lists(store) if name.startswith(_PREFIX))
    known = _read_lists(store, names)
    places = [former_url(url, config.moved) for url in urls]
    rows = config.input.rows_per_shard

    def divided(url: str, place: str) -> _Table | None:
        return _divided(url, format_, rows, known.get(place, _Table(None)), listed.get(url))

    with ThreadPoolExecutor(_THREADS) as pool:
        tables = [*pool.map(divided, urls, places)]
    lines = []
    for url, place, table in zip(urls, places, tables, strict=True):
        before = known.get(place, _Table(None))
        if table is None:
            result.urls.append(url)
            result.parts.append(None)
            continue
        if table.parts != (*_at(before.parts, url),):
            new = [part.numbers() for part in table.parts[len(before.parts) :]]
            lines.append(json.dumps({"file": place, "size": table.size, "parts": new}))
        stem = _stem(place, format_)
        result.urls += [f"{url}/{stem}-{number:06d}" for number in range(len(table.parts))]
        result.parts += table.parts
    if lines:
        result.lists[f"{_PREFIX}{len(names):06d}"] = "".join(f"{line}\n" for line in lines).encode()
    return result


def _stem(place: str, format_: SourceFormat) -> str:
    """The name of a file without its ending."""
    name = place.rpartition("/")[2]
    endings = (ending for ending in format_.endings if name.lower().endswith(ending))
    return name[: len(name) - max(map(len, endings), default=0)]


def _divided(url: str, format_: SourceFormat, rows: int, before: _Table, info: Info | None) -> _Table | None:
    """A file with its parts, those that were listed ``before`` first; None if it cannot be read."""
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
    return [Part(url, part.first, part.rows, part.start, part.end, part.header) for part in parts]


def _read_lists(store: Store, names: Sequence[str]) -> dict[str, _Table]:
    """The files of the lists by their places, with their parts. Raises UserError if a list is damaged."""
    known: dict[str, _Table] = {}
    for name in names:
        for line in store.read_bytes(LISTS, f"{name}.jsonl", limit=LIST_BYTES).splitlines():
            try:
                entry = parse_json(line)
                place, size = entry["file"], int(entry["size"])
                parts = tuple(Part(place, *map(int, numbers)) for numbers in entry["parts"])
            except (TypeError, KeyError, ValueError) as error:
                where = store.path(LISTS, name)
                raise UserError(f"{where}.jsonl is damaged. Restore it from a backup or another copy.") from error
            known[place] = _Table(size, (*known.get(place, _Table(None)).parts, *parts))
    return known
