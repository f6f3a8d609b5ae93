"""The groups of a source that is streamed: its files, or parts of them, with the examples that each has.

They are found once, before the ranks start. The numbers of tables, folders and reinforced datasets are known without
reading images, those of tars from ``sizes.json`` beside them, as open_clip reads it, or from their headers. Where
images are held out by their keys, or each caption is an example, every key and caption is read instead.
"""

from __future__ import annotations

import itertools
import json
import logging
import posixpath
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

import schemas
from reinforce.captioning.config import CaptionerConfig, Data
from reinforce.captioning.pairs import (
    PAIRS_FILE,
    Pairs,
    check_batch,
    check_held_out,
    fingerprint_of,
    is_held_out,
    load_pairs,
    read_table,
    write_table,
)
from reinforce.captioning.scan import input_of_data
from reinforce.config import Input
from reinforce.dataset.files.store import Store
from reinforce.dataset.layers import SAMPLES, require_images
from reinforce.dataset.manifest.manifest import read_manifest
from reinforce.dataset.view import open_view, read_view
from reinforce.errors import UserError
from reinforce.evaluation.fields import read_captions
from reinforce.evaluation.reading import check_no_view, detect_kind, list_shards, raise_on_damage, storage_errors
from reinforce.seeds import permutation
from reinforce.source.formats import dataset as samples_layer
from reinforce.source.formats.base import Part, Shard
from reinforce.source.formats.lines import COMPRESSIONS
from reinforce.source.formats.recognise import find_format
from reinforce.source.reading import read_samples
from reinforce.source.samples import Item, RawSample, Refusal
from reinforce.source.urls import canonical, filesystem
from reinforce.source.views import with_fingerprint
from reinforce.storage import Storage
from reinforce.student.data.datasets import samples_groups
from reinforce.terminal import plural, show_progress
from schemas import Reason

#: Files in the output: the counts of groups, and the encoded held-out images one after the other.
GROUPS_FILE, IMAGES_FILE = "groups.parquet", "held-out.bin"
_ROWS = 1024  # of a part of a table or a folder, at least
_READERS = 16
_MOST_CAPTIONS = 64  # of a sample of a dataset
_EVALUATED = 5000  # held-out images of a share, unless `evaluate.images` is set

_log = logging.getLogger(__name__)

#: A sample with its captions.
Pair = tuple[Item, Sequence[str]]


@dataclass(frozen=True)
class PairReader:
    """Reads the pairs of a group: samples that have captions, without those that are held out, or these alone.

    ``view`` is that of a dataset, with its fingerprint.
    """

    data: Data
    seed: int
    share: float | None
    view: str | None = None

    @cached_property
    def _spec(self) -> Input:
        return input_of_data(self.data).model_copy(update={"view": self.view})

    def pairs(self, shard: Shard, *, images: bool = True, held_out: bool = False) -> Iterator[Pair | Refusal]:
        """Yield the pairs of a group in order, and refusals; without ``images``, samples may lack theirs.

        Raises UserError for a shard that cannot be read completely.
        """
        spec = self._spec
        if shard.format == samples_layer.FORMAT.name:
            spec = spec.model_copy(update={"captions_per_sample": _MOST_CAPTIONS})
        texts = find_format(shard.format).read_texts
        items: Iterator[Item] = read_samples(shard, spec) if images else texts(shard, spec)
        for item in raise_on_damage(items, shard.file, "data"):
            if isinstance(item, Refusal):
                if item.reason is Reason.IMAGE_PLACE and shard.format == samples_layer.FORMAT.name:
                    raise UserError(item.detail.replace("input.images_from", "data.images_from"))
                yield item
            elif self.is_held_out(item.key) == held_out:
                if captions := self._captions(item, shard):
                    yield item, captions
                else:
                    yield Refusal(item.key, Reason.NO_TEXT, f"no caption at {', '.join(self.data.captions)}")

    def is_held_out(self, key: str) -> bool:
        """Whether the image is of the share that is held out, by a seeded hash of its key."""
        return self.share is not None and is_held_out(key, self.seed, self.share)

    def _captions(self, item: Item, shard: Shard) -> Sequence[str]:
        assert not isinstance(item, Refusal)
        sidecars = item.all_sidecars if isinstance(item, RawSample) else item.sidecars
        if shard.format == samples_layer.FORMAT.name:  # whose samples may keep several captions
            several = read_captions(sidecars, ["lines:txt"], self.data.limits)
            if len(several) > 1:
                return several
        return read_captions(sidecars, self.data.captions, self.data.limits)


