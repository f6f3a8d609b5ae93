"""``reinforce publish card``: the README.md by which Hugging Face's ``datasets`` reads every layer of a dataset.

Its front matter has a configuration for each layer, with the files and the types of the columns: without them,
``datasets`` shows images as bytes and refuses the tensors of embeddings. The Parquet files stay as they are. What comes
from data or configs is escaped for Markdown in the text below it.
"""

from __future__ import annotations

import functools
import html
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa
import yaml

import schemas
from reinforce.dataset.aligned import row_group_table, rows_of_shards
from reinforce.dataset.kinds.registry import stored_layer
from reinforce.dataset.layers import LABELS, MODEL_SECTIONS, SAMPLES, Layer, mapping_at
from reinforce.dataset.manifest import read_manifest
from reinforce.dataset.store import Store
from reinforce.dataset.view import View, list_views, read_view
from reinforce.errors import UserError
from reinforce.labels.index import FOLDER, SHARDS, IdentityIndex, find_index
from reinforce.reports import render_markdown
from reinforce.storage import Storage
from reinforce.terminal import escape, plural

NAME = "README.md"
UNKNOWN = "unknown"
_MAX_BYTES = 2**22  # of a README.md that is replaced
#: By which a README.md is recognised as one that may be replaced.
MARK = "<!-- written by `reinforce publish card` -->"
#: The same in the card of a model.
MODEL_MARK = "<!-- written by `reinforce publish model` -->"
_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+\-.!|~:@$=])")
_MAX_CHARS = 200
_KINDS = {
    "uid": "the uid in the data set that the sample is from",
    "sha256": "SHA-256 of the downloaded file",
    "digest": "BLAKE2b-64 of the encoded image",
    "url": "where the image was downloaded from",
    "key": "the key of a row of which nothing else is stated",
}


@dataclass(frozen=True)
class LayerCard:
    """A layer as the card shows it: its configuration for ``datasets``, what a row holds, and numbers of its files."""

    layer: Layer
    config: str
    content: str
    schema: pa.Schema
    shards: int
    rows: int
    size: int


