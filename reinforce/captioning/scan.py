"""Scan of sources for image-caption pairs: every sample of a source of any format that has a caption."""

from __future__ import annotations

import itertools
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
from reinforce.config import Input
from reinforce.dataset.kinds.samples import true_captions
from reinforce.dataset.layers import SAMPLES, require_images
from reinforce.dataset.reading.dataset import Dataset
from reinforce.dataset.view import View, shard_rows
from reinforce.errors import UserError
from reinforce.evaluation.config import Table
from reinforce.evaluation.fields import read_captions
from reinforce.evaluation.reading import check_no_view, detect_kind, input_of, list_shards, raise_on_damage
from reinforce.source.formats import dataset as samples_layer
from reinforce.source.formats.base import Shard
from reinforce.source.formats.recognise import find_format
from reinforce.source.reading import read_samples
from reinforce.source.references import ImageRoots
from reinforce.source.samples import Refusal
from reinforce.source.urls import canonical, compression
from schemas import Reason

#: The columns of ``schemas.PAIRS`` that a scan fills: all but ``held_out``.
SCAN_SCHEMA = pa.schema([field for field in schemas.PAIRS if field.name != "held_out"])

_READERS = 8
_MOST_LOGGED = 10  # refusals that are logged one by one

_log = logging.getLogger(__name__)

ShardPairs = tuple[pa.RecordBatch, list[Refusal]]


def input_of_data(data: Data) -> Input:
    """How the samples of a fine-tuning are read."""
    return input_of(data.limits, data.images_from, data.captions, Table(format=data.format, image=data.image))


def list_files(source: str | list[str], data: Data, where: str, view: str | None = None) -> list[Shard]:
    """List the files with the images, or the samples layer of a reinforced dataset. Raises UserError."""
    if detect_kind(source) == "layers":
        dataset = Dataset(str(source), {}, view=view)
        require_images(dataset.manifest, where)
        return [Shard(_samples_file(dataset, shard), shard, samples_layer.FORMAT.name) for shard in dataset.shards]
    check_no_view(source, view, where)
    shards = list_shards(source, input_of_data(data))
    for shard in shards:
        if find_format(shard.format).has_offsets and compression(shard.url):
            raise UserError(
                f"{where}: {canonical(shard.url)} is compressed, and images are read in random order, which a "
                "compressed tar does not allow. Decompress it."
            )
    return shards


def copied_input(shard: Shard, data: Data) -> str | None:
    """How the images of a file are read that are copied before they are read in random order, as JSON.

    None for tars and folders, whose images are bytes of files, and for the files of a reinforced dataset.
    """
    if not find_format(shard.format).copied:
        return None
    return input_of_data(data).model_copy(update={"format": shard.format}).model_dump_json()


def scan(source: str | list[str], data: Data, where: str, view: str | None = None) -> pa.Table:
    """Return all pairs of a source in order, with SCAN_SCHEMA. Refused samples are counted and logged.

    ``where`` is the config key for messages. Raises UserError for a shard that cannot be read completely, and where no
    sample has a caption.
    """
    if detect_kind(source) == "layers":
        kept = whole = Dataset(str(source), {})
        if view is not None:  # whose images are at places among all rows
            kept = Dataset(str(source), {}, view=view)
        parts = [_scan_dataset_shard(whole, shard, data, kept.view) for shard in kept.shards]
    else:
        with ThreadPoolExecutor(_READERS) as pool:
            parts = list(pool.map(lambda shard: _scan_file(shard, data, where), list_files(source, data, where)))
    refused = [refusal for _, refusals in parts for refusal in refusals]
    table = pa.Table.from_batches([batch for batch, _ in parts], schema=SCAN_SCHEMA)
    _report_refused(refused, table.num_rows, data, where)
    return table


