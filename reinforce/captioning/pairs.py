"""Images and their captions, found once: where each image lies, what it is called, and whether it is held out.

Sets to fine-tune on are small (COCO-38k, DOCCI), so the whole list is made before anything is learnt, kept as
``pairs.parquet`` beside the checkpoints, and held in memory by every rank: batches can then be cut from any place.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

import schemas
from reinforce.captioning.config import CaptionerConfig
from reinforce.captioning.scan import files_of, scan
from reinforce.errors import UserError
from reinforce.seeds import seed_for
from reinforce.source.text import CAPTION_POLICY
from reinforce.source.urls import canonical, filesystem
from reinforce.storage import Storage

FILE = "pairs.parquet"
_FINGERPRINT = b"fingerprint"


class Place(NamedTuple):
    """Where an encoded image lies: in a tar, or among all images of a samples file."""

    url: str
    offset: int
    length: int


@dataclass(frozen=True)
class Pairs:
    """Some images with their captions, in a fixed order.

    ``table`` has the columns of ``schemas.PAIRS``, ``urls`` says how to read what is named there: with the user,
    query and cache that a file must not tell.
    """

    table: pa.Table
    urls: Mapping[str, str]

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def key(self, index: int) -> str:
        return str(self.table["key"][index].as_py())

    def place(self, index: int) -> Place:
        url, offset, length = (self.table[name][index].as_py() for name in Place._fields)
        return Place(self.urls.get(url, url), offset, length)

    def captions(self, index: int) -> list[str]:
        return list(self.table["captions"][index].as_py())

    def counts(self) -> np.ndarray:
        """Captions of each image, int64."""
        return np.asarray(pc.list_value_length(self.table["captions"]), np.int64)

    def learnt(self) -> Pairs:
        return Pairs(self.table.filter(pc.invert(self.table["held_out"])).combine_chunks(), self.urls)

    def held_out(self) -> Pairs:
        return Pairs(self.table.filter(self.table["held_out"]).combine_chunks(), self.urls)

    def shuffled(self, seed: int) -> Pairs:
        """In a seeded order of keys, so that the first ones are a fair sample."""
        order = np.argsort([seed_for(seed, key, "sample") for key in self.table["key"].to_pylist()], kind="stable")
        return Pairs(self.table.take(order).combine_chunks(), self.urls)

    def first(self, limit: int | None) -> Pairs:
        return Pairs(self.table.slice(0, limit).combine_chunks(), self.urls)


def find_pairs(config: CaptionerConfig) -> Pairs:
    """The pairs of a config, from ``pairs.parquet`` in its output if that was made from the same data, else anew.

    Raises UserError for shards that cannot be read to their end, and where nothing is there to learn or to judge by.
    """
    store = Storage(config.output)
    sources = {"data": config.data.source}
    if config.held_out.source is not None:
        sources["held_out"] = config.held_out.source
    files = {where: files_of(source, where) for where, source in sources.items()}
    fingerprint = _fingerprint(config, files)
    table = _stored(store, fingerprint)
    if table is None:
        table = _divided(config, [scan(source, config.data, where) for where, source in sources.items()])
        _write(store, table, fingerprint)
    pairs = Pairs(table, {canonical(url): url for urls in files.values() for url in urls})
    _check(config, pairs)
    return pairs


def _fingerprint(config: CaptionerConfig, files: Mapping[str, Sequence[str]]) -> str:
    """Of all that decides the pairs, the state of the files among it."""
    states = []
    for url in (url for urls in files.values() for url in urls):
        fs, path = filesystem(url)
        try:
            states.append((canonical(url), fs.ukey(path)))
        except FileNotFoundError as error:
            raise UserError(f"{canonical(url)} is not there. Check the URL of the shards.") from error
        except Exception as error:  # each driver has its own exceptions
            raise UserError(f"{canonical(url)} cannot be reached: {type(error).__name__}: {error}.") from error
    parts = {
        "files": {where: len(urls) for where, urls in files.items()},
        "states": states,
        "captions": config.data.captions,
        "limits": config.data.limits.model_dump(),
        "policy": CAPTION_POLICY,
        "held_out": [config.held_out.share, config.seed],
    }
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _stored(store: Storage, fingerprint: str) -> pa.Table | None:
    path = store.path(FILE)
    if not store.fs.exists(path):
        return None
    with store.fs.open(path, "rb") as file:
        table = pq.read_table(file)
    if (table.schema.metadata or {}).get(_FINGERPRINT) != fingerprint.encode():
        return None
    return table


def _write(store: Storage, table: pa.Table, fingerprint: str) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({_FINGERPRINT: fingerprint}), sink, compression="zstd")
    store.write_bytes(sink.getvalue().to_pybytes(), FILE)


def _divided(config: CaptionerConfig, tables: Sequence[pa.Table]) -> pa.Table:
    """One table with ``held_out``: the second source, or a share of the first by a seeded hash of the key."""
    if config.held_out.share is None:
        masks = [np.full(table.num_rows, index == 1) for index, table in enumerate(tables)]
    else:
        below = int(config.held_out.share * 2**64)
        keys = tables[0]["key"].to_pylist()
        masks = [np.array([seed_for(config.seed, key, "held out") < below for key in keys], bool)]
    whole = [t.append_column(schemas.PAIRS.field("held_out"), pa.array(m)) for t, m in zip(tables, masks, strict=True)]
    return pa.concat_tables(whole)


def _check(config: CaptionerConfig, pairs: Pairs) -> None:
    learnt, held_out = len(pairs.learnt()), len(pairs.held_out())
    if held_out < 2:
        raise UserError(
            f"held_out: {held_out} of {len(pairs)} images are held out, and it takes two to tell one from the other. "
            "Raise held_out.share, or give held_out.source."
        )
    if learnt < config.train.batch:
        raise UserError(
            f"data: {learnt} images are left to learn from, fewer than train.batch ({config.train.batch}): a batch "
            "would hold an image twice. Lower train.batch or held_out.share."
        )
