"""The image-caption pairs of a fine-tuning: key, captions and location of each image, and whether it is held out.

Datasets for fine-tuning are small (COCO-38k, DOCCI). So the list of pairs is made before training, stored as
``pairs.parquet`` next to the checkpoints, and held in memory by every rank, which gives random access.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from reinforce.evaluation.reading import storage_errors
from reinforce.seeds import seed_for
from reinforce.source.captions import CAPTION_POLICY
from reinforce.source.formats.base import Shard
from reinforce.source.urls import canonical, filesystem
from reinforce.storage import Storage

PAIRS_FILE = "pairs.parquet"
_FINGERPRINT = b"fingerprint"
_READERS = 16  # requests at a time


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

    def all_captions(self) -> list[str]:
        return [caption for texts in self.table["captions"].to_pylist() for caption in texts]

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
    sources = {} if config.data.order == "streams" else {"data": (config.data.source, config.data.view)}
    if config.held_out.source is not None:
        sources["held_out"] = (config.held_out.source, config.held_out.view)
    files = {where: list_files(source, config.data, where, view) for where, (source, view) in sources.items()}
    fingerprint = fingerprint_of(config, files)
    table = read_table(store, PAIRS_FILE, fingerprint)
    if table is None:
        tables = {where: scan(source, config.data, where, view) for where, (source, view) in sources.items()}
        table = _split_held_out(config, tables)
        write_table(store, PAIRS_FILE, table, fingerprint)
    listed = {canonical(shard.url): shard for shards in files.values() for shard in shards}
    inputs = {url: copied_input(shard, config.data) for url, shard in listed.items()}
    urls = {url: shard.url for url, shard in listed.items()}
    pairs = Pairs(table, urls, {url: spec for url, spec in inputs.items() if spec is not None})
    check_held_out(pairs)
    if "data" in sources:
        training = len(pairs.training())
        check_batch(config, f"{training} images", training)
    return pairs


def fingerprint_of(config: CaptionerConfig, files: Mapping[str, Sequence[Shard]], *more: str) -> str:
    """Hash of everything that determines the pairs, including the state of the files."""
    shards = [shard for shards in files.values() for shard in shards]
    with ThreadPoolExecutor(_READERS) as pool:
        states = [*pool.map(_state, shards)]
    inputs = [copied_input(shard, config.data) for shard in shards if not isinstance(shard.listing, bytes)]
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
    if more:
        parts["more"] = more
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _state(shard: Shard) -> tuple[str, str]:
    """The URL of a shard, and what changes with its content."""
    url = shard.url
    if isinstance(shard.listing, bytes):
        return canonical(url), hashlib.sha256(shard.listing).hexdigest()
    fs, path = filesystem(url)
    with storage_errors(f"{canonical(url)} cannot be reached", "Check the URL and credentials."):
        try:
            return canonical(url), fs.ukey(path)
        except FileNotFoundError as error:
            raise UserError(f"{canonical(url)} does not exist. Check the URL of the shards.") from error


def read_table(store: Storage, name: str, fingerprint: str) -> pa.Table | None:
    """A table that was written with this fingerprint to the output, or None."""
    path = store.path(name)
    if not store.fs.exists(path):
        return None
    with store.fs.open(path, "rb") as file:
        table = pq.read_table(file, page_checksum_verification=True)
    if (table.schema.metadata or {}).get(_FINGERPRINT) != fingerprint.encode():
        return None
    return table


def write_table(store: Storage, name: str, table: pa.Table, fingerprint: str) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(
        table.replace_schema_metadata({_FINGERPRINT: fingerprint}), sink, compression="zstd", write_page_checksum=True
    )
    store.write_bytes(sink.getvalue().to_pybytes(), name)


def is_held_out(key: str, seed: int, share: float) -> bool:
    """Whether an image is of the share that is held out, by a seeded hash of its key."""
    return seed_for(seed, key, "held out") < int(share * 2**64)


def _split_held_out(config: CaptionerConfig, tables: Mapping[str, pa.Table]) -> pa.Table:
    """Join the tables and add ``held_out``: true for the second source, or for a share of the keys by a seeded hash."""
    share = config.held_out.share
    if share is None:
        masks = [np.full(table.num_rows, where == "held_out") for where, table in tables.items()]
    else:
        masks = [np.array([is_held_out(key, config.seed, share) for key in tables["data"]["key"].to_pylist()], bool)]
    column = schemas.PAIRS.field("held_out")
    return pa.concat_tables(
        [table.append_column(column, pa.array(mask)) for table, mask in zip(tables.values(), masks, strict=True)]
    )


def check_held_out(pairs: Pairs) -> None:
    """Raise UserError for too few held-out images."""
    held_out = len(pairs.held_out())
    if held_out < 2:
        raise UserError(
            f"held_out: {held_out} of {len(pairs)} images are held out, but evaluation needs at least two. Raise "
            "held_out.share, or give held_out.source."
        )


def check_batch(config: CaptionerConfig, training: str, count: int) -> None:
    """Raise UserError for less than a batch; ``training`` says how many of what are left."""
    if count < config.train.batch:
        raise UserError(
            f"data: {training} are left for training, fewer than train.batch ({config.train.batch}), so a "
            "batch would contain an image twice. Lower train.batch or held_out.share."
        )