@dataclass(frozen=True)
class Groups:
    """The groups of a source as shards that are each read at once, and the number of examples [groups] of each."""

    shards: tuple[Shard, ...]
    rows: npt.NDArray[np.int64]


def make_reader(config: CaptionerConfig) -> PairReader:
    """The reader of the pairs of ``data``. Raises UserError for a view that cannot be read."""
    source, view = config.data.source, config.data.view
    if view is not None and detect_kind(source) == "layers":
        view = with_fingerprint(view, read_view(Store(str(source)), view).fingerprint)
    return PairReader(config.data, config.seed, config.held_out.share, view)


def load_groups(config: CaptionerConfig, reader: PairReader) -> Groups:
    """Find the groups of ``data``, and count their examples, or take the counts from the output of the training.

    Raises UserError for shards that cannot be read completely, and for fewer examples than a batch has.
    """
    found = [*_list_groups(config.data)]
    shards = [shard for shard, _ in found]
    if config.data.use == "all" or config.held_out.share is not None:
        counts = _counted(config, reader, shards)
    else:
        known = [rows for _, rows in found]
        unknown = [number for number, rows in enumerate(known) if rows is None]
        counted = iter(_counted(config, reader, [shards[number] for number in unknown])) if unknown else iter(())
        counts = [next(counted) if rows is None else rows for rows in known]
    check_batch(config, f"{sum(counts):,} examples", sum(counts))
    return Groups(tuple(shards), np.array(counts, np.int64))


def _list_groups(data: Data) -> Iterator[tuple[Shard, int | None]]:
    """The groups of a source, with the number of their samples where it is known without reading them."""
    if detect_kind(data.source) == "layers":
        url = str(data.source)
        store = Store(url)
        manifest = read_manifest(store)
        require_images(manifest, url)
        view = None if data.view is None else open_view(store, manifest, data.view)
        sizes, groups = samples_groups(store, {SAMPLES: manifest["layers"][SAMPLES]["fingerprint"]}, view)
        shards = [*sizes]
        for number, place, rows in groups.tolist():
            file = store.layer_path(SAMPLES, shards[number])
            yield (
                Shard(file, shards[number], samples_layer.FORMAT.name, part=Part(file, 0, rows, place, place + 1)),
                rows,
            )
        return
    check_no_view(data.source, data.view, "data")
    sizes_of: dict[str, dict[str, int]] = {}
    with ThreadPoolExecutor(_READERS) as pool:
        listed = list_shards(data.source, input_of_data(data))
        divided = pool.map(lambda shard: _divided(shard, sizes_of), listed)
        for parts in show_progress(divided, len(listed), "shard"):
            yield from parts


def _divided(shard: Shard, sizes_of: dict[str, dict[str, int]]) -> list[tuple[Shard, int | None]]:
    with storage_errors(f"data: {canonical(shard.file)} cannot be read", "Check the path, or download it again."):
        return [*_divide(shard, sizes_of)]


def _divide(shard: Shard, sizes_of: dict[str, dict[str, int]]) -> Iterator[tuple[Shard, int | None]]:
    format_ = find_format(shard.format)
    if format_.is_listed:
        lines = shard.lines()
        for first in range(0, len(lines), _ROWS):
            part = lines[first : first + _ROWS]
            yield replace(shard, listing=b"\n".join(part)), len(part)
    elif format_.is_table:
        # Reading a part of a compressed file would unpack those before it.
        whole = canonical(shard.url).lower().endswith(tuple(f".{end}" for end in COMPRESSIONS))
        for piece in format_.parts(shard.url, 2**62 if whole else _ROWS):
            yield replace(shard, part=piece), piece.rows
    else:
        if shard.folder not in sizes_of:
            sizes_of[shard.folder] = _sizes_beside(shard.folder)
        yield shard, sizes_of[shard.folder].get(posixpath.basename(canonical(shard.url)))


