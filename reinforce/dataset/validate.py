"""``reinforce validate``: the files of a dataset and its views, keys, and the source files as they are now.

With ``--repair``, it sets the files aside that are at fault, so that the next run computes them again. Nothing is
deleted. A file stays where a run could not replace it, or where dataset.json may be wrong instead of it. Samples come
from the source, so theirs stay unless the source file can be read and has not changed.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from reinforce.dataset.aligned import AlignedLayers
from reinforce.dataset.index import (
    SET_ASIDE,
    LayerIndex,
    compute_again,
    drop_shard_command,
    file_damage,
    find_damaged,
    set_aside,
)
from reinforce.dataset.kinds.registry import drop_command, with_dependants
from reinforce.dataset.layer_file import RefusedFile
from reinforce.dataset.layers import SAMPLES
from reinforce.dataset.manifest import code_lines, read_manifest
from reinforce.dataset.runs import ALL, KeySample, RepeatedKeys, SourceRecord, read_records
from reinforce.dataset.shard_checks import (
    PROCESS_BYTES,
    PROCESS_FILES,
    STATES,
    Finding,
    ShardFiles,
    ShardReader,
    Shards,
    compare_source,
    take_inventory,
)
from reinforce.dataset.store import (
    MANIFEST,
    QUARANTINE,
    DamagedQuarantine,
    Listing,
    Store,
    parse_footer,
)
from reinforce.dataset.view import View, read_views
from reinforce.errors import StorageError, UserError
from reinforce.processes.cores import available_cores
from reinforce.processes.parallel import open_workers
from reinforce.source.references import ImageRoots, SourceState, current_url
from reinforce.source.urls import shard_name
from reinforce.terminal import first_lines, first_names, plural

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
    chosen = samples = listings[SAMPLES]
    if sample is not None and sample < len(samples):  # some random shards
        places = sorted(random.Random(seed).sample(range(len(samples)), sample))  # noqa: S311 - not a secret
        chosen = Listing(samples.names.take(pa.array(places, pa.int64())), samples.sizes[places])
    found = Validation(store.url, len(listings[SAMPLES]), len(chosen), keys.repeated(), code=code_lines(manifest))
    found.findings += inventory.findings
    if len(chosen) < len(listings[SAMPLES]):
        found.findings += _check_sizes(store, manifest, listings, inventory.indexes, chosen)
    every = inventory.every
    del inventory  # the indexes of a large dataset
    if processes is None:
        share = len(chosen) / max(1, len(listings[SAMPLES]))
        size = share * sum(listing.total_bytes for listing in listings.values())
        worth = max(len(chosen) * len(names) / PROCESS_FILES, 0 if quick else int(size) / PROCESS_BYTES)
        processes = max(1, min(available_cores(), int(worth)))
    recorded = read_records(store).sources if sources else {}
    reader = ShardReader(url, manifest, quick, sources, count, processes)
    with contextlib.closing(reader), open_workers(use_ray=False, processes=processes) as workers:
        batches = _batches(chosen, every, names, reader.batch, recorded, keys, count)
        read = workers.map(
            reader.read,
            batches,
            ordered=True,
            name=lambda shards: first_names([file.name for file in shards.files]),
            fix=_FIX,
        )
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


def _batches(
    chosen: Listing,
    listings: Mapping[str, Listing],
    layers: Sequence[str],
    size: int,
    recorded: Mapping[str, SourceRecord],
    keys: KeySample,
    count: bool,
) -> Iterator[Shards]:
    """The listed files of some shards, in layers and quarantine, in batches of shards.

    Counting needs all hashes of keys; otherwise those that are still sampled are enough.
    """
    sizes = [listings[layer].sizes_of(chosen.names) for layer in layers]
    refused = [listings[f"quarantine/{layer}"].has(chosen.names) for layer in layers]
    names = enumerate(chosen)
    while places := [*itertools.islice(names, size)]:
        batch = []
        for place, name in places:
            present = {layer: int(of[place]) for layer, of in zip(layers, sizes, strict=True) if of[place] >= 0}
            quarantined = [layer for layer, has in zip(layers, refused, strict=True) if has[place]]
            batch.append(ShardFiles(name, present, quarantined))
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
        fingerprints = {SAMPLES: manifest["layers"][SAMPLES]["fingerprint"]}
        aligned = AlignedLayers(store, fingerprints, {SAMPLES: ["key"]}, view=view.rows)
        read = [shard for shard in chosen if shard in view.counts]
        with ThreadPoolExecutor(_VIEW_THREADS) as pool:
            messages = pool.map(functools.partial(_check_rows, aligned, view), read)
            for shard, problem in zip(read, messages, strict=True):
                if problem is not None:
                    findings.append(Finding("view", problem, f"views/{name}", shard))
    return findings, notes


def _check_rows(aligned: AlignedLayers, view: View, shard: str) -> str | None:
    """What is wrong with the rows of a shard that a view keeps."""
    try:
        with aligned.open(shard, whole=False) as files:
            kept = [files.row_group(number).samples.num_rows for number in range(files.row_groups)]
    except StorageError:
        raise
    except UserError as error:
        return str(error)
    if kept == list(view.kept[shard]):
        return None
    return f"{aligned.store.url}: view {view.name} keeps other rows of {shard} than it states. Make it again."


#: Why a source file cannot replace samples, by its state.
_WHY = {
    "elsewhere": "was not looked at, name its folder by --sources",
    "unreadable": "cannot be read",
    "changed": "has changed ({})",
}


@dataclass
class Repair:
    """Files that were moved, with their new paths; why others stay; and the shards that the next run computes."""

    moved: list[tuple[str, str]] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    computed: Counter[str] = field(default_factory=Counter)

    def lines(self) -> Iterator[str]:
        """For people: what was moved, what stays and what the next run computes."""
        moved = [f"moved {name} to {path}" for name, path in self.moved]
        yield from first_lines(moved, _NAMED, f"more files to {SET_ASIDE}/")
        yield from first_lines(self.kept, _NAMED, "more that were not moved")
        if self.computed:
            parts = [f"{layer} of {count:,} shards" for layer, count in self.computed.items()]
            yield f"`reinforce run` with the dataset's config computes: {'; '.join(parts)}"
        elif not self.kept:
            yield "there is nothing to repair"

    def as_json(self) -> dict[str, Any]:
        moved = [{"file": name, "to": path} for name, path in self.moved]
        return {"moved": moved, "kept": self.kept, "computed": dict(self.computed)}


def repair(url: str, findings: Sequence[Finding], sources: Sequence[str] = ()) -> Repair:
    """Set the files aside that ``findings`` name as at fault; a local dataset is locked.

    Source files are looked at in the folders ``sources`` only. Raises UserError, among others if a run is writing.
    """
    roots = ImageRoots.named(sources, "--sources {}")
    store = Store(url)
    manifest = read_manifest(store, check_digest=False)  # which findings are about
    done = Repair()
    if wrong := [finding for finding in findings if finding.kind == "manifest"]:
        done.kept.append(f"nothing was moved, because {MANIFEST} is at fault, not the files: {wrong[0].message}")
        return done
    files: dict[str, list[str]] = {}
    for layer, shard in dict.fromkeys((f.layer, f.shard) for f in findings if f.at_fault):
        files.setdefault(str(layer), []).append(str(shard))
    listings = store.listings(files)
    damaged = {(f.layer, f.shard) for f in findings if f.kind == "damaged"}
    passed = {file for file in damaged if file_damage(store, str(file[0]), str(file[1])) is None}
    with store.lock():
        _repair_quarantine(store, findings, done)
        for layer, shards in files.items():
            if len(shards) == len(listings[layer]) > 1 and not all(_is_of_other(store, layer, one) for one in shards):
                command = drop_command(store.url, with_dependants([layer], manifest["layers"]), manifest["layers"])
                done.kept.append(
                    f"{layer}: none of its {len(shards):,} files was moved, because all are at fault, so {MANIFEST} or "
                    f"the samples are more likely to be wrong. Restore them; or to compute the layer again: {command}"
                )
                continue
            kept = {shard: "it can be read now" for shard in shards if (layer, shard) in passed}
            if layer == SAMPLES:
                kept = {**_only_copies(store, manifest, shards, roots), **kept}
            done.kept += (f"{layer}/{shard}.parquet was not moved: {reason}" for shard, reason in kept.items())
            for shard in shards:
                if shard not in kept:
                    done.moved.append((f"{layer}/{shard}.parquet", set_aside(store, layer, shard)))
                    done.computed[layer] += 1
    done.computed.update(f.layer for f in findings if f.kind == "missing" and f.layer and f.shard)
    return done


def _repair_quarantine(store: Store, findings: Sequence[Finding], done: Repair) -> None:
    """Set damaged quarantine files aside, and with each the file of its layer, so that a run writes the reasons of its
    null rows again. Samples stay, since they have no such rows."""
    quarantine = [(str(f.layer), str(f.shard)) for f in findings if f.kind == "quarantine"]
    others = {(f.layer, f.shard) for f in findings if f.at_fault}  # are set aside for themselves
    listings = store.listings({layer for layer, _ in quarantine})
    for layer, shard in quarantine:
        with contextlib.suppress(DamagedQuarantine):
            store.quarantined(layer, shard)
            done.kept.append(f"{QUARANTINE}{layer}/{shard}.parquet was not moved: it can be read now")
            continue
        done.moved.append((f"{QUARANTINE}{layer}/{shard}.parquet", set_aside(store, f"{QUARANTINE}{layer}", shard)))
        stored = shard in listings[layer]
        if stored and layer != SAMPLES and (layer, shard) not in others:
            done.moved.append((f"{layer}/{shard}.parquet", set_aside(store, layer, shard)))
        done.computed[layer] += layer != SAMPLES or not stored


def _only_copies(store: Store, manifest: Mapping[str, Any], shards: Iterable[str], roots: ImageRoots) -> dict[str, str]:
    """The shards whose samples a run could not compute again, with the reason."""
    recorded = read_records(store).sources
    reasons = {}
    for shard in shards:
        source: str | None = None
        before = SourceState(None, None)
        for layer in manifest["layers"]:  # the footers of its files that are of this shard state it
            with contextlib.suppress(RefusedFile, UserError, OSError):
                with store.open_layer(layer, shard, whole=False) as file:
                    footer = parse_footer(file.metadata)
                if (found := footer.get("source")) and shard_name(found) == shard:
                    source, before = found, SourceState.from_footer(footer)
                    break
        if source is None and shard in recorded:
            source, before = recorded[shard].url, recorded[shard].state
        if source is None:
            reason = "no file of the shard records its source"
        else:
            url = current_url(source, manifest.get("moved", {}))
            state, change, _ = compare_source(url, before, roots)
            if state == "same":
                continue
            reason = f"its source {url} {_WHY[state].format(change)}"
        reasons[shard] = f"{reason}, and the samples may be the only copy"
    return reasons


def _is_of_other(store: Store, layer: str, shard: str) -> bool:
    """Whether a file is one of another shard, by its footer."""
    try:
        with store.open_layer(layer, shard, whole=False) as file:
            source = parse_footer(file.metadata).get("source")
    except (RefusedFile, UserError, OSError):
        return False
    return bool(source) and shard_name(str(source)) != shard
