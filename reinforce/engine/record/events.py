"""The record of a run in ``runs/<run>/``: the config as run, one JSON line per event, and a summary."""

from __future__ import annotations

import datetime
import heapq
import json
import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from reinforce.config import Config
from reinforce.errors import StorageError
from reinforce.source.urls import canonical
from reinforce.storage import Storage, json_bytes
from teachers.redact import redact_values

_PART_BYTES = 2**20
_FLUSH_SECONDS = 10.0
_FLUSH_SECONDS_LOCAL = 1.0
_SLOWEST = 5
_ERROR_CHARACTERS = 300
_MAX_FLUSH_SECONDS = 300.0  # between two writes while they fail
_LOG = logging.getLogger(__name__)


class EventDigest:
    """Figures of the events so far: counts by kind, the slowest shards, and the unfinished shards that have failed,
    each with its number of failures and its last error."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.slowest: list[tuple[float, str, str]] = []  # a heap of seconds, shard and its longest stage
        self.failing: dict[str, tuple[int, str]] = {}

    def add(self, event: str, values: Mapping[str, Any]) -> None:
        self.counts[event] += 1
        shard = values.get("shard")
        if event in ("shard", "shard_quarantined"):
            self.failing.pop(str(shard), None)
        if event == "shard":
            times = values.get("times") or {"": 0.0}
            heapq.heappush(self.slowest, (values["seconds"], str(shard), max(times, key=times.__getitem__)))
            if len(self.slowest) > _SLOWEST:
                heapq.heappop(self.slowest)
        elif event in ("shard_raised", "worker_died", "worker_hung") and not values.get("node_lost"):
            for name in values.get("shards", [shard]):
                failures, _ = self.failing.pop(name, (0, ""))
                self.failing[name] = failures + 1, str(values.get("error", ""))[:_ERROR_CHARACTERS]


class Events:
    """Writes events to numbered parts. An object store cannot append, so the current part is rewritten every few
    seconds; a new part begins after one MiB."""

    def __init__(self, store: Storage, config: Config, redact: Callable[[str], str]) -> None:
        """``redact`` removes secrets from texts."""
        now = datetime.datetime.now(datetime.timezone.utc)
        # The suffix is microseconds and four random bits, so that names sort by their times.
        self.run = f"{now:%Y%m%dT%H%M%SZ}-{now.microsecond * 16 + secrets.randbelow(16):06x}"
        self._store = store
        self._redact = redact
        self._part = 0
        self._lines: list[bytes] = []
        self._dirty = self._refused = False
        self.digest = EventDigest()
        self._flushed = time.monotonic()
        self._interval = _FLUSH_SECONDS_LOCAL if store.local else _FLUSH_SECONDS
        self._folder = ("runs", self.run)
        text = yaml.safe_dump(_public(config), sort_keys=False, allow_unicode=True)
        self._put(text.encode(), "config.yaml")

    def add(self, event: str, **values: Any) -> None:
        record = {"time": round(time.time(), 3), "event": event, **values}
        line = self._redact(json.dumps(record, ensure_ascii=False, default=str))
        self._lines.append(line.encode("utf-8", "replace") + b"\n")
        self._dirty = True
        self.digest.add(event, values)

    def flush_when_due(self) -> None:
        """Write new events every few seconds, and less often while they cannot be written."""
        if self._dirty and time.monotonic() - self._flushed > self._interval:
            self.flush()

    def flush(self) -> None:
        if self._put(b"".join(self._lines), f"events-{self._part:05d}.jsonl"):
            self._dirty = False
            if sum(map(len, self._lines)) > _PART_BYTES:
                self._part, self._lines = self._part + 1, []
        self._flushed = time.monotonic()

    def finish(self, summary: dict[str, Any]) -> None:
        """Add the ``end`` event and write summary.json."""
        self.add("end", **summary)
        self.flush()
        self._put(json_bytes(summary), "summary.json")

    def _put(self, data: bytes, name: str) -> bool:
        """Write a file -> whether the storage has taken it. The run itself does not need it."""
        try:
            self._store.write_bytes(data, *self._folder, name)
        except StorageError as error:
            if not self._refused:
                _LOG.warning("%s The run goes on without its record.", self._redact(str(error)))
            self._refused, self._interval = True, min(2 * self._interval, _MAX_FLUSH_SECONDS)
            return False
        return True


def _public(config: Config) -> dict[str, Any]:
    """The config without the credentials in its URLs and options."""
    data: dict[str, Any] = redact_values(config.model_dump(mode="json", by_alias=True, exclude_defaults=True))
    source = config.source if isinstance(config.source, list) else [config.source]
    data["source"] = [canonical(url) if "://" in url else url for url in source]
    data["output"] = canonical(config.output)
    if config.moved:
        data["moved"] = {canonical(now): canonical(before) for now, before in config.moved.items()}
    return data
