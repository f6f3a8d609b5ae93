"""What ``reinforce validate`` does with a shard: the checks of its files, and of its source file as it is now."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from reinforce.dataset.files.damage import compute_again
from reinforce.dataset.files.store import Store
from reinforce.dataset.layers import SAMPLES
from reinforce.dataset.runs.key_sample import ShardKeys
from reinforce.dataset.runs.shard_records import SourceRecord
from reinforce.dataset.validate.findings import Finding
from reinforce.dataset.validate.shard_checks import CheckedShard, ShardChecks, ShardFiles
from reinforce.dataset.validate.source_counts import count_source, count_stored, limits_of
from reinforce.errors import UserError
from reinforce.source.identity import SourceState, current_url, probe_state
from reinforce.source.references import ImageRoots
from reinforce.source.urls import canonical

_TOGETHER = 4  # shards of a thread, if only keys are read: their footers are checked together
#: What the state of a source file can be.
ELSEWHERE, UNREADABLE, UNKNOWN, CHANGED, TOUCHED, SAME = (
    "elsewhere", "unreadable", "unknown", "changed", "touched", "same",
)  # fmt: skip


@dataclass(frozen=True)
class ReadOptions:
    """Options of ``validate``, for the dataset at ``url`` with a ``manifest``."""

    url: str
    manifest: Mapping[str, Any]
    quick: bool = False
    sources: Sequence[str] = ()
    count: bool = False


@dataclass(frozen=True)
class Shards:
    """Shards to read, with the records of their sources; hashes of keys up to ``limit`` are wanted."""

    files: Sequence[ShardFiles]
    recorded: Mapping[str, SourceRecord]
    limit: int


@dataclass
class ReadShards:
    """What was found in some shards: hashes of keys by shard, states of source files, and those that have changed.

    ``counted`` is the number of shards whose samples were counted in their source.
    """

    rows: int = 0
    keys: list[tuple[str, ShardKeys]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    sources: Counter[str] = field(default_factory=Counter)
    changed: list[str] = field(default_factory=list)
    counted: int = 0


class ShardReader:
    """Reads shards, several at a time in ``threads``."""

    def __init__(self, options: ReadOptions, threads: int) -> None:
        self._options = options
        self._moved: Mapping[str, str] = options.manifest.get("moved", {})
        self._roots = ImageRoots.named(options.sources, "--sources {}")
        self._checks = ShardChecks(Store(options.url), options.manifest, options.quick)
        self._pool = ThreadPoolExecutor(threads)

    def read(self, shards: Shards) -> ReadShards:
        """Read some shards."""
        found = ReadShards()
        size = _TOGETHER if self._options.quick else 1
        parts = [shards.files[start : start + size] for start in range(0, len(shards.files), size)]
        every = itertools.chain.from_iterable(self._pool.map(lambda part: self._read(part, shards), parts))
        for files, (checked, source, change) in zip(shards.files, every, strict=True):
            found.rows += checked.rows
            found.keys.append((files.name, checked.keys))
            found.findings += checked.findings
            if self._options.sources:
                found.sources[source] += 1
            if source == CHANGED:
                found.changed.append(f"{files.name}: {change}")
            found.counted += checked.counted
        return found

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)

    def _read(self, part: Sequence[ShardFiles], shards: Shards) -> list[tuple[CheckedShard, str, str]]:
        """Each shard as it was read, the state of its source file, and what has changed in that."""
        checked = self._checks.check(part, shards.limit)
        return [self._with_source(*each, shards) for each in zip(part, checked, strict=True)]

    def _with_source(self, files: ShardFiles, checked: CheckedShard, shards: Shards) -> tuple[CheckedShard, str, str]:
        if not self._options.sources:
            return checked, UNKNOWN, ""
        state, change = _compare_source(checked.footer, shards.recorded.get(files.name), self._roots, self._moved)
        if self._options.count and state in (SAME, TOUCHED) and not checked.findings:
            compared = self._compare_count(files, checked)
            checked.findings += compared or ()
            checked.counted = compared is not None
        return checked, state, change

    def _compare_count(self, files: ShardFiles, checked: CheckedShard) -> list[Finding] | None:
        """A finding if a source file has another number of samples than its shard; None if that cannot be counted."""
        store, url = self._checks.store, current_url(checked.footer["source"], self._moved)
        if self._options.manifest.get("input", {}).get("view"):  # of another dataset, which may have another by now
            return None
        refused = store.quarantined(SAMPLES, files.name) if SAMPLES in files.quarantined else []
        stored = count_stored(url, checked.rows, checked.keys, refused)
        try:
            there = None if stored is None else count_source(url, limits_of(self._options.manifest))
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


def _compare_source(
    footer: Mapping[str, str], recorded: SourceRecord | None, roots: ImageRoots, moved: Mapping[str, str]
) -> tuple[str, str]:
    """How the source file compares with the one that the samples were read from, and what has changed."""
    before = SourceState.from_footer(footer)
    if "source" not in footer or before.head is None:
        return UNKNOWN, ""
    url = current_url(footer["source"], moved)
    try:
        now = probe_state(roots.check(url))
    except UserError:
        return ELSEWHERE, ""
    if now is None:
        return UNREADABLE, ""
    if before.same_content(now) is False:
        return CHANGED, before.describe_change(now)
    same_place = recorded is not None and recorded.url == canonical(url)
    if same_place and recorded is not None and recorded.state.stamp not in (None, now.stamp):
        return TOUCHED, ""
    return SAME, ""
