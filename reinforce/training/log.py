"""What a training leaves to look at: rows of JSON, TensorBoard events and a picture of the curves."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from reinforce.storage import Storage
from reinforce.training.curves import draw

_DRAWING_SECONDS = 30.0
LOG, CURVES, EVENTS = "log.jsonl", "curves.png", "tensorboard"


class Log:
    """The logs of one output, kept by rank 0.

    A row is ``{"step": ..., name: number or {name: number}}``. On a local disk rows are there as they come; to an
    object store the files go with each ``publish``.
    """

    def __init__(self, store: Storage, start: int) -> None:
        """Go on after step ``start``: rows beyond it, from steps that are taken again, are cut."""
        from torch.utils.tensorboard import SummaryWriter

        self._store = store
        self.rows = [row for row in _rows(store) if row["step"] <= start]
        self._folder = None if store.local else tempfile.TemporaryDirectory(prefix="reinforce-log-")
        home = Path(store.root if self._folder is None else self._folder.name)
        text = "".join(json.dumps(row) + "\n" for row in self.rows).encode()
        if store.local:
            store.write_bytes(text, LOG)
        else:
            Path(home, LOG).write_bytes(text)
        self._file = open(Path(home, LOG), "a", encoding="utf-8")  # noqa: SIM115
        self._drawn = time.monotonic()
        self._events = SummaryWriter(str(home / EVENTS), purge_step=start + 1 if start else None, flush_secs=30)

    def add(self, row: Mapping[str, Any]) -> None:
        """Write one row. Numbers that are not finite become null."""
        clean = {key: _finite(value) for key, value in row.items()}
        self.rows.append(clean)
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()
        for name, value in _flat(row):
            if name != "step":
                self._events.add_scalar(name, value, row["step"])

    def publish(self, last: bool = False) -> None:
        """Bring all files to where they belong; the curves, which take a second, now and then and when it is last."""
        self._events.flush()
        if last or time.monotonic() - self._drawn > _DRAWING_SECONDS:
            draw(self.rows, f"{self._store.url}/{CURVES}")
            self._drawn = time.monotonic()
        if self._folder is not None:
            self._store.put_folder(self._folder.name)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._events.close()
        if self._folder is not None:
            self._folder.cleanup()


def _rows(store: Storage) -> Iterator[dict[str, Any]]:
    try:
        lines = store.fs.cat_file(store.path(LOG)).decode().splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:  # cut in the middle by a kill
            return


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flat(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value
