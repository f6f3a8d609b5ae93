"""What validation finds: in dataset.json, in the listings, in the files of each shard, and in its source file now.

A row that a layer could not serve is null and has a reason in the layer's quarantine, and no other row has one. With
``--count``, samples of the source file are compared with the rows and the quarantine. The rows of a Parquet file are in
its footer, of which some kilobytes are read. Other files are read as a whole.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

import schemas
from reinforce.dataset.aligned import MisalignedKeys, alignment_error, layer_errors
from reinforce.dataset.codecs import codebooks
from reinforce.dataset.drop import layers_with_folders
from reinforce.dataset.index import Hashes, LayerIndex, check_columns, compute_again, digest_keys, hash_keys, read_index
from reinforce.dataset.kinds.registry import depends, stored_layer
from reinforce.dataset.layer_file import LayerFile, RefusedFile, StoredKeys
from reinforce.dataset.layers import LABELS, SAMPLES, mapping_at
from reinforce.dataset.manifest import changed_by_hand, read_manifest
from reinforce.dataset.runs import ShardKeys, SourceRecord
from reinforce.dataset.store import (
    MANIFEST,
    QUARANTINE,
    DamagedFile,
    DamagedQuarantine,
    Listing,
    Store,
    check_footer,
    other_origin,
    parse_footer,
)
from reinforce.errors import StorageError, UserError
from reinforce.source.config import DEFAULT, Input, Limits
from reinforce.source.formats.base import find_format, format_of_name
from reinforce.source.parquet_file import check_together
from reinforce.source.references import ImageRoots, SourceState, current_url, probe_state
from reinforce.source.urls import canonical, shard_name
from reinforce.storage import Storage
from reinforce.terminal import first_names, plural
from schemas import Reason

#: ``unreadable``: the storage has failed. ``damaged``: the bytes are not those that were written. ``misplaced``: a file
#: of another layer, shard or recipe. ``rows``: values that a run does not write. ``missing``: a file that should exist.
#: ``orphan``: a file that belongs to nothing. ``manifest``: dataset.json contradicts itself or the files.
#: ``count``: the source has another number of samples. ``quarantine``: the quarantine file of the layer is damaged.
#: ``view``: a view is damaged, or of other rows than the samples. ``codebook``: that of a layer is lost or has changed.
Kind = Literal[
    "unreadable", "damaged", "misplaced", "rows", "missing", "orphan", "manifest", "count", "quarantine", "view",
    "codebook",
]  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One problem. ``layer`` and ``shard`` name the file, None if it is not in one file."""

    kind: Kind
    message: str
    layer: str | None = None
    shard: str | None = None

    @property
    def at_fault(self) -> bool:
        """Whether the file has a fault that ends if a run computes it again."""
        return self.kind in ("damaged", "misplaced", "rows") and None not in (self.layer, self.shard)


@dataclass(frozen=True)
class Inventory:
    """Inventory of a dataset: dataset.json, the listings of its layers and of ``quarantine/<layer>``, its indexes, and
    what is wrong with these."""

    manifest: Mapping[str, Any]
    every: Mapping[str, Listing]
    indexes: Mapping[str, LayerIndex]
    findings: Sequence[Finding]

    @property
    def listings(self) -> dict[str, Listing]:
        return {name: self.every[name] for name in self.manifest["layers"]}

    def shards(self) -> pa.StringArray:
        """The shards that have samples, or had some by the index."""
        return Listing.union([self.every[SAMPLES], self.indexes[SAMPLES].listing()])


def take_inventory(store: Store) -> Inventory:
    """Read dataset.json and the indexes, list the layers, and check them. Raises UserError if there is no dataset.

    A run may write meanwhile. So everything is listed again before a file is reported as missing or as one that belongs
    to nothing, and only what both listings show is reported: a run commits the layers of a shard one after the other,
    and they are listed side by side.
    """
    first = _take_inventory(store)
    if not any(one.kind in ("missing", "orphan") for one in first.findings):
        return first
    again = _take_inventory(store, first.shards())
    known = {(one.layer, one.shard) for one in first.findings if one.kind == "orphan"}
    findings = [one for one in again.findings if one.kind != "orphan" or (one.layer, one.shard) in known]
    return replace(again, findings=findings)


