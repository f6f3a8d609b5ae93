"""The logs of a training run: rows of JSON, TensorBoard events, and a picture of the curves."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from reinforce.processes.imports import installed
from reinforce.settings import flatten
from reinforce.storage import Storage
from reinforce.training.record.curves import draw_curves, name_parts
from reinforce.training.record.trackers import Tracker

_DRAWING_SECONDS = 30.0
LOG, CURVES, EVENTS = "log.jsonl", "curves.png", "tensorboard"
#: Files that a package of the extra `train` writes.
_PACKAGES = {"matplotlib": CURVES, "tensorboard": EVENTS}


def written() -> dict[str, bool]:
    """Whether the packages are installed that write the curves and the events, by the name of the file."""
    return {file: installed(package) for package, file in _PACKAGES.items()}


def notes() -> list[str]:
    """A line if a package is not installed, without which a training run has no curves or no events."""
    missing = {package: file for package, file in _PACKAGES.items() if not installed(package)}
    if not missing:
        return []
    files = " and ".join(missing.values())
    return [f"without {' and '.join(missing)} there is no {files}, only {LOG}: pip install -e '.[train]'"]


class Log:
    """The logs in one output folder, written by rank 0.

    A row is ``{"step": ..., name: number or {name: number}}``. ``parts`` of a row with ``metrics`` says which are of a
    part of what their names say; events and trackers get these under longer names. On a local disk a row is written at
    once; in an object store the files are uploaded by ``publish``.
    """

    def __init__(self, storage: Storage, start: int, trackers: Sequence[Tracker] = ()) -> None:
        """Continue after step ``start``: later rows, of steps that will be repeated, are deleted."""
        self._storage, self._trackers = storage, trackers
        self.rows = [row for row in read_rows(storage) if row["step"] <= start]
        self._temporary = None if storage.local else tempfile.TemporaryDirectory(prefix="reinforce-log-")
        folder = Path(storage.root if self._temporary is None else self._temporary.name)
        text = "".join(json.dumps(row) + "\n" for row in self.rows).encode()
        if storage.local:
            storage.write_bytes(text, LOG)
        else:
            Path(folder, LOG).write_bytes(text)
        self._file = open(Path(folder, LOG), "a", encoding="utf-8")  # noqa: SIM115
        self._drawn = time.monotonic()
        self._written, self._events = written(), None
        if self._written[EVENTS]:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(folder / EVENTS), purge_step=start + 1 if start else None, flush_secs=30)

    def add(self, row: Mapping[str, Any]) -> None:
        """Write one row. In log.jsonl, numbers that are not finite become null."""
        clean = {key: _finite_or_none(value) for key, value in row.items()}
        self.rows.append(clean)
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()
        if "parts" in row:
            numbers = {key: value for key, value in row.items() if key != "parts"}
            row = {**numbers, "metrics": name_parts(row["metrics"], row["parts"])}
        flat = flatten(row, separator="/")
        scalars = {name: value for name, value in flat if name != "step" and not isinstance(value, Mapping)}
        if self._events is not None:
            for name, value in scalars.items():
                self._events.add_scalar(name, value, row["step"])
        for tracker in self._trackers:
            tracker.add(row["step"], scalars)

    def publish(self, last: bool = False) -> None:
        """Write all files to the output. Curves, which take a second, are drawn every 30 s and when ``last``."""
        if self._events is not None:
            self._events.flush()
        if self._written[CURVES] and (last or time.monotonic() - self._drawn > _DRAWING_SECONDS):
            draw_curves(self.rows, f"{self._storage.url}/{CURVES}")
            self._drawn = time.monotonic()
        if self._temporary is not None:
            self._storage.put_folder(self._temporary.name)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        for tracker in self._trackers:
            tracker.close(failed=error is not None)
        self._file.close()
        if self._events is not None:
            self._events.close()
        if self._temporary is not None:
            self._temporary.cleanup()


def read_rows(storage: Storage) -> Iterator[dict[str, Any]]:
    """The rows of the log in an output folder, up to one that was cut off; none without a log."""
    try:
        lines = storage.fs.cat_file(storage.path(LOG)).decode().splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:  # the process was killed while it wrote this line
            return


def _finite_or_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite_or_none(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
