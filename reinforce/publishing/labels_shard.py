"""One shard of published labels: the samples with identities in place of images and metadata, and other layers."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import pyarrow as pa

from reinforce.dataset.files.index import FileEntry
from reinforce.dataset.files.origin import origin_entries
from reinforce.dataset.files.store import Store
from reinforce.dataset.layers import NO_IMAGES, SAMPLES, Layer
from reinforce.dataset.reading.aligned import row_errors
from reinforce.errors import UserError
from reinforce.labels.identities import COLUMNS, DIGEST, columns_of_identities, identities
from reinforce.publishing.public import is_local_path, public_text, public_url
from reinforce.publishing.shards import ExportSource
from reinforce.source.references import image_digest, referenced_images
from reinforce.terminal import escape
from schemas import IMAGE_DIGEST, TRUE_CAPTIONS, Reason

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
    with source.open(shard, _columns(export, store, shard)) as opened, contextlib.ExitStack() as stack:
        writers = {
            layer.name: stack.enter_context(output.writer(layer, layer.schema(NO_IMAGES), shard, ""))
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
            _copy_reasons(export, store, output, layer.name, shard, keys)
            writer = writers[layer.name]
            writer.commit(origin_entries(opened.footer(SAMPLES)))
            written.files[layer.name] = FileEntry(writer.bytes, tuple(writer.groups))
    written.rows = len(keys)
    return written


def _columns(export: LabelsExport, store: Store, shard: str) -> list[str]:
    """The columns of the samples to read: images only where the digests are computed from them."""
    with store.open_layer(SAMPLES, shard, whole=False) as file:
        names = file.metadata.schema.to_arrow_schema().names
    columns = ["key", "caption", TRUE_CAPTIONS, "width", "height", "augmentations"]
    columns += columns_of_identities(names, images=DIGEST in export.identities)
    if DIGEST in export.identities and IMAGE_DIGEST not in names and export.source.roots.urls:
        columns.append("image_ref")
    return [name for name in columns if name in names]


def _labels(export: LabelsExport, store: Store, shard: str, table: pa.Table, written: ShardLabels) -> pa.Table:
    """A row group of samples with the identities that may be published. Raises UserError."""
    if path := next((key for key in table["key"].to_pylist() if is_local_path(key)), None):
        raise UserError(
            f"{store.url}, shard {shard}: the key {escape(path[:200])} is a path of this machine, which is not "
            "published. Make the dataset with keys from another column, by `input.key`."
        )
    stated = identities(table)
    if DIGEST in export.identities and DIGEST not in stated and "image_ref" in table.column_names:
        images = referenced_images(table["image_ref"].to_pylist(), export.source.roots)
        stated[DIGEST] = pa.array(map(image_digest, images), pa.uint64())
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


def _copy_reasons(export: LabelsExport, store: Store, output: Store, layer: str, shard: str, keys: set[str]) -> None:
    """Write why rows of a layer are null, without the details, which may name files."""
    if layer == SAMPLES or shard not in export.quarantined.get(layer, ()):
        return
    found: list[tuple[str | None, Reason, str]] = []
    for row in store.quarantined(layer, shard):
        if row["key"] in keys:
            found.append((row["key"], Reason(row["reason"]), ""))
    if found:
        output.quarantine(layer, shard, found)