def _take_inventory(store: Store, seen: pa.StringArray | None = None) -> Inventory:
    """The inventory; of the shards that are missing in a layer, only those that were ``seen`` before."""
    manifest = read_manifest(store, check_digest=False)
    entries = manifest["layers"]
    # Before the listing: a run adds a file to an index after it has committed it.
    indexes = {name: read_index(store, name, entry["fingerprint"]) for name, entry in entries.items()}
    every = store.listings([*entries, *(f"quarantine/{name}" for name in entries)])
    found = Inventory(manifest, every, indexes, ())
    findings = [*check_recipes(manifest), *check_codebooks(store, manifest), *check_missing(store, found, seen)]
    listings = found.listings
    for layer, listing in listings.items():
        for shard in listing.only(~listing.within(listings[SAMPLES].names)):
            findings.append(Finding("orphan", f"{layer}/{shard}.parquet has no samples", layer, shard))
    others = sorted(layers_with_folders(store) - listings.keys())
    for layer, listing in store.listings(others).items():
        if listing:
            text = f"{layer} has {len(listing):,} files, but {MANIFEST} does not list it"
            findings.append(Finding("orphan", text, layer))
    return replace(found, findings=findings)


def check_recipes(manifest: Mapping[str, Any]) -> Iterator[Finding]:
    """Layers whose settings in dataset.json do not have the fingerprint that is beside them, or else another digest.

    The digest covers logit scales and all else that no fingerprint covers.
    """
    known = manifest.get("schema_version") == schemas.SCHEMA_VERSION
    hidden = {*mapping_at(manifest, LABELS).get("hidden", ())}  # fingerprints cover settings that are not published
    as_stated = True
    for name, entry in manifest["layers"].items() if known else ():
        layer = stored_layer(name, entry)
        if not hidden.isdisjoint((".".join(map(str, layer.owner)), f"layers.{name}")):
            continue
        computed = layer.kind.recorded(layer, manifest).fingerprint
        if computed is not None and computed != entry["fingerprint"]:
            as_stated = False
            yield Finding(
                "manifest",
                f"{MANIFEST}: the settings of {name} have fingerprint {computed}, its entry states "
                f"{entry['fingerprint'][:40]}: one of them was changed. Restore {MANIFEST}.",
                name,
            )
    problem = changed_by_hand(manifest) if as_stated else None
    if problem is not None:
        yield Finding("manifest", problem)


def check_codebooks(store: Store, manifest: Mapping[str, Any]) -> Iterator[Finding]:
    """Codebooks that are missing or have changed."""
    for name, entry in manifest["layers"].items():
        place = stored_layer(name, entry).codebook_at(store.url)
        try:
            if place is not None:
                codebooks.read(store, name, place.digest)
        except StorageError:
            raise
        except UserError as error:
            yield Finding("codebook", str(error), name)


def check_missing(store: Store, inventory: Inventory, seen: pa.StringArray | None = None) -> Iterator[Finding]:
    """Files that runs have committed, by the indexes, and that are gone, and those that are not computed yet.

    A shard that is quarantined in a layer lacks this layer and those that are computed from it. Of the listed
    quarantine, the files without a file of the layer are read. With ``seen``, other shards are not looked at.
    """
    listings, entries = inventory.listings, inventory.manifest["layers"]
    damaged: list[DamagedFile] = []
    refused = store.lone_quarantine(listings, damaged, inventory.every)
    for file in sorted(damaged):
        yield quarantine_finding(store, file.layer.removeprefix(QUARANTINE), file.shard, file.reason)
    committed = {name: index.listing() for name, index in inventory.indexes.items()}
    every = inventory.shards()
    if seen is not None:
        every = every.filter(pc.is_in(every, value_set=seen))
    if all(listing.has(every).all() for listing in listings.values()):
        return
    for layer, listing in listings.items():
        needed = [name for name in listings if name == layer or depends(layer, name, entries)]
        unusable = {shard for name in needed for shard, whole in refused[name].items() if whole}
        absent = set(every.filter(pa.array(~listing.has(every))).to_pylist()) - unusable
        names = pa.array(sorted(absent), pa.string())
        gone = committed[layer].has(names)
        for shard in names.filter(pa.array(gone)).to_pylist():
            yield Finding(
                "missing",
                f"{layer}/{shard}.parquet is missing although a run has committed it. `reinforce run` with the "
                "dataset's config computes it again.",
                layer,
                shard,
            )
        if pending := names.filter(pa.array(~gone)).to_pylist():
            yield Finding(
                "missing",
                f"{layer} lacks {len(pending):,} of {len(every):,} shards ({first_names(pending)}), which no index "
                "lists: they are not computed yet",
                layer,
            )


