"""What ``reinforce validate`` does with a shard: the checks of its files, and of its source file as it is now.

With ``--count``, samples of the source file are compared with the rows and the quarantine. The rows of a Parquet file
are in its footer, of which some kilobytes are read. Other files are read as a whole.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from reinforce.dataset.files.content import hash_keys
from reinforce.dataset.files.damage import compute_again
from reinforce.dataset.files.store import Store
from reinforce.dataset.layers import SAMPLES
from reinforce.dataset.runs.key_sample import ShardKeys
from reinforce.dataset.runs.shard_records import SourceRecord
from reinforce.dataset.validate.inventory import Finding
from reinforce.dataset.validate.shard_checks import CheckedShard, ShardFiles, check_shards
from reinforce.errors import UserError
from reinforce.input_config import DEFAULT, Limits
from reinforce.processes.cores import available_cores
from reinforce.source.formats.recognise import find_format, format_of_name
from reinforce.source.identity import SourceState, current_url, probe_state
from reinforce.source.references import ImageRoots
from reinforce.source.urls import canonical
from reinforce.storage import Storage
from reinforce.terminal import first_names
from schemas import Reason

_TOGETHER = 4  # shards of a thread, if only keys are read: their footers are checked together
#: Threads of a process, for the latency of storage; on a local disk, more of them only wait for each other.
_THREADS, _LOCAL_THREADS = 16, 4
_BATCH = 64  # shards that are read together; their results are one message of a process
_ALONE = 8  # times as many where no other process reads while the last ones of a batch are read
#: Files and bytes that a process reads in about as much time as it takes to start.
_PROCESS_FILES, _PROCESS_BYTES = 4096, 2**30
#: What the state of a source file can be, as lines show it, besides ``changed``.
STATES = {
    "same": "as when their samples were written",
    "touched": "with another modification time or ETag, but the same size and first 64 KiB",
    "unknown": "that were not recorded, by an earlier version or because they are images of a folder",
    "unreadable": "that cannot be read now, which only `images: reference` needs",
    "elsewhere": "outside of the folders of --sources, which were not looked at",
}


@dataclass(frozen=True)
class Shards:
    """Shards to read, with the records of their sources; hashes of keys up to ``limit`` are wanted."""

    files: Sequence[ShardFiles]
    recorded: Mapping[str, SourceRecord]
    limit: int

    def describe(self) -> str:
        return first_names([file.name for file in self.files])


def default_processes(quick: bool, files: int, size: int) -> int:
    """How many processes read so many files of ``size`` bytes; ``quick`` reads little of each."""
    worth = max(files / _PROCESS_FILES, 0 if quick else size / _PROCESS_BYTES)
    return max(1, min(available_cores(), int(worth)))


class ShardReader:
    """Reads shards in each of so many ``processes``, several at a time in threads, which the first read starts.

    Other arguments are those of ``validate``. ``batch`` is how many shards should be read together.
    """

    def __init__(
        self, url: str, manifest: Mapping[str, Any], quick: bool, sources: Sequence[str], count: bool, processes: int
    ) -> None:
        self._url, self._manifest, self._quick, self._sources, self._count = url, manifest, quick, sources, count
        self._moved: Mapping[str, str] = manifest.get("moved", {})
        self._roots = ImageRoots.named(sources, "--sources {}")
        if quick:
            self._threads, self.batch = _LOCAL_THREADS if Storage(url).local else _THREADS, _BATCH
        else:  # a thread holds a row group of the widest layer
            self._threads = max(2, _THREADS // processes)
            self.batch = 2 * self._threads
        self.batch *= _ALONE if processes == 1 else 1

    @functools.cached_property
    def _store(self) -> Store:
        return Store(self._url)

    @functools.cached_property
    def _pool(self) -> ThreadPoolExecutor:
        # `hash_keys` needs it. Threads of a new process that import it at the same time can deadlock.
        from pandas.util import hash_array  # noqa: F401

        return ThreadPoolExecutor(self._threads)

    def read(self, shards: Shards) -> list[CheckedShard]:
        size = _TOGETHER if self._quick else 1
        parts = [shards.files[start : start + size] for start in range(0, len(shards.files), size)]
        pool, store = self._pool, self._store  # made here, before threads use them
        return [*itertools.chain.from_iterable(pool.map(lambda part: self._read(store, part, shards), parts))]

    def close(self) -> None:
        if "_pool" in vars(self):
            self._pool.shutdown(cancel_futures=True)

    def _read(self, store: Store, part: Sequence[ShardFiles], shards: Shards) -> list[CheckedShard]:
        checked = check_shards(store, self._manifest, self._quick, part, shards.limit)
        for files, one in zip(part, checked, strict=True):
            if self._sources:
                self._look_at_source(files, one, shards.recorded.get(files.name))
        return checked

    def _look_at_source(self, files: ShardFiles, checked: CheckedShard, recorded: SourceRecord | None) -> None:
        """Compare a shard with its source file, and if wanted their numbers of samples."""
        source, before = checked.footer.get("source"), SourceState.from_footer(checked.footer)
        checked.source, checked.changed = "unknown", ""
        if source is not None and before.head is not None:
            url = current_url(source, self._moved)
            checked.source, checked.changed, now = compare_source(url, before, self._roots)
            known = recorded.state.stamp if recorded is not None and recorded.url == canonical(url) else None
            if checked.source == "same" and now is not None and known not in (None, now.stamp):
                checked.source = "touched"
        if self._count and checked.source in ("same", "touched") and not checked.findings:
            compared = self._compare_count(files, checked)
            checked.findings += compared or ()
            checked.counted = compared is not None

    def _compare_count(self, files: ShardFiles, checked: CheckedShard) -> list[Finding] | None:
        """A finding if a source file has another number of samples than its shard; None if that cannot be counted."""
        store, url = self._store, current_url(checked.footer["source"], self._moved)
        if self._manifest.get("input", {}).get("view"):  # of another dataset, which may have another by now
            return None
        refused = store.quarantined(SAMPLES, files.name) if SAMPLES in files.quarantined else []
        stored = _count_stored(url, checked.rows, checked.keys, refused)
        try:
            format_ = format_of_name(url) or find_format(DEFAULT)
            there = None if stored is None else format_.count(url, _limits_of(self._manifest))
        except Exception:  # each driver has its own exceptions
            return None
        if stored is None or there is None:
            return None
        if stored == there:
            return []
        message = (
            f"{files.name}: its source {url} has {there:,} samples, the dataset has {checked.rows:,} rows and "
            f"{stored - checked.rows:,} samples in the quarantine. {compute_again(store.url, SAMPLES, files.name)}"
        )
        return [Finding("count", message, SAMPLES, files.name)]


def compare_source(url: str, before: SourceState, roots: ImageRoots) -> tuple[str, str, SourceState | None]:
    """How the file at ``url`` compares with what samples were read from, what has changed, and its state now."""
    try:
        now = probe_state(roots.check(url))
    except UserError:
        return "elsewhere", "", None
    if now is None:
        return "unreadable", "", None
    if before.same_content(now) is False:
        return "changed", before.describe_change(now), now
    return "same", "", now


def _count_stored(url: str, rows: int, keys: ShardKeys, quarantine: Sequence[Mapping[str, str | None]]) -> int | None:
    """Samples of a shard of the dataset: its rows and those that are only in the quarantine of the samples layer.

    ``keys`` are all hashes of its rows by ``hash_keys``. None if a part of a table could not be read: the
    quarantine does not record how many rows it had.
    """
    format_ = format_of_name(url)
    table = format_ is not None and format_.is_table
    if table and any(row["key"] is None and row["reason"] != Reason.SHARD_SAMPLES for row in quarantine):
        return None
    refused = {row["key"] for row in quarantine if row["key"] is not None}
    others = np.unique(hash_keys(pa.array(sorted(refused), pa.string())))
    only = len(np.setdiff1d(others, keys.hashes))
    repeated = sum(row["reason"] == Reason.DUPLICATE_KEY and row["key"] is not None for row in quarantine)
    return rows + only + (repeated if table else 0)


def _limits_of(manifest: Mapping[str, Any]) -> Limits:
    known = manifest.get("input", {}).get("limits", {})
    return Limits.model_validate({name: value for name, value in known.items() if name in Limits.model_fields})
