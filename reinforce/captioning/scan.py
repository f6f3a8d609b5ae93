"""From sources to tables of pairs: every sample of shards or of a reinforced dataset that has a caption."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

import schemas
from reinforce.captioning.config import Data
from reinforce.dataset.layers import SAMPLES
from reinforce.dataset.reader import Dataset
from reinforce.errors import UserError
from reinforce.evaluation.reading import captions_of, kind_of, samples
from reinforce.source.shards import Refusal
from reinforce.source.urls import canonical, compression, expand
from schemas import Reason

#: The columns of a pair that its source decides.
SCANNED = pa.schema([field for field in schemas.PAIRS if field.name != "held_out"])

_READERS = 8
_MOST_NAMED = 10  # refusals that are logged one by one

_log = logging.getLogger(__name__)

Found = tuple[pa.RecordBatch, list[Refusal]]


def files_of(source: str | list[str], where: str) -> list[str]:
    """The files that hold the images: tars, or the samples of a reinforced dataset. Raises UserError."""
    if kind_of(source) == "dataset":
        dataset = Dataset(str(source), [], [])
        return [_samples_file(dataset, shard) for shard in dataset.shards]
    urls = expand(source)
    for url in urls:
        if compression(url):
            raise UserError(
                f"{where}: {canonical(url)}: images are read in any order, which a compressed tar does not allow. "
                "Unpack it."
            )
    return urls


def scan(source: str | list[str], data: Data, where: str) -> pa.Table:
    """All pairs of a source in its order, with the columns SCANNED. What is refused is counted and logged.

    Raises UserError for a shard that cannot be read to its end, and where no sample has a caption.
    """
    if kind_of(source) == "dataset":
        dataset = Dataset(str(source), [], [])
        found = [_of_dataset(dataset, shard, data) for shard in dataset.shards]
    else:
        with ThreadPoolExecutor(_READERS) as pool:
            found = list(pool.map(lambda url: _of_shard(url, data, where), files_of(source, where)))
    refused = [refusal for _, refusals in found for refusal in refusals]
    table = pa.Table.from_batches([batch for batch, _ in found], schema=SCANNED)
    _report(refused, table.num_rows, data, where)
    return table


def _of_shard(url: str, data: Data, where: str) -> Found:
    rows = _Rows(data)
    for item in samples([url], data.limits, where):
        if isinstance(item, Refusal):
            rows.refused.append(item)
        else:
            rows.add(item.key, canonical(url), item.offset, item.length, item.sidecars)
    return rows.found()


def _of_dataset(dataset: Dataset, shard: str, data: Data) -> Found:
    rows = _Rows(data)
    offset = 0
    for tables in dataset.row_groups(shard):
        table = tables[SAMPLES]
        if "image" in table.column_names:
            lengths = pc.binary_length(table["image"]).to_pylist()
            starts = (offset + np.cumsum([0, *lengths])).tolist()
            offset = starts.pop()
            urls = [canonical(_samples_file(dataset, shard))] * len(starts)
        else:
            references = table["image_ref"].to_pylist()
            urls, starts, lengths = ([ref[name] for ref in references] for name in ("url", "offset", "length"))
        texts = table.select(["key", "caption", "metadata"]).to_pylist()
        for url, start, length, text in zip(urls, starts, lengths, texts, strict=True):
            members = {"txt": text["caption"], "json": text["metadata"]}
            sidecars = {name: value.encode() for name, value in members.items() if value}
            rows.add(text["key"], url, start, length, sidecars)
    return rows.found()


class _Rows:
    """The pairs of one shard, as they are found."""

    def __init__(self, data: Data) -> None:
        self.refused: list[Refusal] = []
        self._data = data
        self._rows: list[dict[str, Any]] = []

    def add(self, key: str, url: str, offset: int, length: int, sidecars: Mapping[str, bytes]) -> None:
        captions = captions_of(sidecars, self._data.captions, self._data.limits)
        if captions:
            self._rows.append({"key": key, "url": url, "offset": offset, "length": length, "captions": captions})
        else:
            members = ", ".join(sidecars) or "nothing"
            self.refused.append(Refusal(key, Reason.NO_TEXT, f"beside the image: {members}"))

    def found(self) -> Found:
        return pa.RecordBatch.from_pylist(self._rows, schema=SCANNED), self.refused


def _samples_file(dataset: Dataset, shard: str) -> str:
    return f"{dataset.store.url}/{SAMPLES}/{shard}.parquet"


def _report(refused: Sequence[Refusal], pairs: int, data: Data, where: str) -> None:
    if not pairs:
        why = f", for instance {refused[0].key}: {refused[0].reason.value}, {refused[0].detail}" if refused else ""
        raise UserError(
            f"{where}: none of {len(refused)} samples has an image and a caption at {', '.join(data.captions)}{why}. "
            "Name the member or field in data.captions."
        )
    for refusal in refused[:_MOST_NAMED]:
        _log.warning("%s: refused %s: %s (%s)", where, refusal.key, refusal.reason.value, refusal.detail)
    if refused:
        counts = Counter(refusal.reason.value for refusal in refused)
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts.most_common())
        _log.warning("%s: %d refused (%s); %d images with captions are there", where, len(refused), reasons, pairs)
