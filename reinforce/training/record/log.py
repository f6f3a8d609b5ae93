"""The logs of a training run: rows of JSON, TensorBoard events, a picture of the curves, and a line with its speed."""

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
from reinforce.terminal import format_duration, plural
from reinforce.training.record.curves import draw_curves, name_part
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
            named = {name_part(name, row["parts"]): value for name, value in row["metrics"].items()}
            row = {**{key: value for key, value in row.items() if key != "parts"}, "metrics": named}
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


class Throughput:
    """Speed of the steps between two rows of the log, without evaluations and checkpoints, and the time left.

    A training run of ``steps`` steps begins or resumes at step ``start``. ``flops`` are those of the model for a
    sample, 0 if unknown, and ``peak`` the FLOP/s of all ranks' cards, if known.
    """

    def __init__(self, start: int, steps: int, flops: float = 0.0, peak: float | None = None) -> None:
        self._begun, self._start, self._end = time.monotonic(), start, steps
        self._flops, self._peak = flops, peak
        self._seconds = self._idle = 0.0
        self._steps = 0

    def add_step(self, seconds: float, idle: float) -> None:
        """Count a step of ``seconds``, in which the device waited ``idle`` seconds for data."""
        self._seconds += seconds
        self._idle += idle
        self._steps += 1

    def measure(self, batch: int) -> dict[str, float]:
        """Return samples per second over all ranks and the share of time spent waiting for data, then reset.

        ``batch`` is the global batch size. Where they are known, the model's FLOP/s over all ranks and their share of
        the cards' peak (``mfu``) are returned, too.
        """
        speed = {"samples_per_second": self._steps * batch / self._seconds, "waiting": self._idle / self._seconds}
        if self._flops:
            speed["flops_per_second"] = self._flops * speed["samples_per_second"]
            if self._peak is not None:
                speed["mfu"] = speed["flops_per_second"] / self._peak
        self._seconds, self._idle, self._steps = 0.0, 0.0, 0
        return speed

    def seconds_left(self, step: int) -> float:
        """An estimate by the average speed since the start, evaluations included."""
        return (time.monotonic() - self._begun) / (step - self._start) * (self._end - step)


def format_row(row: Mapping[str, Any], steps: int, seconds_left: float) -> str:
    """A row of the log as one line of text."""
    parts = [
        f"step {row['step']:,} of {steps:,}",
        f"ETA {format_duration(seconds_left)}",
        f"epoch {row['epoch']:.2f}",
        f"loss {row['loss']:.4f}",
        f"{row['samples_per_second']:,.0f} samples/s",
        *([f"MFU {row['mfu']:.0%}"] if "mfu" in row else []),
        f"waiting for data {row['waiting']:.0%}",
    ]
    if row["skipped"]:
        parts.append(f"{plural(row['skipped'], 'step')} skipped")
    return "  ".join(parts)


def _finite_or_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite_or_none(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