def quarantine_finding(store: Store, layer: str, shard: str, reason: str) -> Finding:
    """The finding for a damaged quarantine file of a layer."""
    message = f"{store.layer_path(QUARANTINE + layer, shard)} is damaged: {reason}. --repair sets it aside."
    return Finding("quarantine", message, layer, shard)


_NO_HASHES: Hashes = np.empty(0, np.uint64)
SHARD_CAPACITY = 2**20  # hashes of keys from one shard
_shard_name = functools.lru_cache(maxsize=256)(shard_name)  # the files of a shard have one source
_STORED_BYTES = 2**24  # of the stored keys of a shard's samples that are kept, to be compared with other layers


@dataclass(frozen=True)
class ShardFiles:
    """Listed files of a shard: bytes by layer, and the layers with a quarantine file."""

    name: str
    sizes: Mapping[str, int]
    quarantined: Collection[str] = ()


@dataclass
class CheckedShard:
    """A shard as it was read: hashes of its keys, rows, the footer of its samples, and what is wrong.

    ``source`` is the state of its source file, ``changed`` what has changed there, and ``counted`` whether its samples
    were counted there.
    """

    name: str
    keys: ShardKeys = field(default_factory=lambda: ShardKeys(_NO_HASHES))
    rows: int = 0
    footer: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    source: str = ""
    changed: str = ""
    counted: bool = False


class _Keys:
    """The keys of the samples of a shard, by row group: digests, how they are stored, and their hashes up to a limit.

    Nothing of it grows with the keys but the stored ones and the hashes, which are bounded.
    """

    def __init__(self, limit: int) -> None:
        self.digests: list[bytes] = []
        self.stored: list[StoredKeys | None] = []
        self._hashes: list[Hashes] = []
        self._limit, self._count = limit, 0
        self.free_bytes = _STORED_BYTES  # of stored keys that are kept of the next row groups

    def add(self, keys: pa.ChunkedArray, stored: StoredKeys | None) -> None:
        self.digests.append(digest_keys(keys))
        self.stored.append(stored)
        self.free_bytes -= 0 if stored is None else len(stored.chunk)
        hashes = hash_keys(keys)
        self._hashes.append(hashes[hashes <= np.uint64(self._limit)])
        self._count += len(self._hashes[-1])
        if self._count > 2 * SHARD_CAPACITY:
            kept = self.sample()
            self._hashes, self._limit, self._count = [kept.hashes], kept.limit, len(kept.hashes)

    def sample(self) -> ShardKeys:
        hashes = np.unique(np.concatenate(self._hashes)) if self._hashes else _NO_HASHES
        return ShardKeys(_NO_HASHES, self._limit).joined(ShardKeys(hashes, self._limit), SHARD_CAPACITY)


