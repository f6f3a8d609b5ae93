"""``reinforce export labels``: the layers of a dataset without its images, as a dataset that others join by identity.

The labels have the layout of every dataset, so that all commands read them. The samples have identities in place of
images and metadata. Files that exist are kept, so that the same command continues an export, and adds shards and layers
that are new. The index of identities and the card come last.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import pyarrow as pa

from reinforce.dataset.codecs import codebooks
from reinforce.dataset.index import FileEntry, IndexWriter
from reinforce.dataset.kinds.registry import stored_layer
from reinforce.dataset.layer_file import row_errors
from reinforce.dataset.layers import LABELS, NO_IMAGES, SAMPLES, TRUE_CAPTION, Layer, mapping_at
from reinforce.dataset.manifest import DIGEST_KEY, find_manifest, same_content, write_manifest
from reinforce.dataset.reading import Dataset
from reinforce.dataset.store import LayerWriter, Store, origin_entries
from reinforce.errors import UserError
from reinforce.labels.building import build_index
from reinforce.labels.index import COLUMNS, DIGEST, columns_of_identities, identities
from reinforce.processes.parallel import open_workers
from reinforce.publishing.card import write_card
from reinforce.publishing.shards import (
    HIDDEN_PATH,
    ExportSource,
    check_output,
    is_local_path,
    public_text,
    public_url,
    without_paths,
)
from reinforce.storage import as_seen_by_workers
from reinforce.terminal import escape, format_bytes, plural
from schemas import TRUE_CAPTIONS, Reason

_PUBLIC = {"uid": public_text, "sha256": public_text, "url": public_url}


@dataclass(frozen=True)
class LabelsExport:
    """The files to write to ``output`` for each shard: ``layers``, ``samples`` first, with kinds of ``identities``.

    ``missing`` are the layers to write of shards of which some are there; of others all are written. ``quarantined``
    are shards with a quarantine file, by layer.
    """

    source: ExportSource
    output: str
    layers: tuple[Layer, ...]
    identities: tuple[str, ...]
    missing: Mapping[str, tuple[str, ...]]
    quarantined: Mapping[str, frozenset[str]]


@dataclass
class ShardLabels:
    """Output for a shard: its files by layer, rows, and identities that were left out by kind."""

    files: dict[str, FileEntry] = field(default_factory=dict)
    rows: int = 0
    left_out: Counter[str] = field(default_factory=Counter)


def export_shard(export: LabelsExport, shard: str) -> ShardLabels:
    """Write the missing layers of a shard, the samples last. Raises UserError."""
    store, output, written = Store(export.source.url), Store(export.output), ShardLabels()
    wanted = export.missing.get(shard, tuple(layer.name for layer in export.layers))
    layers = [layer for layer in export.layers if layer.name in wanted]
    fingerprints = {SAMPLES: export.layers[0].fingerprint} | {layer.name: layer.fingerprint for layer in layers}
    source = replace(export.source, fingerprints=fingerprints)
    with store.open_layer(SAMPLES, shard, whole=False) as file:
        stored = file.metadata.schema.to_arrow_schema().names
    columns = ["key", "caption", TRUE_CAPTIONS, "width", "height", "augmentations"]
    columns += columns_of_identities(stored, images=DIGEST in export.identities)
    columns = [name for name in columns if name in stored]
    with source.open(shard, columns) as opened, contextlib.ExitStack() as stack:
        writers = {
            layer.name: stack.enter_context(LayerWriter(output, layer, layer.schema(NO_IMAGES), shard, ""))
            for layer in layers
        }
        keys: set[str] = set()
        for number in range(opened.row_groups):
            group = opened.read(number)
            if not group[SAMPLES].num_rows:  # the view keeps none of it
                continue
            keys.update(group[SAMPLES]["key"].to_pylist())
            for name, writer in writers.items():
                with row_errors(store.url):
                    table = _labels(export, store, shard, group[name], written) if name == SAMPLES else group[name]
                    table = table.select(writer.schema.names).cast(writer.schema)
                writer.write(table)
        for layer in reversed(layers):
            # Why rows of a layer are null, without the details, which may name files.
            named = layer.name != SAMPLES and shard in export.quarantined.get(layer.name, ())
            refused = (row for row in store.quarantined(layer.name, shard) if row["key"] in keys) if named else ()
            reasons = [(row["key"], Reason(row["reason"]), "") for row in refused]
            if reasons:
                output.quarantine(layer.name, shard, reasons)
            writer = writers[layer.name]
            writer.commit(origin_entries(opened.footer(SAMPLES)))
            written.files[layer.name] = FileEntry(writer.bytes, tuple(writer.groups))
    written.rows = len(keys)
    return written


def _labels(export: LabelsExport, store: Store, shard: str, table: pa.Table, written: ShardLabels) -> pa.Table:
    """A row group of samples with the identities that may be published. Raises UserError."""
    if path := next((key for key in table["key"].to_pylist() if is_local_path(key)), None):
        raise UserError(
            f"{store.url}, shard {shard}: the key {escape(path[:200])} is a path of this machine, which is not "
            "published. Make the dataset with keys from another column, by `input.key`."
        )
    stated = identities(table)
    for kind, column in COLUMNS.items():
        type_ = pa.uint64() if kind == DIGEST else pa.string()
        values = stated.get(kind) if kind in export.identities else None
        if values is None:
            values = pa.nulls(table.num_rows, type_)
        elif kind in _PUBLIC:
            allow = _PUBLIC[kind]
            public = pa.array([None if text is None else allow(text) for text in values.to_pylist()], type_)
            written.left_out[kind] += public.null_count - values.null_count
            values = public
        at = table.schema.get_field_index(column)
        field_ = pa.field(column, type_)
        table = table.append_column(field_, values) if at < 0 else table.set_column(at, field_, values)
    if "metadata" in table.column_names:
        table = table.drop_columns(["metadata"])
    return table.append_column("metadata", pa.nulls(table.num_rows, pa.string()))


_VERSION = 1


@dataclass
class ExportedLabels:
    """Result of an export: shards, those that were there before, rows, identities by kind, those of them that several
    samples state, and those left out."""

    output: str
    shards: int = 0
    kept: int = 0
    rows: int = 0
    bytes: int = 0
    identities: Mapping[str, int] = field(default_factory=dict)
    repeated: Mapping[str, int] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        kept = f", of which {self.kept:,} were there before" if self.kept else ""
        size = format_bytes(self.bytes)
        found = ", ".join(f"{kind} of {count:,}" for kind, count in self.identities.items()) or "none"
        lines = [
            f"labels of {plural(self.rows, 'sample')} in {plural(self.shards, 'shard')}, {size}{kept}: {self.output}",
            f"identities: {found}",
        ]
        if repeated := ", ".join(f"{kind} of {count:,}" for kind, count in self.repeated.items()):
            lines.append(f"repeated: {repeated}: {_REPEATED}")
        lines += [f"left out: {kind} of {count:,}: {_WHY[kind]}" for kind, count in self.left_out.items() if count]
        return [*lines, *self.notes]


_REPEATED = "other samples state the same; a copy takes labels only where another identity shows whose they are"
_WHY = {
    "url": "they have a password or signature, or are no public web address",
    "uid": "they are local paths, or longer than a uid",
    "sha256": "they are local paths, or longer than a digest",
}


def export_labels(
    url: str,
    output: str,
    *,
    layers: Sequence[str] | None = None,
    identities: Sequence[str] | None = None,
    urls: bool = True,
    licence: str = "unknown",
    view: str | None = None,
    use_ray: bool = True,
    address: str | None = None,
) -> ExportedLabels:
    """Write layers of the complete shards of a dataset, without images, to a folder or fsspec URI. Raises UserError.

    ``layers`` are names of layers or folders of these, with ``*``; default: all. What a layer is computed from is
    published with it. ``identities`` are kinds of ``COLUMNS``, default: all, without ``urls`` all but URLs.
    With ``view``, only the samples that it keeps are published.
    """
    for name in identities or ():
        if name not in COLUMNS:
            raise UserError(f"--identities: there is no {name!r}; there are: {', '.join(COLUMNS)}.")
    stated = [*COLUMNS] if identities is None else identities
    kinds = tuple(kind for kind in COLUMNS if kind in stated and (urls or kind != "url"))
    whole = Dataset(url, view=view)
    wanted = _chosen(whole, layers)
    data = whole
    if layers is not None:  # so that only these layers decide which shards are complete
        owners = {stored_layer(name, whole.manifest["layers"][name]).owner for name in wanted}
        models = {section: [name for name in of if (section, name) in owners] for section, of in whole.models.items()}
        data = Dataset(url, models, view=view)
    names = [name for name in data.layers if name in wanted]
    store, out = Store(as_seen_by_workers(url)), Store(as_seen_by_workers(output))
    check_output(store, out)
    result = ExportedLabels(out.url, len(data.shards))
    manifest = labels_manifest(data, names, kinds, licence)
    chosen = tuple(stored_layer(name, manifest["layers"][name]) for name in names)
    with out.lock():
        for layer in chosen:
            if (place := layer.codebook_at(url)) is not None:
                codebooks.copy(store, out, layer.name, place.digest)
        _record(out, manifest)
        listings = out.listings(names)
        every = pa.array(data.shards, pa.string())
        lacking = np.array([~listing.has(every) for listing in listings.values()])
        missing = {  # the layers that shards lack, of those that lack some
            data.shards[int(at)]: tuple(name for name, lacks in zip(listings, lacking[:, at], strict=True) if lacks)
            for at in np.flatnonzero(lacking.any(axis=0))
        }
        result.kept = result.shards - len(missing)
        quarantine = store.listings(f"quarantine/{name}" for name in names)
        export = LabelsExport(
            source=ExportSource.of(data, url, names),
            output=as_seen_by_workers(output),
            layers=chosen,
            identities=kinds,
            missing={shard: some for shard, some in missing.items() if len(some) < len(names)},
            quarantined={name: frozenset(quarantine[f"quarantine/{name}"]) for name in names},
        )
        index = IndexWriter(out, {layer.name: layer for layer in chosen})
        with open_workers(address, use_ray) as workers:
            workers.callback(index.flush)
            for shard, written in workers.map(functools.partial(export_shard, export), [*missing], unit="shard"):
                index.add(shard, written.files)
                index.flush_when_due()
                result.left_out += written.left_out
            index.flush()
            found = build_index(as_seen_by_workers(output), use_ray=use_ray, address=address)
        write_card(out.url, licence=licence)
    result.identities = {kind: count for kind, count in found.kinds.items() if kind in COLUMNS}
    result.repeated = {kind: count for kind, count in found.repeated.items() if kind in COLUMNS}
    result.rows = sum(map(sum, found.groups))
    result.bytes = sum(listing.total_bytes for listing in out.listings(names).values())
    result.notes += _notes(result, manifest)
    return result


def _notes(result: ExportedLabels, manifest: Mapping[str, Any]) -> list[str]:
    notes = []
    if not result.identities:
        notes.append("no sample states what its image is: others can join these labels by key alone, without proof")
    several = mapping_at(manifest, "layers", SAMPLES).get("count", 1)
    if several > 1 and any(layer.get("texts") == TRUE_CAPTION for layer in manifest["layers"].values()):
        notes.append(
            f"vectors of up to {several} true captions a sample: whoever uses them sets "
            f"input.captions_per_sample: {several}, and gets those of captions that are equal"
        )
    if hidden := manifest[LABELS].get("hidden"):
        notes.append(f"local paths are hidden in the settings of {', '.join(hidden)}")
    return notes


def _chosen(data: Dataset, patterns: Sequence[str] | None) -> set[str]:
    """The layers that patterns name, and those that they are computed from. Raises UserError."""
    entries = data.manifest["layers"]
    found = {SAMPLES, *(data.layers if patterns is None else ())}
    for pattern in patterns or ():
        named = {name for name in entries if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}/*")}
        if not named:
            raise UserError(f"--layers: {data.store.url} has no {pattern!r}; it has: {', '.join(entries)}.")
        found |= named
    pending = [*found]
    while pending:
        name = pending.pop()
        needs = {*stored_layer(name, entries[name]).needs} - found
        found |= needs
        pending += needs
    return found


def labels_manifest(data: Dataset, names: Sequence[str], kinds: Sequence[str], licence: str) -> dict[str, Any]:
    """dataset.json of labels: that of the dataset, without local paths, and under ``labels`` what they are of.

    ``labels.images`` is how the dataset stored images, which the fingerprint of its samples covers, and
    ``labels.hidden`` names settings that fingerprints cover and that are not published as they are.
    """
    manifest = {key: value for key, value in data.manifest.items() if key not in ("moved", DIGEST_KEY)}
    before = mapping_at(manifest, LABELS)
    layers = {name: manifest["layers"][name] for name in names}
    layers[SAMPLES] = {**layers[SAMPLES], "names": [*kinds]}
    models = {
        section: {
            name: entry
            for name, entry in manifest[section].items()
            if any(layer.get(section[:-1]) == name for layer in layers.values())
        }
        for section in ("teachers", "captioners")
    }
    cleaned = without_paths({**manifest, "images": NO_IMAGES, **models, "layers": layers})
    hidden = [
        f"{section}.{name}"
        for section in ("teachers", "captioners", "layers")
        for name, entry in cleaned[section].items()
        if f'"{HIDDEN_PATH}"' in json.dumps(entry)
    ]
    cleaned[LABELS] = {
        "version": _VERSION,
        "images": before.get("images", manifest["images"]),
        "identities": [*kinds],
        "licence": licence,
        **({} if data.view is None else {"view": asdict(data.view.rows)}),
        **({"hidden": hidden} if hidden else {}),
    }
    return dict(cleaned)


def _record(out: Store, manifest: Mapping[str, Any]) -> None:
    """Write dataset.json, which may gain layers. Raises UserError if the folder has other labels."""
    before = find_manifest(out)
    if before is not None:
        if LABELS not in before:
            raise UserError(f"{out.url} has a dataset. Give another folder.")
        own, other, layers = manifest[LABELS], mapping_at(before, LABELS), mapping_at(before, "layers")
        keys = [key for key in {**own, **other} if key not in ("hidden", "licence")]
        different = [key for key in keys if own.get(key) != other.get(key)]
        different += [
            name
            for name in layers
            if mapping_at(manifest, "layers", name).get("fingerprint") != layers[name].get("fingerprint")
        ]
        if different:
            raise UserError(
                f"{out.url} has labels with other {', '.join(different)}. Repeat the options of that export, or give "
                "another folder."
            )
    if not same_content(manifest, before):
        write_manifest(out, manifest)
