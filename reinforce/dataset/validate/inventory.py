"""What validation finds, and checks without opening layer files: dataset.json by itself, missing files, and orphans."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

import schemas
from reinforce.dataset.codecs import codebooks
from reinforce.dataset.drop import layers_with_folders
from reinforce.dataset.files.index import LayerIndex, read_index
from reinforce.dataset.files.listing import Listing
from reinforce.dataset.files.store import MANIFEST, QUARANTINE, DamagedFile, Store
from reinforce.dataset.kinds.registry import depends, stored_layer
from reinforce.dataset.layers import LABELS, SAMPLES, mapping_at
from reinforce.dataset.manifest.manifest import changed_by_hand, read_manifest
from reinforce.errors import StorageError, UserError
from reinforce.terminal import first_names

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
    return replace(found, findings=[*findings, *check_orphans(store, found.listings)])


def check_recipes(manifest: Mapping[str, Any]) -> Iterator[Finding]:
    """Layers whose settings in dataset.json do not have the fingerprint that is beside them, or else another digest.

    The digest covers logit scales and all else that no fingerprint covers.
    """
    found = [*_wrong_fingerprints(manifest)]
    yield from found
    problem = None if found else changed_by_hand(manifest)
    if problem is not None:
        yield Finding("manifest", problem)


def _wrong_fingerprints(manifest: Mapping[str, Any]) -> Iterator[Finding]:
    if manifest.get("schema_version") != schemas.SCHEMA_VERSION:
        return
    hidden = {*mapping_at(manifest, LABELS).get("hidden", ())}  # fingerprints cover settings that are not published
    for name, entry in manifest["layers"].items():
        layer = stored_layer(name, entry)
        if not hidden.isdisjoint((".".join(map(str, layer.owner)), f"layers.{name}")):
            continue
        computed = layer.kind.recorded_fingerprint(layer, manifest)
        if computed is not None and computed != entry["fingerprint"]:
            yield Finding(
                "manifest",
                f"{MANIFEST}: the settings of {name} have fingerprint {computed}, its entry states "
                f"{entry['fingerprint'][:40]}: one of them was changed. Restore {MANIFEST}.",
                name,
            )


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
    message = f"{store.quarantine_path(layer, shard)} is damaged: {reason}. --repair sets it aside."
    return Finding("quarantine", message, layer, shard)


def check_orphans(store: Store, listings: Mapping[str, Listing]) -> Iterator[Finding]:
    """Files of shards without samples, and of layers that dataset.json does not list."""
    for layer, listing in listings.items():
        for shard in listing.only(~listing.within(listings[SAMPLES].names)):
            yield Finding("orphan", f"{layer}/{shard}.parquet has no samples", layer, shard)
    others = sorted(layers_with_folders(store) - listings.keys())
    for layer, listing in store.listings(others).items():
        if listing:
            yield Finding("orphan", f"{layer} has {len(listing):,} files, but {MANIFEST} does not list it", layer)
