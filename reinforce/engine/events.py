"""The record of a run in ``runs/<run>/``: the config as run, one JSON line an event, and a summary."""

from __future__ import annotations

import datetime
import json
import time
import uuid
from collections.abc import Callable
from typing import Any

import yaml

from reinforce.config import Config
from reinforce.errors import StorageError
from reinforce.source.urls import canonical
from reinforce.storage import Storage
from teachers.redact import redact_values

_PART_BYTES = 2**20
_FLUSH_SECONDS = 10.0
_FLUSH_SECONDS_LOCAL = 1.0
_PATIENCE_SECONDS = 300.0  # with a storage that does not take them


class Events:
    """Appends events; in an object store nothing can be appended, so the current part is put again, whole, every few
    seconds until it holds a megabyte and the next begins."""

    def __init__(self, store: Storage, config: Config, tell: Callable[[str], str]) -> None:
        """``tell`` takes secrets out of texts."""
        now = datetime.datetime.now(datetime.timezone.utc)
        self.run = f"{now:%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:6]}"
        self._store = store
        self._tell = tell
        self._part = 0
        self._lines: list[bytes] = []
        self._dirty = False
        self._flushed = self._taken = time.monotonic()
        self._interval = _FLUSH_SECONDS_LOCAL if store.local else _FLUSH_SECONDS
        self._folder = ("runs", self.run)
        text = yaml.safe_dump(_public(config), sort_keys=False, allow_unicode=True)
        store.write_bytes(text.encode(), *self._folder, "config.yaml")

    def add(self, event: str, **values: Any) -> None:
        record = {"time": round(time.time(), 3), "event": event, **values}
        line = self._tell(json.dumps(record, ensure_ascii=False, default=str))
        self._lines.append(line.encode("utf-8", "replace") + b"\n")
        self._dirty = True

    def flush_when_due(self) -> None:
        """Publish what was added, every few seconds; a storage that does not take it now may take it later."""
        now = time.monotonic()
        if not self._dirty:
            self._taken = now
        elif now - self._flushed > self._interval:
            try:
                self.flush()
            except StorageError:
                if time.monotonic() - self._taken > _PATIENCE_SECONDS:
                    raise

    def flush(self) -> None:
        """Publish what was added."""
        self._flushed = time.monotonic()
        self._store.write_bytes(b"".join(self._lines), *self._folder, f"events-{self._part:05d}.jsonl")
        self._dirty, self._taken = False, time.monotonic()
        if sum(map(len, self._lines)) > _PART_BYTES:
            self._part, self._lines = self._part + 1, []

    def finish(self, summary: dict[str, Any]) -> None:
        self.add("end", **summary)
        self.flush()
        self._store.write_json(summary, *self._folder, "summary.json")


def _public(config: Config) -> dict[str, Any]:
    """The config without the credentials that URLs and options may carry."""
    data: dict[str, Any] = redact_values(config.model_dump(mode="json", by_alias=True, exclude_defaults=True))
    source = config.source if isinstance(config.source, list) else [config.source]
    data["source"] = [_without_credentials(url) for url in source]
    data["output"] = canonical(config.output)
    return data


def _without_credentials(url: str) -> str:
    return canonical(url) if "://" in url else url
