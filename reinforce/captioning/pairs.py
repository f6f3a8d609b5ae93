"""The image-caption pairs of a fine-tuning: key, captions and location of each image, and whether it is held out.

Datasets for fine-tuning are small (COCO-38k, DOCCI). So the list of pairs is made before training, stored as
``pairs.parquet`` next to the checkpoints, and held in memory by every rank, which gives random access.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

import schemas
from reinforce.captioning.config import CaptionerConfig
from reinforce.captioning.scan import copied_input, list_files, scan
from reinforce.dataset.files.store import Store
from reinforce.dataset.view import read_view
from reinforce.errors import UserError
from reinforce.seeds import seed_for
from reinforce.source.captions import CAPTION_POLICY
from reinforce.source.formats.base import Shard
from reinforce.source.urls import canonical, filesystem
from reinforce.storage import Storage

PAIRS_FILE = "pairs.parquet"
_FINGERPRINT = b"fingerprint"


class ImageLocation(NamedTuple):
    """Location of an encoded image: bytes of a file, or of the concatenated images of a samples file or a table.

    ``referenced`` is true where a dataset names the URL, not the config, and ``input`` says how a table is read.
    """

    url: str
    offset: int
    length: int
    referenced: bool = False
    input: str | None = None


@dataclass(frozen=True)
class Pairs:
    """Images with their captions, in a fixed order.

    ``table`` has the columns of ``schemas.PAIRS``. ``urls`` maps its URLs to those to read from, which may contain
    credentials and cache options that must not be stored, and ``inputs`` those of tables to how they are read.
    """

    table: pa.Table
    urls: Mapping[str, str]
    inputs: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def key(self, index: int) -> str:
        return str(self.table["key"][index].as_py())

    def location(self, index: int) -> ImageLocation:
        url, offset, length = (self.table[name][index].as_py() for name in ("url", "offset", "length"))
        return ImageLocation(self.urls.get(url, url), offset, length, url not in self.urls, self.inputs.get(url))

    def captions(self, index: int) -> list[str]:
        return list(self.table["captions"][index].as_py())

    def caption_counts(self) -> np.ndarray:
        """Number of captions of each image, int64."""
        return np.asarray(pc.list_value_length(self.table["captions"]), np.int64)

    def describe(self) -> str:
        """Return their number and a hash of their keys, captions and sizes in bytes."""
        digest = hashlib.sha256(json.dumps(self.table.select(["key", "captions", "length"]).to_pydict()).encode())
        return f"{len(self):,} images with {self.caption_counts().sum():,} captions, SHA-256 {digest.hexdigest()[:16]}"

    def training(self) -> Pairs:
        return Pairs(self.table.filter(pc.invert(self.table["held_out"])).combine_chunks(), self.urls, self.inputs)

    def held_out(self) -> Pairs:
        return Pairs(self.table.filter(self.table["held_out"]).combine_chunks(), self.urls, self.inputs)

    def shuffled(self, seed: int) -> Pairs:
        """Return the pairs in a seeded order of keys, so that the first ones are a random sample."""
        order = np.argsort([seed_for(seed, key, "sample") for key in self.table["key"].to_pylist()], kind="stable")
        return Pairs(self.table.take(order).combine_chunks(), self.urls, self.inputs)

    def first(self, limit: int | None) -> Pairs:
        return Pairs(self.table.slice(0, limit).combine_chunks(), self.urls, self.inputs)


def load_pairs(config: CaptionerConfig) -> Pairs:
    """Load the pairs of a config from ``pairs.parquet`` in its output, or scan the data if that file is out of date.

    Raises UserError for shards that cannot be read completely, and for too few training or held-out images.
    """
    store = Storage(config.output)
    sources = {"data": (config.data.source, config.data.view)}
    if config.held_out.source is not None:
        sources["held_out"] = (config.held_out.source, config.held_out.view)
    files = {where: list_files(source, config.data, where, view) for where, (source, view) in sources.items()}
    fingerprint = _fingerprint(config, files)
    table = _read_stored(store, fingerprint)
    if table is None:
        tables = [scan(source, config.data, where, view) for where, (source, view) in sources.items()]
        table = _split_held_out(config, tables)
        _write(store, table, fingerprint)
    listed = {canonical(shard.url): shard for shards in files.values() for shard in shards}
    inputs = {url: copied_input(shard, config.data) for url, shard in listed.items()}
    urls = {url: shard.url for url, shard in listed.items()}
    pairs = Pairs(table, urls, {url: spec for url, spec in inputs.items() if spec is not None})
    _check_sizes(config, pairs)
    return pairs


def _fingerprint(config: CaptionerConfig, files: Mapping[str, Sequence[Shard]]) -> str:
    """Hash of everything that determines the pairs, including the state of the files."""
    states: list[tuple[str, str]] = []
    inputs = []
    for shard in (shard for shards in files.values() for shard in shards):
        url = shard.url
        if isinstance(shard.listing, bytes):
            states.append((canonical(url), hashlib.sha256(shard.listing).hexdigest()))
            continue
        inputs.append(copied_input(shard, config.data))
        fs, path = filesystem(url)
        try:
            states.append((canonical(url), fs.ukey(path)))
        except FileNotFoundError as error:
            raise UserError(f"{canonical(url)} does not exist. Check the URL of the shards.") from error
        except Exception as error:  # each storage driver raises its own exceptions
            raise UserError(
                f"{canonical(url)} cannot be reached: {type(error).__name__}: {error}. Check the URL and credentials."
            ) from error
    parts: dict[str, Any] = {
        "files": {where: len(shards) for where, shards in files.items()},
        "states": states,
        "captions": config.data.captions,
        "limits": config.data.limits.model_dump(),
        "policy": CAPTION_POLICY,
        "held_out": [config.held_out.share, config.seed],
    }
    if any(inputs):
        parts["inputs"] = inputs
    views = [(config.data.source, config.data.view), (config.held_out.source, config.held_out.view)]
    if named := [(str(source), view) for source, view in views if view is not None]:
        parts["views"] = [read_view(Store(source), view).fingerprint for source, view in named]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _read_stored(store: Storage, fingerprint: str) -> pa.Table | None:
    path = store.path(PAIRS_FILE)
    if not store.fs.exists(path):
        return None
    with store.fs.open(path, "rb") as file:
        table = pq.read_table(file, page_checksum_verification=True)
    if (table.schema.metadata or {}).get(_FINGERPRINT) != fingerprint.encode():
        return None
    return table


def _write(store: Storage, table: pa.Table, fingerprint: str) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(
        table.replace_schema_metadata({_FINGERPRINT: fingerprint}), sink, compression="zstd", write_page_checksum=True
    )
    store.write_bytes(sink.getvalue().to_pybytes(), PAIRS_FILE)


def _split_held_out(config: CaptionerConfig, tables: Sequence[pa.Table]) -> pa.Table:
    """Join the tables and add ``held_out``: true for the second source, or for a share of the keys by a seeded hash."""
    if config.held_out.share is None:
        masks = [np.full(table.num_rows, index == 1) for index, table in enumerate(tables)]
    else:
        threshold = int(config.held_out.share * 2**64)
        keys = tables[0]["key"].to_pylist()
        masks = [np.array([seed_for(config.seed, key, "held out") < threshold for key in keys], bool)]
    parts = [t.append_column(schemas.PAIRS.field("held_out"), pa.array(m)) for t, m in zip(tables, masks, strict=True)]
    return pa.concat_tables(parts)


def _check_sizes(config: CaptionerConfig, pairs: Pairs) -> None:
    training, held_out = len(pairs.training()), len(pairs.held_out())
    if held_out < 2:
        raise UserError(
            f"held_out: {held_out} of {len(pairs)} images are held out, but evaluation needs at least two. Raise "
            "held_out.share, or give held_out.source."
        )
    if training < config.train.batch:
        raise UserError(
            f"data: {training} images are left for training, fewer than train.batch ({config.train.batch}), so a "
            "batch would contain an image twice. Lower train.batch or held_out.share."
        )