class RowChecks:
    """Problems of the rows of one file of ``layer``, in any number of row groups.

    ``entry`` is the layer's in dataset.json, ``records`` the number of augmentation records of a sample there.
    """

    def __init__(self, layer: str, entry: Mapping[str, Any], records: int | None) -> None:
        self._layer, self._records = stored_layer(layer, entry), records
        self._wrong: dict[str, list[str]] = {}  # keys of rows by what is wrong with them
        self._null: set[str] = set()
        self._present: set[str] = set()

    def add(self, table: pa.Table) -> None:
        """Check a row group with all columns of the layer."""
        kind = self._layer.kind
        if kind.values is not None:
            valid = table[kind.values].is_valid()
            self._null.update(table["key"].filter(pc.invert(valid)).to_pylist())
            self._present.update(table["key"].filter(valid).to_pylist())
        for what, wrong in kind.wrong_rows(self._layer, table, self._records):
            if wrong.any():
                self._wrong.setdefault(what, []).extend(table["key"].filter(pa.array(wrong)).to_pylist())

    def problems(self, quarantined: Collection[str] | None) -> list[str]:
        """One phrase for each kind of problem; ``quarantined`` are the keys in the layer's quarantine of the shard, or
        None if they are not known."""
        wrong: dict[str, Collection[str]] = dict(self._wrong)
        if quarantined is not None:
            wrong["are null without a reason in the quarantine"] = self._null.difference(quarantined)
            wrong["are in the quarantine although they have values"] = self._present.intersection(quarantined)
        return [
            f"{plural(len(keys), 'row')} {what} ({first_names(sorted(keys))})" for what, keys in wrong.items() if keys
        ]


def check_shards(
    store: Store, manifest: Mapping[str, Any], quick: bool, shards: Sequence[ShardFiles], limit: int
) -> list[CheckedShard]:
    """Read some shards, or only their keys if ``quick``; hashes of keys up to a ``limit`` are returned."""
    ends: dict[str, dict[str, LayerFile]] = {shard.name: {} for shard in shards}
    if quick:
        for shard in shards:
            for layer, size in shard.sizes.items():
                with contextlib.suppress(Exception):  # then it is opened again, which raises the same
                    ends[shard.name][layer] = store.layer_end(layer, shard.name, size)
        check_together([file.footer for files in ends.values() for file in files.values()])
    return [_ShardCheck(store, manifest, quick, shard, ends[shard.name], limit).run() for shard in shards]