def _sizes_beside(folder: str) -> dict[str, int]:
    """The samples of each shard by ``sizes.json`` in their folder, as webdataset's tools write it; none without it."""
    try:
        fs, path = filesystem(f"{folder}/sizes.json")
        found = json.loads(fs.cat_file(path))
    except Exception:  # each storage driver raises its own exceptions; the shards are counted then
        return {}
    return {name: int(rows) for name, rows in found.items() if isinstance(rows, int)} if isinstance(found, dict) else {}


def _counted(config: CaptionerConfig, reader: PairReader, shards: Sequence[Shard]) -> list[int]:
    """The examples of each group, read once for each training."""
    store = Storage(config.output)
    fingerprint = fingerprint_of(config, {"data": _files(shards)}, config.data.use)
    if (stored := read_table(store, GROUPS_FILE, fingerprint)) is not None:
        return [int(rows) for rows in stored["rows"].to_pylist()]
    _log.info("counting the samples of %s, which is done once", plural(len(shards), "part"))
    with ThreadPoolExecutor(_READERS) as pool:
        counted = pool.map(lambda shard: _count(reader, shard, config.data.use), shards)
        counts = [*show_progress(counted, len(shards), "part")]
    write_table(store, GROUPS_FILE, pa.table({"rows": pa.array(counts, pa.int64())}), fingerprint)
    return counts


def _files(shards: Sequence[Shard]) -> list[Shard]:
    """The files that the groups are parts of, once each."""
    files = {(shard.file, shard.listing): replace(shard, url=shard.file, part=None) for shard in shards}
    return [*files.values()]


def _count(reader: PairReader, shard: Shard, use: str) -> int:
    pairs = (pair for pair in reader.pairs(shard, images=False) if not isinstance(pair, Refusal))
    return sum(len(captions) if use == "all" else 1 for _, captions in pairs)


def load_held_out(config: CaptionerConfig, reader: PairReader, groups: Groups) -> Pairs:
    """The held-out images for evaluation, with their captions.

    Of a share: the first ``evaluate.images``, or 5,000, of the groups in a seeded order, copied to the output, since
    they are read again and again. Raises UserError for fewer than two.
    """
    if config.held_out.source is not None:
        return load_pairs(config).held_out()
    store, most = Storage(config.output), config.evaluate.images or _EVALUATED
    fingerprint = fingerprint_of(config, {"data": _files(groups.shards)}, str(most))
    url = f"{config.output.rstrip('/')}/{IMAGES_FILE}"
    table = read_table(store, PAIRS_FILE, fingerprint)
    if table is None:
        images: list[bytes] = []
        rows: list[dict[str, Any]] = []
        order = permutation(len(groups.shards), config.seed, "held out", 0).tolist()
        found = (pair for number in order for pair in reader.pairs(groups.shards[number], held_out=True))
        samples = (pair for pair in found if not isinstance(pair, Refusal))
        offset = 0
        for item, captions in show_progress(itertools.islice(samples, most), most, "held-out image"):
            assert isinstance(item, RawSample)
            place = {"url": canonical(url), "offset": offset, "length": len(item.image)}
            rows.append({"key": item.key, **place, "captions": [*captions], "held_out": True})
            images.append(item.image)
            offset += len(item.image)
        table = pa.Table.from_pylist(rows, schema=schemas.PAIRS)
        store.write_bytes(b"".join(images), IMAGES_FILE)
        write_table(store, PAIRS_FILE, table, fingerprint)
    pairs = Pairs(table, {canonical(url): url})
    check_held_out(pairs)
    return pairs
