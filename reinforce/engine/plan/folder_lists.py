"""Lists of the files of each shard of a folder of images: ``lists/<shard>.jsonl`` in the dataset.

A list is written before its shard is computed, and never changes. Files that are added to the folder later form new
shards, so finished shards stay valid.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from reinforce.config import Config
from reinforce.dataset.files.store import Store
from reinforce.errors import UserError
from reinforce.source.captions import parse_json
from reinforce.source.formats.base import ListedSample, SourceFormat
from reinforce.source.identity import former_url
from reinforce.source.urls import canonical, shard_name

LISTS = "lists"
#: Samples of a shard.
BLOCK = 2048
#: Bytes of a list that are read.
LIST_BYTES = 2**28


@dataclass(frozen=True)
class FolderShards:
    """The shards of folders: their URLs, the lists that are not written yet by shard, and notes for the user."""

    urls: list[str] = field(default_factory=list)
    lists: dict[str, bytes] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def folder_shards(folders: Sequence[str], config: Config, format_: SourceFormat) -> FolderShards:
    """List folders, and form shards of the files that are in no list of the dataset. Raises UserError."""
    store, result = Store(config.output), FolderShards()
    written = written_lists(store)
    for url in folders:
        folder = format_.list_folder(url, config.input, canonical(config.output))
        result.notes.extend(folder.notes)
        listed: set[str] = set()
        for number in itertools.count():
            shard = f"{url.rstrip('/')}/block-{number:06d}"
            name = shard_name(former_url(shard, config.moved))
            if name in written:
                listed |= _keys(store, name)
                result.urls.append(shard)
                continue
            blocks = _blocks([sample for sample in folder.samples if sample.key not in listed])
            for content, at in zip(blocks, itertools.count(number), strict=False):
                shard = f"{url.rstrip('/')}/block-{at:06d}"
                result.urls.append(shard)
                result.lists[shard_name(former_url(shard, config.moved))] = content
            break
    return result


def write_lists(store: Store, lists: Mapping[str, bytes]) -> None:
    """Write new lists. Raises UserError if another run has written one in the meantime."""
    for name, content in lists.items():
        if not store.create(content, LISTS, f"{name}.jsonl"):
            raise UserError(f"{store.path(LISTS, name)}.jsonl was written by another run. Run the same command again.")


def list_url(config: Config, shard: str) -> str:
    """The URL of the list of a shard."""
    return f"{config.output.rstrip('/')}/{LISTS}/{shard}.jsonl"


def written_lists(store: Store) -> set[str]:
    """The names of the lists that the dataset has."""
    with store.storage_errors("read", LISTS):
        if not store.fs.isdir(store.path(LISTS)):
            return set()
        paths = store.fs.ls(store.path(LISTS), detail=False, refresh=True)
    return {path.rpartition("/")[2].removesuffix(".jsonl") for path in paths}


def _keys(store: Store, shard: str) -> set[str]:
    """The keys of a list. Raises UserError if it is damaged."""
    lines = store.read_bytes(LISTS, f"{shard}.jsonl", limit=LIST_BYTES).splitlines()
    entries = [parse_json(line) for line in lines]
    if not all(isinstance(entry, dict) and isinstance(entry.get("key"), str) for entry in entries):
        raise UserError(f"{store.path(LISTS, shard)}.jsonl is damaged. Restore it from a backup or another copy.")
    return {entry["key"] for entry in entries}


def _blocks(samples: Sequence[ListedSample]) -> Iterator[bytes]:
    for first in range(0, len(samples), BLOCK):
        yield b"".join(sample.line() for sample in samples[first : first + BLOCK])