def write_card(url: str, output: str | None = None, licence: str = UNKNOWN, force: bool = False) -> str:
    """Write README.md into the dataset, or into another folder -> its path.

    Raises UserError if there is one that this function has not written, unless ``force`` is set.
    """
    store = Store(url)
    target = store if output is None else Storage(output)
    try:
        before = target.read_bytes(NAME, limit=_MAX_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        before = None
    if before is not None and MARK.encode() not in before and not force:
        raise UserError(f"{target.path(NAME)} was not written by this command. --force replaces it.")
    content = build_card(store, licence).encode()
    if content != before:
        target.write_bytes(content, NAME)
    return target.path(NAME)


def build_card(store: Store, licence: str) -> str:
    """The content of README.md."""
    manifest = read_manifest(store)
    licence = str(mapping_at(manifest, LABELS).get("licence", licence)) if licence == UNKNOWN else licence
    layers = read_layers(store, manifest)
    index = find_index(store)
    samples = next(layer for layer in layers if layer.layer.name == SAMPLES)
    every = map(functools.partial(read_view, store), list_views(store))
    views = [view for view in every if not view.changes(store, manifest)]
    configs = [*_configs(store, layers, views, index)]
    front = {
        "license": one_line(licence),
        "pretty_name": one_line(store.url.rpartition("/")[2]) or "reinforced dataset",
        "tags": ["reinforced-dataset", "clip", "distillation"],
        "size_categories": [_size_category(samples.rows)],
        "configs": [
            {
                "config_name": config.name,
                "data_files": [{"split": "train", "path": config.path}],
                **({"default": True} if config.name == SAMPLES else {}),
            }
            for config in configs
        ],
        "dataset_info": [
            {
                "config_name": config.name,
                "features": [_feature(field) for field in config.schema],
                "splits": [{"name": "train", "num_bytes": config.size, "num_examples": config.rows}],
                "download_size": config.size,
                "dataset_size": config.size,
            }
            for config in configs
        ],
    }
    header = yaml.safe_dump(front, sort_keys=False, width=2**16)
    page = render_markdown(
        "export/card.md",
        mark=MARK,
        name=store.url.rpartition("/")[2],
        manifest=manifest,
        policies=manifest.get("policies", {}),
        samples=samples,
        layers=layers,
        others=[one.layer for one in layers if one.layer.kind.section not in MODEL_SECTIONS and one.layer.model],
        vectors=next((layer for layer in layers if "embeddings" in layer.schema.names), None),
        views=[(config_name(f"views/{view.name}"), view) for view in views],
        identities=[
            (config_name(f"{FOLDER}/{kind}"), count, _KINDS[kind])
            for kind, count in (index.kinds if index else {}).items()
        ],
        licence=licence,
        text=markdown,
        model=model_identity,
        json=json.dumps,
        plural=plural,
    )
    return f"---\n{header}---\n\n{page}"


def read_layers(store: Store, manifest: Mapping[str, Any]) -> list[LayerCard]:
    """The layers that have files. Raises UserError if there are none."""
    entries = manifest["layers"]
    listings = store.listings(entries)
    samples = listings[SAMPLES]
    if not samples:
        raise UserError(f"{store.url} has no samples. Finish the run.")
    groups = row_group_table(store, entries[SAMPLES]["fingerprint"], dict(samples.items()))
    names = list(samples)
    rows = dict(zip(names, rows_of_shards(groups, len(names)), strict=True))
    cards = []
    for name, listing in listings.items():
        if listing:
            layer = stored_layer(name, entries[name])
            schema = layer.schema(manifest["images"], layer.dim or 1)
            total = sum(rows.get(shard, 0) for shard in listing)
            content, size = layer.kind.content(layer), listing.total_bytes
            shown = content.card or content.plan
            cards.append(LayerCard(layer, config_name(name), shown, schema, len(listing), total, size))
    return cards


class _Config(NamedTuple):
    """A configuration for ``datasets``: its files, and their columns, bytes and rows."""

    name: str
    path: str
    schema: pa.Schema
    size: int
    rows: int


def _configs(
    store: Store, layers: Sequence[LayerCard], views: Sequence[View], index: IdentityIndex | None
) -> Iterator[_Config]:
    for layer in layers:
        yield _Config(layer.config, f"{layer.layer.name}/*.parquet", layer.schema, layer.size, layer.rows)
    for view in views:
        folder, rows, name = view.rows.folder, sum(view.counts.values()), config_name(f"views/{view.name}")
        yield _Config(name, f"{folder}/*.parquet", schemas.VIEW_SCHEMA, store.shards(folder).total_bytes, rows)
    if index is not None:
        for kind, rows in index.kinds.items():
            folder, name = f"{index.folder}/{kind}", config_name(f"{FOLDER}/{kind}")
            size = store.shards(folder).total_bytes
            yield _Config(name, f"{folder}/*.parquet", schemas.IDENTITIES_SCHEMA, size, rows)
        path, size = f"{index.folder}/{SHARDS}.parquet", store.shards(index.folder)[SHARDS]
        yield _Config(config_name(f"{FOLDER}/{SHARDS}"), path, schemas.INDEX_SCHEMA, size, len(index.shards))


def _feature(field: pa.Field) -> dict[str, Any]:
    """A column in the notation of ``datasets``. Tensors are flat lists of a fixed length, as Parquet stores them."""
    if field.name == "image":
        return {"name": "image", "dtype": "image"}
    return {"name": field.name, **_type(field.type)}


def _type(type_: pa.DataType) -> dict[str, Any]:
    if isinstance(type_, pa.FixedShapeTensorType):
        return {**_type(pa.list_(type_.value_type)), "length": type_.storage_type.list_size}
    if pa.types.is_list(type_):
        inner = _type(type_.value_type)
        return {"list": inner.get("struct") or inner["dtype"]}
    if pa.types.is_struct(type_):
        return {"struct": [_feature(type_.field(i)) for i in range(type_.num_fields)]}
    return {"dtype": {"halffloat": "float16", "float": "float32"}.get(str(type_), str(type_))}


def _size_category(rows: int) -> str:
    """Hugging Face's name of a number of rows: 1,364 -> 1K<n<10K."""
    names = ["1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T"]
    lower = len(str(rows)) - 4
    if lower < 0:
        return "n<1K"
    return f"{names[lower]}<n<{names[lower + 1]}" if lower + 1 < len(names) else f"n>{names[-1]}"


def markdown(value: object) -> str:
    """A value as text of one line that Markdown shows as it is."""
    text = one_line(value)
    shown = _SPECIAL.sub(r"\\\1", text[:_MAX_CHARS]) + ("..." if len(text) > _MAX_CHARS else "")
    return html.escape(shown)


def one_line(value: object) -> str:
    """A value as text without line ends and control characters."""
    return " ".join(escape(str(value)).split())


def config_name(folder: str) -> str:
    """Name of the configuration of a folder of the dataset, which cannot contain a slash."""
    return folder.replace("/", "--")


def model_identity(entry: Mapping[str, Any]) -> str:
    """The model of a teacher or captioner, as its identity names it."""
    identity = entry.get("model")
    if not isinstance(identity, Mapping):
        return str(identity)
    named = [identity.get(key) for key in ("class", "model", "pretrained", "texts")]
    return ", ".join(str(value) for value in named if value) or "unknown"