def _scan_file(shard: Shard, data: Data, where: str) -> ShardPairs:
    pairs, offset = _PairsBuilder(data), 0
    has_offsets = find_format(shard.format).has_offsets
    for item in raise_on_damage(read_samples(shard, input_of_data(data)), shard.file, where):
        if isinstance(item, Refusal):
            pairs.refused.append(item)
        elif has_offsets:
            pairs.add(item.key, canonical(shard.url), item.offset, item.length, item.all_sidecars)
        elif item.url is None:  # the copy has the images of the file one after the other
            pairs.add(item.key, canonical(shard.url), offset, item.length, item.all_sidecars)
            offset += item.length
        elif item.url.lower().startswith(("http://", "https://")):
            raise UserError(
                f"{where}: {canonical(shard.file)} names images at web addresses, and images are read in random order, "
                "many times. Download them, for instance with img2dataset, and name its tars."
            )
        else:
            pairs.add(item.key, canonical(item.url), 0, item.length, item.all_sidecars)
    return pairs.build()


def _scan_dataset_shard(dataset: Dataset, shard: str, data: Data, view: View | None) -> ShardPairs:
    pairs = _PairsBuilder(data)
    roots = ImageRoots.named(data.images_from or (), 'data.images_from: ["{}"]', data.limits.image_bytes)
    offset, rows = 0, None if view is None else shard_rows(view.rows, dataset.store, shard)
    for group, tables in enumerate(dataset.row_groups(shard)):
        table = tables[SAMPLES]
        if dataset.manifest["images"] == "embed":
            lengths = pc.binary_length(table["image"]).to_pylist()
            starts = (offset + np.cumsum([0, *lengths])).tolist()
            offset = starts.pop()
            urls = [canonical(_samples_file(dataset, shard))] * len(starts)
        else:
            ranges = roots.ranges(table["image_ref"].to_pylist())
            urls, starts, lengths = ([*column] for column in zip(*ranges, strict=True)) if ranges else ([], [], [])
        texts = table.select(["key", "caption", "metadata"]).to_pylist()
        several = true_captions(table)
        kept = [True] * len(table) if rows is None else rows.kept(group, table["key"]).to_pylist()
        found = zip(urls, starts, lengths, texts, several, strict=True)
        for url, start, length, text, own in itertools.compress(found, kept):
            members = {"txt": text["caption"], "json": text["metadata"]}
            sidecars = {name: value.encode() for name, value in members.items() if value}
            pairs.add(text["key"], url, start, length, sidecars, own)
    return pairs.build()


class _PairsBuilder:
    """Collects the pairs and refusals of one shard."""

    def __init__(self, data: Data) -> None:
        self.refused: list[Refusal] = []
        self._data = data
        self._rows: list[dict[str, Any]] = []

    def add(
        self, key: str, url: str, offset: int, length: int, sidecars: Mapping[str, bytes], several: Sequence[str] = ()
    ) -> None:
        """Add an image with the captions of its sidecars, or with ``several`` that a dataset keeps."""
        found = several if len(several) > 1 else read_captions(sidecars, self._data.captions, self._data.limits)
        captions = list(found)
        if captions:
            self._rows.append({"key": key, "url": url, "offset": offset, "length": length, "captions": captions})
        else:
            members = ", ".join(sidecars) or "none"
            self.refused.append(Refusal(key, Reason.NO_TEXT, f"members other than the image: {members}"))

    def build(self) -> ShardPairs:
        return pa.RecordBatch.from_pylist(self._rows, schema=SCAN_SCHEMA), self.refused


def _samples_file(dataset: Dataset, shard: str) -> str:
    return f"{dataset.store.url}/{SAMPLES}/{shard}.parquet"


def _report_refused(refused: Sequence[Refusal], pairs: int, data: Data, where: str) -> None:
    if not pairs:
        why = f", for instance {refused[0].key}: {refused[0].reason.value}, {refused[0].detail}" if refused else ""
        raise UserError(
            f"{where}: none of {len(refused)} samples has an image and a caption at {', '.join(data.captions)}{why}. "
            "Name the member or field in data.captions."
        )
    for refusal in refused[:_MOST_LOGGED]:
        _log.warning("%s: refused %s: %s (%s)", where, refusal.key, refusal.reason.value, refusal.detail)
    if refused:
        counts = Counter(refusal.reason.value for refusal in refused)
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts.most_common())
        _log.warning("%s: %d samples refused (%s), %d images with captions kept", where, len(refused), reasons, pairs)