class _ShardCheck:
    """The check of one shard. ``ends`` are those of its files whose end was read before, by layer."""

    def __init__(
        self,
        store: Store,
        manifest: Mapping[str, Any],
        quick: bool,
        shard: ShardFiles,
        ends: Mapping[str, LayerFile],
        limit: int,
    ) -> None:
        self._store, self._manifest, self._quick, self._shard, self._ends = store, manifest, quick, shard, ends
        self._found = CheckedShard(shard.name)
        self._keys: _Keys | None = _Keys(limit)  # of the samples; None if these are damaged

    def run(self) -> CheckedShard:
        """Read all layers, the samples first. Other layers are not compared with damaged samples."""
        found, name = self._found, self._shard.name
        for layer in sorted(self._manifest["layers"], key=lambda name: name != SAMPLES):
            if layer in self._shard.sizes:
                refused: set[str] | Finding = set()  # the keys in its quarantine, or what is wrong with that
                try:
                    if layer in self._shard.quarantined:
                        rows = self._store.quarantined(layer, name)
                        refused = {row["key"] for row in rows if row["key"] is not None}
                except DamagedQuarantine as error:
                    refused = quarantine_finding(self._store, layer, name, error.args[1])
                except (UserError, OSError) as error:
                    refused = Finding("unreadable", str(error), layer, name)
                found.findings += self._check(layer, refused)
                found.findings += [refused] if isinstance(refused, Finding) else []
            if layer == SAMPLES and self._keys is not None:
                found.keys = self._keys.sample()
                if any(finding.kind != "rows" for finding in found.findings):
                    self._keys = None
        return found

    def _check(self, layer: str, refused: set[str] | Finding) -> Iterator[Finding]:
        """Problems of a layer's file; ``refused`` are the keys in its quarantine, or what is wrong with that."""
        name, end = self._shard.name, self._ends.get(layer)
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(layer_errors(self._store, layer, name))
                if end is None:
                    size = self._shard.sizes[layer]
                    opened = self._store.open_layer(layer, name, whole=not self._quick, size=size)
                    file = stack.enter_context(opened)
                else:
                    file = end
                    check_footer(self._store.layer_path(layer, name), file.metadata, None)
                footer = parse_footer(file.metadata)
                if layer == SAMPLES:
                    self._found.footer = footer
                if reason := self._why_misplaced(layer, footer):
                    yield Finding("misplaced", self._message(layer, reason), layer, name)
                if self._keys is None:
                    for number in range(file.num_row_groups):
                        file.read_row_group(number, ("key",) if self._quick else None)
                elif not reason:
                    if layer != SAMPLES and (other := other_origin(self._found.footer, footer)):
                        raise alignment_error(self._store, layer, name, other)
                    yield from self._rows(layer, file, self._keys, refused)
        except MisalignedKeys as error:
            yield Finding("misplaced", str(error), layer, name)
        except (UserError, OSError) as error:  # the file is damaged if its content was refused
            cause = error if isinstance(error, RefusedFile) else error.__cause__
            if isinstance(cause, RefusedFile):
                yield Finding("damaged", str(error), *(cause.file or (layer, name)))
            else:
                yield Finding("unreadable", str(error), layer, name)

    def _why_misplaced(self, layer: str, footer: Mapping[str, str]) -> str | None:
        """Why a file is not the one of this layer and shard, by its footer."""
        expected = self._manifest["layers"][layer]["fingerprint"]
        if footer.get("layer", layer) != layer:
            return f"it is a file of layer {footer['layer'][:200]}"
        if footer.get("fingerprint") != expected:
            return f"it has fingerprint {footer.get('fingerprint', 'none')[:40]}, its layer has {expected}"
        if (source := footer.get("source")) and _shard_name(source) != self._shard.name:
            return f"it is of the source shard {source[:500]}"
        return None

    def _rows(self, layer: str, file: LayerFile, keys: _Keys, refused: set[str] | Finding) -> Iterator[Finding]:
        """Problems of the rows of a file. The ``keys`` are compared with those of the samples, or are added to them."""
        checks = RowChecks(layer, self._manifest["layers"][layer], self._manifest["augmentations"].get("count"))
        if layer != SAMPLES and file.num_row_groups != len(keys.digests):
            raise alignment_error(self._store, layer, self._shard.name)
        for number in range(file.num_row_groups):
            stored = None
            if self._quick:
                stored = file.stored_keys(number, keys.free_bytes if layer == SAMPLES else _STORED_BYTES)
                if layer != SAMPLES and stored is not None and stored == keys.stored[number]:
                    continue
            table = file.read_row_group(number, ("key",) if self._quick else None)
            if "key" not in table.column_names:
                raise RefusedFile("it has no column key")
            if layer == SAMPLES:
                keys.add(table["key"], stored)
                self._found.rows += table.num_rows
            elif digest_keys(table["key"]) != keys.digests[number]:
                raise alignment_error(self._store, layer, self._shard.name)
            if not self._quick:
                check_columns(layer, table)
                checks.add(table)
        if not self._quick:
            # Keys that the samples refuse have no row. Which ones a damaged quarantine has is not known.
            known = None if isinstance(refused, Finding) else refused if layer != SAMPLES else set()
            for problem in checks.problems(known):
                yield Finding("rows", self._message(layer, problem), layer, self._shard.name)

    def _message(self, layer: str, reason: str) -> str:
        name = self._shard.name
        return f"{self._store.layer_path(layer, name)}: {reason}. {compute_again(self._store.url, layer, name)}"


_TOGETHER = 4  # shards of a thread, if only keys are read: their footers are checked together
#: Threads of a process, for the latency of storage; on a local disk, more of them only wait for each other.
_THREADS, _LOCAL_THREADS = 16, 4
_BATCH = 64  # shards that are read together; their results are one message of a process
_ALONE = 8  # times as many where no other process reads while the last ones of a batch are read
#: Files and bytes that a process reads in about as much time as it takes to start.
PROCESS_FILES, PROCESS_BYTES = 4096, 2**30
#: What the state of a source file can be, as lines show it, besides ``changed``.
STATES = {
    "same": "as when their samples were written",
    "touched": "with another modification time or ETag, but the same size and first 64 KiB",
    "unknown": "that were not recorded, because they are images of a folder",
    "unreadable": "that cannot be read now, which only `images: reference` needs",
    "elsewhere": "outside of the folders of --sources, which were not looked at",
}


