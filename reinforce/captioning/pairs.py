"""Images and their captions, found once: where each image lies, what it is called, and whether it is held out.

Sets to fine-tune on are small (COCO-38k, DOCCI), so the whole list is made before anything is learnt, kept as
``pairs.parquet`` beside the checkpoints, and held in memory by every rank: batches can then be cut from any place.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

import schemas
from reinforce.captioning.config import CaptionerConfig, Data
from reinforce.dataset import Dataset
from reinforce.errors import UserError
from reinforce.evaluation.reading import captions_of, kind_of, samples
from reinforce.layers import SAMPLES
from reinforce.seeds import seed_for
from reinforce.source import Refusal
from reinforce.store import Store
from reinforce.text import CAPTION_POLICY
from reinforce.urls import canonical, compression, expand, filesystem
from schemas import Reason

FILE = "pairs.parquet"
_FINGERPRINT = b"fingerprint"
_READERS = 8
_MOST_NAMED = 10  # refusals that are logged one by one

_log = logging.getLogger(__name__)


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

    def held_out(self, limit: int | None = None) -> Pairs:
        """Those held out; the first ``limit`` of them."""
        return Pairs(self.table.filter(self.table["held_out"]).slice(0, limit).combine_chunks(), self.urls)


def find_pairs(config: CaptionerConfig) -> Pairs:
    """The pairs of a config, from ``pairs.parquet`` in its output if that was made from the same data, else anew.

    Raises UserError for shards that cannot be read to their end, and where nothing is there to learn or to judge by.
    """
    store = Store(config.output)
    sources = {"data": config.data.source}
    if config.held_out.source is not None:
        sources["held_out"] = config.held_out.source
    files = {where: _files(source, where) for where, source in sources.items()}
    fingerprint = _fingerprint(config, files)
    table = _stored(store, fingerprint)
    if table is None:
        scanned = [_scan(source, files[where], config.data, where) for where, source in sources.items()]
        table = _divided(config, scanned)
        _write(store, table, fingerprint)
    pairs = Pairs(table, {canonical(url): url for urls in files.values() for url in urls})
    _check(config, pairs)
    return pairs


def _files(source: str | list[str], where: str) -> list[str]:
    """The files that hold the images: tars, or the samples of a reinforced dataset."""
    if kind_of(source) == "dataset":
        return [_samples_file(str(source), shard) for shard in Dataset(str(source), [], []).shards]
    urls = expand(source)
    for url in urls:
        if compression(url):
            raise UserError(f"{where}: {canonical(url)}: images are read in any order, so tars must not be compressed.")
    return urls


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


def _stored(store: Store, fingerprint: str) -> pa.Table | None:
    path = store.path(FILE)
    if not store.fs.exists(path):
        return None
    with store.fs.open(path, "rb") as file:
        table = pq.read_table(file)
    if (table.schema.metadata or {}).get(_FINGERPRINT) != fingerprint.encode():
        return None
    return table


def _write(store: Store, table: pa.Table, fingerprint: str) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({_FINGERPRINT: fingerprint}), sink, compression="zstd")
    store.write_bytes(sink.getvalue().to_pybytes(), FILE)


def _scan(source: str | list[str], files: Sequence[str], data: Data, where: str) -> pa.Table:
    """All pairs of a source, without ``held_out``. What is refused is counted and logged."""
    if kind_of(source) == "dataset":
        found = [_of_dataset(str(source), shard, data) for shard in Dataset(str(source), [], []).shards]
    else:
        with ThreadPoolExecutor(_READERS) as pool:
            found = list(pool.map(lambda url: _of_shard(url, data, where), files))
    refused = [refusal for _, refusals in found for refusal in refusals]
    table = pa.Table.from_batches([batch for batch, _ in found], schema=_PLACED)
    _report(refused, table.num_rows, data, where)
    return table


_PLACED = pa.schema([field for field in schemas.PAIRS if field.name != "held_out"])


def _of_shard(url: str, data: Data, where: str) -> tuple[pa.RecordBatch, list[Refusal]]:
    rows: list[dict[str, Any]] = []
    refused: list[Refusal] = []
    for item in samples([url], data.limits, where):
        if isinstance(item, Refusal):
            refused.append(item)
            continue
        captions = captions_of(item.sidecars, data.captions, data.limits)
        if captions:
            rows.append(
                {
                    "key": item.key,
                    "url": canonical(url),
                    "offset": item.offset,
                    "length": item.length,
                    "captions": captions,
                }
            )
        else:
            refused.append(_without_caption(item.key, item.sidecars))
    return pa.RecordBatch.from_pylist(rows, schema=_PLACED), refused


def _of_dataset(dataset: str, shard: str, data: Data) -> tuple[pa.RecordBatch, list[Refusal]]:
    rows: list[dict[str, Any]] = []
    refused: list[Refusal] = []
    offset = 0
    for tables in Dataset(dataset, [], []).row_groups(shard):
        table = tables[SAMPLES]
        if "image" in table.column_names:
            lengths = pc.binary_length(table["image"]).to_pylist()
            starts = (offset + np.cumsum([0, *lengths])).tolist()
            offset = starts[-1]
            url = canonical(_samples_file(dataset, shard))
            places = [Place(url, start, length) for start, length in zip(starts, lengths, strict=False)]
        else:
            places = [Place(**reference) for reference in table["image_ref"].to_pylist()]
        texts = table.select(["key", "caption", "metadata"]).to_pylist()
        for place, text in zip(places, texts, strict=True):
            members = {"txt": text["caption"], "json": text["metadata"]}
            sidecars = {name: value.encode() for name, value in members.items() if value is not None}
            captions = captions_of(sidecars, data.captions, data.limits)
            if captions:
                rows.append({"key": text["key"], "captions": captions, **place._asdict()})
            else:
                refused.append(_without_caption(text["key"], sidecars))
    return pa.RecordBatch.from_pylist(rows, schema=_PLACED), refused


def _samples_file(dataset: str, shard: str) -> str:
    return f"{dataset.rstrip('/')}/{SAMPLES}/{shard}.parquet"


def _without_caption(key: str, sidecars: Mapping[str, bytes]) -> Refusal:
    return Refusal(key, Reason.NO_TEXT, f"beside the image: {', '.join(sidecars) or 'nothing'}")


def _report(refused: Sequence[Refusal], pairs: int, data: Data, where: str) -> None:
    if not pairs:
        why = f", for instance {refused[0].key}: {refused[0].reason.value}, {refused[0].detail}" if refused else ""
        raise UserError(
            f"{where}: none of {len(refused)} samples has an image and a caption at {', '.join(data.captions)}{why}. "
            "Name the member or field in data.captions."
        )
    for refusal in refused[:_MOST_NAMED]:
        _log.warning("%s: %s is left out: %s (%s)", where, refusal.key, refusal.reason.value, refusal.detail)
    if refused:
        counts = Counter(refusal.reason.value for refusal in refused)
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts.most_common())
        _log.warning("%s: %d samples are left out (%s), %d are there", where, len(refused), reasons, pairs)


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
