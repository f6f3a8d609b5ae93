"""``reinforce validate``: the files of a dataset and its views, keys, and the source files as they are now."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from reinforce.dataset.files.damage import compute_again, drop_shard_command, find_damaged
from reinforce.dataset.files.index import LayerIndex
from reinforce.dataset.files.listing import Listing
from reinforce.dataset.files.store import Store
from reinforce.dataset.layers import SAMPLES
from reinforce.dataset.manifest.class_code import code_lines
from reinforce.dataset.reading.aligned import AlignedLayers
from reinforce.dataset.runs.key_sample import ALL, KeySample, RepeatedKeys
from reinforce.dataset.runs.shard_records import SourceRecord, read_records
from reinforce.dataset.validate.inventory import Finding, take_inventory
from reinforce.dataset.validate.shard_checks import ShardFiles
from reinforce.dataset.validate.shard_reader import STATES, ShardReader, Shards, default_processes
from reinforce.dataset.view import View, read_views
from reinforce.errors import StorageError, UserError
from reinforce.parallel.map_workers import open_workers
from reinforce.source.references import ImageRoots
from reinforce.terminal import first_lines, plural

_CAPACITY = 2**24  # hashes of keys, 128 MiB: datasets of more samples are estimated
_NAMED = 10
_VIEW_THREADS = 16
_FIX = "It probably lacks memory. Use fewer processes: --workers 1."


@dataclass
class Validation:
    """Findings in the dataset at ``url``, of whose ``shards`` some were ``read``."""

    url: str
    shards: int
    read: int
    repeated: RepeatedKeys
    rows: int = 0
    findings: list[Finding] = field(default_factory=list)
    sources: Counter[str] = field(default_factory=Counter)
    changed: list[str] = field(default_factory=list)
    code: list[str] = field(default_factory=list)
    counted: int | None = None  # shards whose samples were counted in their source, None if none were to be

    @property
    def errors(self) -> list[str]:
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
            "read_shards": self.read,
            "rows": self.rows,
            "findings": [asdict(finding) for finding in self.findings],
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
        yield from first_lines(self.errors, _NAMED, "more problems")
        yield from self.repeated.lines(0, self.url)
        if self.repeated.keys:
            yield (
                "  Each sample is kept and can be read, and equal keys draw the same random numbers. If a shard was "
                "listed twice, remove one from `source` and drop its samples; if the images differ, go on, or name "
                "a column or rename members so that keys are unique, and write a new dataset"
            )
        if self.changed:
            yield (
                f"{len(self.changed):,} source files have changed since their samples were written. Restore them, or "
                f"drop the samples of these shards ({drop_shard_command(self.url, [SAMPLES], 'SHARD')} --yes) and run "
                "again, which replaces their other layers, too:"
            )
            yield from (f"  {line}" for line in first_lines(self.changed, _NAMED, "more source files"))
        yield from self.code
        if self.sources:
            parts = [f"{self.sources[state]:,} {text}" for state, text in STATES.items() if self.sources[state]]
            yield f"source files: {'; '.join(parts) or 'all have changed'}"
        if self.counted is not None:
            yield (
                f"samples were counted in the source files of {self.counted:,} of {self.read:,} shards; others are "
                "not in --sources, have changed, or are parts of files or folders"
            )
        found = "valid" if self.valid else "not valid"
        if self.read < self.shards:
            yield (
                f"{self.url}: all {self.shards:,} shards were listed and {self.read:,} random ones were read, among "
                f"which repeated keys were looked for, {found}"
            )
        else:
            yield f"{self.url}: read {plural(self.shards, 'shard')}, {found}"


def validate(
    url: str,
    sources: Sequence[str] = (),
    quick: bool = False,
    count: bool = False,
    sample: int | None = None,
    seed: int = 0,
    processes: int | None = None,
) -> Validation:
    """Read every layer, compare the keys, and look at the source files in the folders ``sources``.

    ``quick`` reads only the keys, so that damage in other columns is not found. ``count`` also compares the samples of
    each source file with the rows and the quarantine of its shard. With ``sample``, only so many random shards are
    read, which ones depends on the ``seed``; what the listings and ``dataset.json`` show is checked of all.

    ``processes`` read; the default depends on the cores and on the size of the dataset.

    The dataset names its sources, and who made it could name anything: other files are not opened. Raises UserError if
    there is no dataset.
    """
    ImageRoots.named(sources, "--sources {}")  # checked before anything is read
    store = Store(url)
    inventory = take_inventory(store)
    manifest, listings = inventory.manifest, inventory.listings
    names = [*listings]
    keys = KeySample(_CAPACITY)
    chosen = _choose(listings[SAMPLES], sample, seed)
    found = Validation(store.url, len(listings[SAMPLES]), len(chosen), keys.repeated(), code=code_lines(manifest))
    found.findings += inventory.findings
    if len(chosen) < len(listings[SAMPLES]):
        found.findings += _check_sizes(store, manifest, listings, inventory.indexes, chosen)
    every = inventory.every
    del inventory  # the indexes of a large dataset
    if processes is None:
        share = len(chosen) / max(1, len(listings[SAMPLES]))
        size = int(share * sum(listing.total_bytes for listing in listings.values()))
        processes = default_processes(quick, len(chosen) * len(names), size)
    recorded = read_records(store).sources if sources else {}
    reader = ShardReader(url, manifest, quick, sources, count, processes)
    with contextlib.closing(reader), open_workers(use_ray=False, processes=processes) as workers:
        batches = _batches(_shard_files(chosen, every, names), reader.batch, recorded, keys, count)
        read = workers.map(reader.read, batches, ordered=True, name=Shards.describe, fix=_FIX)
        counted = 0
        for shard in itertools.chain.from_iterable(shards for _, shards in read):
            keys.add(shard.name, shard.keys)
            found.rows += shard.rows
            found.findings += shard.findings
            found.sources.update([shard.source] if sources else ())
            found.changed += [f"{shard.name}: {shard.changed}"] if shard.source == "changed" else []
            counted += shard.counted
    faulty = {finding.shard for finding in found.findings}
    findings, notes = _check_views(store, manifest, listings[SAMPLES], [name for name in chosen if name not in faulty])
    found.findings += findings
    found.code += notes
    found.repeated = keys.repeated()
    found.counted = counted if count else None
    return found


def _choose(samples: Listing, most: int | None, seed: int) -> Listing:
    """Some random shards, or all."""
    if most is None or most >= len(samples):
        return samples
    places = sorted(random.Random(seed).sample(range(len(samples)), most))  # noqa: S311 - not a secret
    return Listing(samples.names.take(pa.array(places, pa.int64())), samples.sizes[places])


def _check_sizes(
    store: Store,
    manifest: Mapping[str, Any],
    listings: Mapping[str, Listing],
    indexes: Mapping[str, LayerIndex],
    read: Listing,
) -> Iterator[Finding]:
    """Files of shards that are not read whose size is not that which was committed, and whose footer is damaged."""
    fingerprints = {name: entry["fingerprint"] for name, entry in manifest["layers"].items()}
    others = {name: listing.only(~listing.within(read.names)) for name, listing in listings.items()}
    for file in find_damaged(store, others, fingerprints, indexes):
        advice = compute_again(store.url, file.layer, file.shard)
        message = f"{store.layer_path(file.layer, file.shard)}: {file.reason}. {advice}"
        yield Finding("damaged", message, file.layer, file.shard)


def _shard_files(chosen: Listing, listings: Mapping[str, Listing], layers: Sequence[str]) -> Iterator[ShardFiles]:
    """Listed files of some shards: layers and quarantine."""
    sizes = [listings[layer].sizes_of(chosen.names) for layer in layers]
    refused = [listings[f"quarantine/{layer}"].has(chosen.names) for layer in layers]
    for place, name in enumerate(chosen):
        present = {layer: int(size[place]) for layer, size in zip(layers, sizes, strict=True) if size[place] >= 0}
        yield ShardFiles(name, present, [layer for layer, has in zip(layers, refused, strict=True) if has[place]])


def _batches(
    files: Iterator[ShardFiles], size: int, recorded: Mapping[str, SourceRecord], keys: KeySample, count: bool
) -> Iterator[Shards]:
    """The shards in batches. Counting needs all hashes of keys; otherwise those that are still sampled are enough."""
    while batch := [*itertools.islice(files, size)]:
        known = {file.name: recorded[file.name] for file in batch if file.name in recorded}
        yield Shards(batch, known, ALL if count else keys.limit)


def _check_views(
    store: Store, manifest: Mapping[str, Any], shards: Listing, chosen: Collection[str]
) -> tuple[list[Finding], list[str]]:
    """Problems of the files of views, and lines about views that are refused because their inputs have changed.

    ``shards`` are those of the samples, of which the files of the ``chosen`` ones are read.
    """
    findings: list[Finding] = []
    notes: list[str] = []
    for name, view in read_views(store):
        if isinstance(view, UserError):
            findings.append(Finding("view", str(view), f"views/{name}"))
            continue
        if changes := view.changes(store, manifest):
            notes.append(f"view {name} is refused: {'; '.join(changes)}. Make it again with reinforce select.")
            continue
        if lost := [shard for shard in view.counts if shard not in shards]:
            message = f"{store.url}: view {name} has {len(lost):,} shards without samples, such as {lost[0]}"
            findings.append(Finding("view", message, f"views/{name}"))
        findings += _check_view(store, manifest, view, [shard for shard in chosen if shard in view.counts])
    return findings, notes


def _check_view(store: Store, manifest: Mapping[str, Any], view: View, shards: Collection[str]) -> Iterator[Finding]:
    fingerprints = {SAMPLES: manifest["layers"][SAMPLES]["fingerprint"]}
    aligned = AlignedLayers(store, fingerprints, {SAMPLES: ["key"]}, view=view.rows)

    def check(shard: str) -> str | None:
        try:
            with aligned.open(shard, whole=False) as files:
                kept = [files.row_group(number).samples.num_rows for number in range(files.row_groups)]
        except StorageError:
            raise
        except UserError as error:
            return str(error)
        if kept == list(view.kept[shard]):
            return None
        return f"{store.url}: view {view.name} keeps other rows of {shard} than it states. Make it again."

    with ThreadPoolExecutor(_VIEW_THREADS) as pool:
        for shard, message in zip(shards, pool.map(check, shards), strict=True):
            if message is not None:
                yield Finding("view", message, f"views/{view.name}", shard)
