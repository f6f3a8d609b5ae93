"""What a run records of the shards that it finishes: ``runs/<run>/shards.jsonl``, one JSON object a line.

The state of the source file with its modification time, and hashes of keys. Layer files have neither: they are
functions of the content alone, and reading the footers of a large dataset takes minutes.
"""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import BaseModel

from reinforce.dataset.files.index import PeriodicWriter
from reinforce.dataset.runs.key_sample import ALL, KeySample, ShardKeys
from reinforce.errors import StorageError
from reinforce.source.identity import SourceState
from reinforce.source.whole_reads import list_whole, read_range
from reinforce.storage import Storage

_LOG = logging.getLogger(__name__)
FILE = "shards.jsonl"
_MAX_BYTES = 2**30  # of a run's records; a million shards take a third of it


class _Entry(BaseModel):
    """A line of the file."""

    shard: str
    limit: str
    keys: str
    url: str | None = None
    bytes: int | None = None
    head: str | None = None
    stamp: str | None = None


@dataclass(frozen=True)
class SourceRecord:
    """The state of a source file at its canonical URL when its samples were written."""

    url: str
    state: SourceState


@dataclass(frozen=True)
class ShardRecord:
    """A finished shard: hashes of its keys, and the source file if its samples were written."""

    shard: str
    keys: ShardKeys
    source: SourceRecord | None

    def line(self) -> str:
        """The record as JSON; hashes are little-endian uint64 in base64, limits hexadecimal."""
        entry: dict[str, Any] = {
            "shard": self.shard,
            "limit": f"{self.keys.limit:x}",
            "keys": base64.b64encode(self.keys.hashes.astype("<u8").tobytes()).decode(),
        }
        if self.source is not None:
            state = self.source.state
            entry |= {"url": self.source.url, "bytes": state.bytes, "head": state.head, "stamp": state.stamp}
        return json.dumps(entry, ensure_ascii=False)

    @classmethod
    def parse(cls, line: str) -> ShardRecord | None:
        """The record of a line, or None if it is none."""
        try:
            entry = _Entry.model_validate_json(line)
            hashes = np.unique(np.frombuffer(base64.b64decode(entry.keys, validate=True), "<u8").astype(np.uint64))
            keys = ShardKeys(hashes, min(max(int(entry.limit, 16), 0), ALL))
        except ValueError:  # also pydantic's, and those of broken numbers and base64
            return None
        source = SourceRecord(entry.url, SourceState(entry.bytes, entry.head, entry.stamp)) if entry.url else None
        return cls(entry.shard, keys, source)


class RecordWriter(PeriodicWriter):
    """Collects the records of a run and writes them."""

    def __init__(self, store: Storage, run: str) -> None:
        super().__init__()
        self._store, self._run = store, run
        self._keys = KeySample()
        self._sources: dict[str, SourceRecord | None] = {}
        self._changed = False

    def add(self, record: ShardRecord) -> None:
        self._keys.add(record.shard, record.keys)
        self._sources[record.shard] = record.source or self._sources.get(record.shard)
        self._changed = True

    @property
    def shards(self) -> Collection[str]:
        return self._sources.keys()

    def flush(self) -> None:
        if self._changed:
            records = (ShardRecord(shard, self._keys[shard], source) for shard, source in self._sources.items())
            content = "".join(f"{record.line()}\n" for record in records)
            self._store.write_bytes(content.encode("utf-8", "replace"), "runs", self._run, FILE)
        self._changed = False


@dataclass(frozen=True)
class Records:
    keys: KeySample
    sources: Mapping[str, SourceRecord]


def read_records(store: Storage) -> Records:
    """Read the records of all runs; those of later runs replace earlier ones.

    Damaged lines are left out, and so is what is no file or has more than 1 GiB, and all if they may not be read.
    """
    try:
        contents = _contents(store)
    except StorageError as error:
        if not isinstance(error.__cause__, PermissionError):
            raise
        _LOG.warning("%s The records of earlier runs are not used.", error)
        contents = {}
    keys, sources = KeySample(), {}
    for path in sorted(contents):
        for line in contents.pop(path).decode(errors="replace").split("\n"):
            if (record := ShardRecord.parse(line)) is None:
                continue
            keys.add(record.shard, record.keys)
            if record.source is not None:
                sources[record.shard] = record.source
    return Records(keys, sources)


def _contents(store: Storage) -> dict[str, bytes]:
    """The records of each run by their path."""
    with store.storage_errors("read", "runs"):
        found = list_whole(lambda: store.fs.glob(store.path("runs", "*", FILE), detail=True))
        files = {path: info.get("size") or 0 for path, info in found.items() if info["type"] == "file"}
        paths = sorted(path for path, size in files.items() if size <= _MAX_BYTES)
        contents: dict[str, bytes] = store.fs.cat(paths, on_error="omit") if paths else {}
        for path, content in contents.items():
            if len(content) < files[path]:
                contents[path] = read_range(store.fs, path, 0, files[path])
    return contents
