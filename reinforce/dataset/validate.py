"""``reinforce validate``: all files of a dataset, their keys, and the source files as they are now. Writes nothing."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from reinforce.dataset.damage import drop_shard_command
from reinforce.dataset.findings import Finding
from reinforce.dataset.inventory import check_missing, check_orphans, check_recipes
from reinforce.dataset.key_sample import KeySample, RepeatedKeys
from reinforce.dataset.layers import SAMPLES
from reinforce.dataset.listing import Listing
from reinforce.dataset.manifest import CODE_KEY, read_manifest
from reinforce.dataset.shard_checks import CheckedShard, ShardChecks
from reinforce.dataset.shard_records import SourceRecord, read_records
from reinforce.dataset.source_counts import count_source, count_stored, limits_of
from reinforce.dataset.store import Store
from reinforce.errors import UserError
from reinforce.source.identity import SourceState, current_url, probe_state
from reinforce.source.references import ImageRoots
from reinforce.source.urls import canonical

_THREADS = 16
_CAPACITY = 2**24  # hashes of keys, 128 MiB: datasets of more samples are estimated
_NAMED = 10
#: What the state of a source file can be.
_ELSEWHERE, _UNREADABLE, _UNKNOWN, _CHANGED, _TOUCHED, _SAME = (
    "elsewhere", "unreadable", "unknown", "changed", "touched", "same",
)  # fmt: skip


@dataclass
class Validation:
    """What was found in the dataset at ``url``."""

    url: str
    shards: int
    repeated: RepeatedKeys
    rows: int = 0
    findings: list[Finding] = field(default_factory=list)
    sources: Counter[str] = field(default_factory=Counter)
    changed: list[str] = field(default_factory=list)
    code: list[str] = field(default_factory=list)
    counted: int | None = None  # shards whose samples were counted in their source, None if none were to be

    @property
    def errors(self) -> list[str]:
        """The messages of all findings."""
        return [finding.message for finding in self.findings]

    @property
    def valid(self) -> bool:
        return not (self.findings or self.changed or self.repeated.keys)

    def as_json(self) -> dict[str, Any]:
        """For scripts: all findings, without a limit."""
        repeated = self.repeated
        return {
            "dataset": self.url,
            "valid": self.valid,
            "shards": self.shards,
            "rows": self.rows,
            "findings": [finding.as_json() for finding in self.findings],
            "repeated_keys": {
                "keys": repeated.keys,
                "share": repeated.share,
                "exact": repeated.exact,
                "example": repeated.pair,
            },
            "sources": dict(self.sources),
            "changed_sources": self.changed,
            "counted_sources": self.counted,
            "notes": self.code,
        }

    def lines(self) -> Iterator[str]:
        """For people: what was found, the most serious first."""
        yield from _first(self.errors, "problems")
        yield from self.repeated.lines(0, self.url)
        if self.changed:
            yield (
                f"{len(self.changed):,} source files have changed since their samples were written. Restore them, or "
                f"drop the samples of these shards ({drop_shard_command(self.url, [SAMPLES], 'SHARD')} --yes) and run "
                "again, which replaces their other layers, too:"
            )
            yield from (f"  {line}" for line in _first(self.changed, "source files"))
        yield from self.code
        if self.sources:
            texts = {
                _SAME: "as when their samples were written",
                _TOUCHED: "with another modification time or ETag, but the same size and first 64 KiB",
                _UNKNOWN: "that were not recorded, by an earlier version or because they are images of a folder",
                _UNREADABLE: "that cannot be read now, which only `images: reference` needs",
                _ELSEWHERE: "outside of the folders of --sources, which were not looked at",
            }
            parts = [f"{self.sources[state]:,} {text}" for state, text in texts.items() if self.sources[state]]
            yield f"source files: {'; '.join(parts) or 'all have changed'}"
        if self.counted is not None:
            yield (
                f"samples were counted in the source files of {self.counted:,} of {self.shards:,} shards; others are "
                "not in --sources, have changed, or are parts of files or folders"
            )
        found = "valid" if self.valid else "not valid"
        yield f"{self.url}: {self.shards:,} shards were read, {found}"


def validate(url: str, sources: Sequence[str] = (), quick: bool = False, count: bool = False) -> Validation:
    """Read every layer, compare the keys, and look at the source files in the folders ``sources``.

    ``quick`` reads only the keys, so that damage in other columns is not found. ``count`` also compares the samples of
    each source file with the rows and the quarantine of its shard.

    The dataset names its sources, and who made it could name anything: other files are not opened. Raises UserError if
    there is no dataset.
    """
    roots = ImageRoots.named(sources, "--sources {}")
    store = Store(url)
    manifest = read_manifest(store)
    names = [*manifest["layers"]]
    every = store.listings([*names, *(f"quarantine/{name}" for name in names)])
    listings = {name: every[name] for name in names}
    recorded = read_records(store).sources if sources else {}
    sample = KeySample(_CAPACITY)
    found = Validation(store.url, len(listings[SAMPLES]), sample.repeated(), code=_code_lines(manifest))
    found.findings += check_recipes(manifest)
    found.findings += check_missing(store, manifest, listings)
    found.findings += check_orphans(store, listings)
    counted: list[bool] = []
    checks, moved = ShardChecks(store, manifest, every, quick), manifest.get("moved", {})

    def read(shard: str) -> tuple[str, CheckedShard, str, str]:
        checked = checks.check(shard)
        state = _compare_source(checked.footer, recorded.get(shard), roots, moved) if sources else (_UNKNOWN, "")
        if count and state[0] in (_SAME, _TOUCHED) and not checked.findings:
            compared = _compare_count(store, manifest, every, shard, checked)
            checked.findings += compared or ()
            counted.append(compared is not None)
        return shard, checked, *state

    with ThreadPoolExecutor(_THREADS) as pool:
        shards = iter(listings[SAMPLES])
        while batch := list(itertools.islice(shards, _THREADS * 4)):
            for shard, checked, source, change in pool.map(read, batch):
                sample.add(shard, checked.keys)
                found.rows += checked.rows
                found.findings += checked.findings
                if sources:
                    found.sources[source] += 1
                if source == _CHANGED:
                    found.changed.append(f"{shard}: {change}")
    found.repeated = sample.repeated()
    found.counted = sum(counted) if count else None
    return found


def _compare_count(
    store: Store, manifest: Mapping[str, Any], listings: Mapping[str, Listing], shard: str, checked: CheckedShard
) -> list[Finding] | None:
    """A finding if a source file has another number of samples than its shard; None if that cannot be counted."""
    url = current_url(checked.footer["source"], manifest.get("moved", {}))
    refused = store.quarantined(SAMPLES, shard) if shard in listings[f"quarantine/{SAMPLES}"] else []
    stored = count_stored(url, checked.rows, checked.keys, refused)
    try:
        there = None if stored is None else count_source(url, limits_of(manifest))
    except Exception:  # each driver has its own exceptions
        return None
    if stored is None or there is None:
        return None
    if stored == there:
        return []
    message = (
        f"{shard}: its source {url} has {there:,} samples, the dataset has {checked.rows:,} rows and "
        f"{stored - checked.rows:,} samples in the quarantine. To compute it again: "
        f"{drop_shard_command(store.url, [SAMPLES], shard)} --yes, and run again."
    )
    return [Finding("count", message, SAMPLES, shard)]


def _compare_source(
    footer: Mapping[str, str], recorded: SourceRecord | None, roots: ImageRoots, moved: Mapping[str, str]
) -> tuple[str, str]:
    """How the source file compares with the one that the samples were read from, and what has changed."""
    before = SourceState.from_footer(footer)
    if "source" not in footer or before.head is None:
        return _UNKNOWN, ""
    url = current_url(footer["source"], moved)
    try:
        now = probe_state(roots.check(url))
    except UserError:
        return _ELSEWHERE, ""
    if now is None:
        return _UNREADABLE, ""
    if before.same_content(now) is False:
        return _CHANGED, before.describe_change(now)
    same_place = recorded is not None and recorded.url == canonical(url)
    if same_place and recorded is not None and recorded.state.stamp not in (None, now.stamp):
        return _TOUCHED, ""
    return _SAME, ""


def _code_lines(manifest: Mapping[str, Any]) -> list[str]:
    """One line for each custom class whose file has changed while its layers were computed."""
    return [
        f"{kind[:-1]} {name}: its layers were computed with {len(entry[CODE_KEY])} states of the file of its class "
        f"(hashes {', '.join(map(str, entry[CODE_KEY]))}) under one `version`"
        for kind in ("teachers", "captioners")
        for name, entry in manifest[kind].items()
        if isinstance(entry.get(CODE_KEY), list) and len(entry[CODE_KEY]) > 1
    ]


def _first(lines: list[str], what: str) -> Iterator[str]:
    yield from lines[:_NAMED]
    if len(lines) > _NAMED:
        yield f"and {len(lines) - _NAMED:,} more {what}"
