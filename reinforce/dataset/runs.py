"""What runs record in ``runs/<run>``: the shards that they finish, their progress and their summary.

``shards.jsonl`` has one JSON object a line: the state of the source file with its modification time, and hashes of
keys. Layer files have neither: they are functions of the content alone, and reading the footers of a large dataset
takes minutes. ``progress.json``, which the driver writes every few seconds, is one small file, so that the status of a
running job takes a few requests for a dataset of any size.

Keys that occur in several shards are found in a sample of their hashes of bounded size. A key is in the sample if its
hash is at most a limit. So a key is sampled in every shard that has it, and the share of repeated keys in the sample is
that of the dataset. The limit sinks as the sample grows; small datasets are counted exactly.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import logging
import operator
import os
import socket
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError
from rich.table import Table
from rich.text import Text

from reinforce.dataset.index import PeriodicWriter
from reinforce.dataset.manifest import check_run
from reinforce.errors import StorageError, UserError
from reinforce.source.references import SourceState
from reinforce.source.urls import list_whole, read_range
from reinforce.storage import Storage
from reinforce.terminal import escape, format_duration, plural
from teachers.fast_paths.usage import Usage

Hashes = npt.NDArray[np.uint64]
#: Hashes that are kept of each shard, and of all shards.
SHARD_HASHES = 1024
DATASET_HASHES = 2**18
#: The limit under which every key is sampled.
ALL = 2**64 - 1


@dataclass(frozen=True)
class ShardKeys:
    """The distinct hashes of a shard's keys that are at most ``limit``, uint64 in ascending order."""

    hashes: Hashes
    limit: int = ALL

    @classmethod
    def of(cls, keys: Iterable[str]) -> ShardKeys:
        digests = (hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest() for key in keys)
        return cls(np.unique(np.frombuffer(b"".join(digests), ">u8").astype(np.uint64)))

    def joined(self, other: ShardKeys, most: int = SHARD_HASHES) -> ShardKeys:
        """With further keys of the shard; at most ``most`` of the hashes, the smallest ones."""
        merged = ShardKeys(np.union1d(self.hashes, other.hashes)).below(min(self.limit, other.limit))
        return merged if len(merged.hashes) <= most else merged.below(int(merged.hashes[most - 1]))

    def below(self, limit: int) -> ShardKeys:
        """The hashes up to a limit."""
        if limit >= self.limit:
            return self
        return ShardKeys(self.hashes[: np.searchsorted(self.hashes, np.uint64(limit), side="right")].copy(), limit)


@dataclass(frozen=True)
class RepeatedKeys:
    """Result of comparing the keys of ``shards`` shards.

    ``keys`` counts those that occur in more than one shard, an estimate unless ``exact``; ``share`` is their share of
    all keys, and ``pair`` names two shards that have keys in common.
    """

    keys: int
    share: float
    exact: bool
    shards: int
    pair: tuple[str, str] | None = None

    def lines(self, shards: int, url: str) -> list[str]:
        """For people: none if no key is repeated and all ``shards`` of the dataset at ``url`` were compared."""
        lines = []
        if self.pair is not None:
            count = f"{'' if self.exact else 'about '}{plural(self.keys, 'key')}"
            lines.append(
                f"repeated keys: {count}, {self.share:.2%} of all, in more than one shard, for example in "
                f"{self.pair[0]} and {self.pair[1]}"
            )
        if self.shards < shards:
            lines.append(
                f"keys: {self.shards:,} of {shards:,} shards were compared, those that runs have recorded; `reinforce "
                f"validate {url}` compares all"
            )
        return lines