@dataclass(frozen=True)
class Shards:
    """Shards to read, with the records of their sources; hashes of keys up to ``limit`` are wanted."""

    files: Sequence[ShardFiles]
    recorded: Mapping[str, SourceRecord]
    limit: int


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
    def _pool(self) -> ThreadPoolExecutor:
        # `hash_keys` needs it. Threads of a new process that import it at the same time can deadlock.
        from pandas.util import hash_array  # noqa: F401

        return ThreadPoolExecutor(self._threads)

    def read(self, shards: Shards) -> list[CheckedShard]:
        size = _TOGETHER if self._quick else 1
        parts = [shards.files[start : start + size] for start in range(0, len(shards.files), size)]
        pool, store = self._pool, Store(self._url)  # made here, before threads use them
        return [*itertools.chain.from_iterable(pool.map(lambda part: self._read(store, part, shards), parts))]

    def close(self) -> None:
        if "_pool" in vars(self):
            self._pool.shutdown(cancel_futures=True)

    def _read(self, store: Store, part: Sequence[ShardFiles], shards: Shards) -> list[CheckedShard]:
        checked = check_shards(store, self._manifest, self._quick, part, shards.limit)
        for files, one in zip(part, checked, strict=True) if self._sources else ():
            source, before, recorded = one.footer.get("source"), SourceState.from_footer(one.footer), None
            one.source, one.changed = "unknown", ""
            if source is not None and before.head is not None:
                url, recorded = current_url(source, self._moved), shards.recorded.get(files.name)
                one.source, one.changed, now = compare_source(url, before, self._roots)
                known = recorded.state.stamp if recorded is not None and recorded.url == canonical(url) else None
                if one.source == "same" and now is not None and known not in (None, now.stamp):
                    one.source = "touched"
            if self._count and one.source in ("same", "touched") and not one.findings:
                compared = self._compare_count(store, files, one)
                one.findings += compared or ()
                one.counted = compared is not None
        return checked

    def _compare_count(self, store: Store, files: ShardFiles, checked: CheckedShard) -> list[Finding] | None:
        """A finding if a source file has another number of samples than its shard; None if that cannot be counted.

        The samples of a shard are its rows and those that are only in the quarantine of the samples layer.
        """
        url = current_url(checked.footer["source"], self._moved)
        if self._manifest.get("input", {}).get("view"):  # of another dataset, which may have another by now
            return None
        refused = store.quarantined(SAMPLES, files.name) if SAMPLES in files.quarantined else []
        format_ = format_of_name(url)
        table = format_ is not None and format_.is_table
        if table and any(row["key"] is None and row["reason"] != Reason.SHARD_SAMPLES for row in refused):
            return None  # a part of a table could not be read: the quarantine does not record how many rows it had
        keys = {row["key"] for row in refused if row["key"] is not None}
        others = np.unique(hash_keys(pa.array(sorted(keys), pa.string())))
        stored = checked.rows + len(np.setdiff1d(others, checked.keys.hashes))
        recorded = self._manifest.get("input", {})
        known = {name: value for name, value in recorded.items() if name in Input.model_fields}
        limits = {name: value for name, value in recorded.get("limits", {}).items() if name in Limits.model_fields}
        if table and recorded.get("captions_per_sample") is None:  # its rows are counted
            stored += sum(row["reason"] == Reason.DUPLICATE_KEY and row["key"] is not None for row in refused)
        try:
            spec = Input.model_validate(known | {"limits": Limits.model_validate(limits)})
            there = (format_ or find_format(DEFAULT)).count(url, spec)
        except Exception:  # each driver has its own exceptions
            return None
        if there is None:
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