class KeySample:
    """The sampled keys of many shards: at most ``capacity`` hashes, of which ``limit`` is the largest possible one."""

    def __init__(self, capacity: int = DATASET_HASHES) -> None:
        self._capacity = capacity
        self.limit = ALL
        self._shards: dict[str, ShardKeys] = {}
        self._total = 0

    def add(self, shard: str, keys: ShardKeys) -> None:
        """Add a shard, or replace it."""
        self.limit = min(self.limit, keys.limit)
        before = self._shards.get(shard, _NO_KEYS)
        self._shards[shard] = keys.below(self.limit)
        self._total += len(self._shards[shard].hashes) - len(before.hashes)
        if self._total > self._capacity:
            self._trim()
            if self._total > self._capacity:
                every = np.concatenate([of_shard.hashes for of_shard in self._shards.values()])
                self.limit = int(np.partition(every, len(every) // 2)[len(every) // 2])
                self._trim()

    def __getitem__(self, shard: str) -> ShardKeys:
        return self._shards.get(shard, _NO_KEYS).below(self.limit)

    def _trim(self) -> None:
        self._shards = {shard: self[shard] for shard in self._shards}
        self._total = sum(len(keys.hashes) for keys in self._shards.values())

    def repeated(self, shards: Collection[str] | None = None) -> RepeatedKeys:
        """Count the keys that occur in more than one of ``shards``; default: all that were added."""
        names = sorted(name for name in self._shards if shards is None or name in shards)
        parts = [self[name].hashes for name in names]
        every = np.concatenate(parts) if parts else _NO_KEYS.hashes
        every.sort()
        same = every[1:][every[1:] == every[:-1]]  # a shard has each of its hashes once
        repeated = len(np.unique(same))
        estimate = round(repeated * (ALL / max(1, self.limit)))
        share = repeated / max(1, len(every) - len(same))
        owners = [name for name, part in zip(names, parts, strict=True) if len(same) and (part == same[0]).any()]
        pair = (owners[0], owners[1]) if owners else None
        return RepeatedKeys(estimate, share, self.limit == ALL, len(names), pair)


_NO_KEYS = ShardKeys(np.empty(0, np.uint64))


_LOG = logging.getLogger(__name__)
RECORDS_FILE = "shards.jsonl"
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
            self._store.write_bytes(content.encode("utf-8", "replace"), "runs", self._run, RECORDS_FILE)
        self._changed = False


@dataclass(frozen=True)
class Records:
    keys: KeySample
    sources: Mapping[str, SourceRecord]


def read_records(store: Storage) -> Records:
    """Read the records of all runs; those of later runs replace earlier ones.

    Damaged lines are left out, and so is what is no file or has more than 1 GiB, and all if they may not be read.
    """
    contents: dict[str, bytes] = {}  # the records of each run by their path
    try:
        with store.storage_errors("read", "runs"):
            found = list_whole(lambda: store.fs.glob(store.path("runs", "*", RECORDS_FILE), detail=True))
            files = {path: info.get("size") or 0 for path, info in found.items() if info["type"] == "file"}
            paths = sorted(path for path, size in files.items() if size <= _MAX_BYTES)
            read: dict[str, bytes] = store.fs.cat(paths, on_error="omit") if paths else {}
            for path, content in read.items():
                whole = len(content) >= files[path]
                contents[path] = content if whole else read_range(store.fs, path, 0, files[path])
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


PROGRESS_FILE = "progress.json"
SUMMARY = "summary.json"
WORKERS = 30  # rows of the table
_ERROR_CHARACTERS = 200
_SILENT_SECONDS = 30.0  # without news, or three times the interval, after which a run counts as ended


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class LeaseProgress(_Record):
    """A shard that a worker has. ``leased`` is the time since when, and ``since`` that since which it is in ``stage``,
    in seconds since 1970; a stage that is not known yet is ''."""

    shard: str
    leased: float
    stage: str = ""
    what: str = ""
    since: float = 0.0


class WorkerProgress(_Record):
    """A worker whose models are loaded. ``log`` is the path of its output on ``host``."""

    worker: int
    host: str
    pid: int
    log: str = ""
    samples: int = 0
    shards: Sequence[LeaseProgress] = ()


class SlowShard(_Record):
    """A finished shard, with the stage that took it longest."""

    shard: str
    seconds: float
    stage: str = ""


class FailingShard(_Record):
    """A shard that has failed and is not finished, with its last error."""

    shard: str
    failures: int
    error: str


class RunProgress(_Record):
    """Progress of a run at ``time``; the next is due ``interval`` seconds later. ``shards`` counts those of the run,
    and ``job`` is the id of its Ray job, '' without one."""

    run: str
    time: float
    interval: float
    started: float
    host: str
    pid: int
    shards: int
    shards_done: int
    samples: int
    samples_per_second: float | None = None
    busy_share: float | None = None
    eta_seconds: float | None = None
    waiting_shards: int = 0
    starting_workers: int = 0
    quarantined_shards: int = 0
    quarantined: Mapping[str, int] = {}
    workers: Sequence[WorkerProgress] = ()
    slowest: Sequence[SlowShard] = ()
    failing: Sequence[FailingShard] = ()
    failing_shards: int = 0
    fast_paths: Sequence[Usage] = ()
    job: str = ""

    def silent_for(self) -> float | None:
        """Seconds since the last news if the run does not report any more, else None."""
        age = time.time() - self.time
        ended = self.host == socket.gethostname() and not os.path.exists(f"/proc/{self.pid}")
        return max(0.0, age) if ended or age > max(_SILENT_SECONDS, 3 * self.interval) else None

    def log_command(self) -> str:
        """The command that shows the log of the run; '' if only its terminal does."""
        return f"ray job logs {self.job} --follow" if self.job else ""


def list_runs(store: Storage) -> list[str]:
    """Names of the runs of a dataset, the latest first."""
    return store.names("runs")[::-1]


def read_summary(store: Storage, run: str) -> dict[str, Any] | None:
    """The summary of a run, None if it has not ended properly."""
    summary = store.read_json("runs", run, SUMMARY)
    if summary is not None:
        check_run(summary, store.path("runs", run, SUMMARY))
    return summary


def read_progress(store: Storage, run: str) -> RunProgress | None:
    """The progress of a run, None if it has none."""
    found = store.read_json("runs", run, PROGRESS_FILE)
    if found is None:
        return None
    try:
        return RunProgress.model_validate(found)
    except ValidationError as error:
        raise UserError(f"{store.path('runs', run, PROGRESS_FILE)} is not the progress of a run. Delete it.") from error


def running(store: Storage, runs: Sequence[str]) -> RunProgress | None:
    """The progress of the latest of some runs, if it has one and has not ended."""
    with contextlib.suppress(IndexError):
        if read_summary(store, runs[0]) is None:
            return read_progress(store, runs[0])
    return None


def headline(run: RunProgress) -> str:
    """One line: how far the run is, how fast, and how long it will take."""
    parts = [f"{run.shards_done:,} of {plural(run.shards, 'shard')}"]
    if run.eta_seconds is not None:
        parts.append(f"ETA {format_duration(run.eta_seconds)}")
    parts.append(plural(run.samples, "sample"))
    if run.samples_per_second is not None:
        parts.append(f"{run.samples_per_second:,.0f} samples/s")
    if run.busy_share is not None:
        parts.append(f"models busy {run.busy_share:.0%}")
    starting = f", {run.starting_workers} starting" if run.starting_workers else ""
    parts.append(f"{plural(len(run.workers), 'worker')}{starting}")
    if run.failing_shards:
        parts.append(f"{plural(run.failing_shards, 'failing shard')}")
    if run.quarantined_shards or run.quarantined:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in sorted(run.quarantined.items()))
        parts.append(f"quarantine: {plural(run.quarantined_shards, 'shard')}; {counts}")
    return escape("  ".join(parts))


def state_line(run: RunProgress) -> str:
    """Whether the run continues, since when, and the command that shows its log."""
    silent = run.silent_for()
    if silent is not None:
        return escape(
            f"run {run.run} has not reported for {format_duration(silent)} and has not ended: its process (pid "
            f"{run.pid} on {run.host}) was probably killed. The same `reinforce run` continues."
        )
    age = format_duration(max(0.0, time.time() - run.started))
    command = run.log_command()
    log = f"log: {command}" if command else f"log: in the terminal of pid {run.pid} on {run.host}"
    return escape(f"run {run.run} is running since {age}; {log}")


def detail_lines(run: RunProgress) -> list[str]:
    """The slowest finished shards, and the failing ones with their errors."""
    lines = []
    if run.slowest:
        slow = [f"{one.shard} {one.seconds:.1f} s" + f" ({one.stage})" * bool(one.stage) for one in run.slowest]
        lines.append(f"slowest finished shards, with their longest stage: {', '.join(slow)}")
    for one in run.failing:
        error = " ".join(one.error.split())[:_ERROR_CHARACTERS]
        lines.append(f"failing: {one.shard}, {plural(one.failures, 'failure')}: {error}")
    if rest := run.failing_shards - len(run.failing):
        lines.append(f"and {plural(rest, 'more failing shard')}")
    hidden = len(run.workers) - WORKERS
    if hidden > 0:
        lines.append(f"and {hidden:,} more workers, whose shards have changed their stage later; --json has all")
    return [escape(line) for line in lines]


def workers_table(run: RunProgress) -> Table:
    """The stage of each worker's shards, one row per shard, the longest in its stage first."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("worker", "on", "shard", "for", "stage", "for", "log"):
        table.add_column(heading, justify="right" if heading == "for" else "left", no_wrap=heading != "log")
    now = time.time()
    since = [(min((one.since or one.leased for one in w.shards), default=float("inf")), w) for w in run.workers]
    for _, worker in sorted(since, key=operator.itemgetter(0))[:WORKERS]:
        first = (str(worker.worker), f"{worker.host} pid {worker.pid}")
        for row, lease in enumerate(worker.shards or [LeaseProgress(shard="no shard", leased=now)]):
            waited = format_duration(max(0.0, now - lease.since)) if lease.stage else ""
            cells = lease.shard, format_duration(max(0.0, now - lease.leased)), lease.stage, waited
            names, log = (first, worker.log) if row == 0 else (("", ""), "")
            table.add_row(*(Text(escape(cell)) for cell in (*names, *cells, log)))
    return table
