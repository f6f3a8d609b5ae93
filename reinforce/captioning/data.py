"""The pairs of a source, samples with captions, in groups: its files, or parts of them.

Groups are found once, before the ranks start. The numbers of tables, folders and reinforced datasets are known without
reading images, those of tars from ``sizes.json`` beside them, as open_clip reads it, or from their headers. Where
images are held out by their keys, or each caption is an example, every key and caption is read instead.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import itertools
import json
import logging
import posixpath
import tempfile
from collections import Counter
from collections.abc import Collection, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import IO, Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

import schemas
from reinforce.captioning.config import CaptionerConfig, Data
from reinforce.config import Augmentations, RandAugment
from reinforce.dataset.layers import SAMPLES, require_images
from reinforce.dataset.manifest import read_manifest
from reinforce.dataset.store import Store
from reinforce.dataset.view import open_view, read_view
from reinforce.errors import UserError
from reinforce.evaluation.reading import (
    Table,
    check_no_view,
    detect_kind,
    input_of,
    list_shards,
    raise_on_damage,
    read_captions,
)
from reinforce.images.backends import sample_augmentation
from reinforce.source import parquet_file
from reinforce.source.config import Input
from reinforce.source.formats import dataset as samples_layer
from reinforce.source.formats.base import Part, Shard, find_format, read_samples
from reinforce.source.formats.jsonl import COMPRESSIONS
from reinforce.source.samples import CAPTION_POLICY, Item, RawSample, Refusal, UnreadSample
from reinforce.source.urls import canonical, filesystem, open_whole, storage_errors, with_fingerprint
from reinforce.student.data.datasets import samples_groups
from reinforce.student.data.examples import Example, ReplayedExamples, SampleFile
from reinforce.student.data.feed import Assembler, StreamFeed, Streams
from reinforce.student.data.stream import PartMaker, Tokenize
from reinforce.terminal import plural, show_progress
from reinforce.training.order import GroupChunk
from schemas import Reason
from schemas.seeds import permutation, seed_for, uniforms

#: File in the output with the number of examples of each group.
GROUPS_FILE = "groups.parquet"
FINGERPRINT = b"fingerprint"  # in the metadata of files in the output
_ROWS = 1024  # of a part of a table or a folder, at least
_READERS = 16
_MOST_CAPTIONS = 64  # of a sample of a dataset
_MOST_SAMPLES = 10_000_000  # of a shard by sizes.json
HELD_OUT_FILE = "held-out.parquet"
_EVALUATED = 5000  # held-out images of a share, unless `evaluate.images` is set
_GROUP_ROWS = 64  # of a row group of held-out images

_log = logging.getLogger(__name__)

#: A sample with its captions.
Pair: TypeAlias = "tuple[RawSample | UnreadSample, Sequence[str]]"
#: A group as a shard that is read at once, and the number of its samples, None if it is not known.
Group: TypeAlias = "tuple[Shard, int | None]"


@dataclass(frozen=True)
class PairSource:
    """The source at the key ``where`` of a config, with the ``share`` of its pairs that is held out, if there is one.

    ``view`` is one of the reinforced dataset at ``urls``.
    """

    where: str
    urls: str | list[str]
    view: str | None
    data: Data
    seed: int
    share: float | None = None

    @cached_property
    def is_dataset(self) -> bool:
        """Whether it is a reinforced dataset. Raises UserError where the storage cannot be reached."""
        return detect_kind(self.urls) == "layers"

    @cached_property
    def spec(self) -> Input:
        """How samples are read. Raises UserError for a view that cannot be read."""
        data, view = self.data, self.view
        spec = input_of(data.limits, data.images_from, data.captions, Table(format=data.format, image=data.image))
        if not self.is_dataset:
            check_no_view(self.urls, view, self.where)
            return spec
        if view is not None:
            view = with_fingerprint(view, read_view(Store(str(self.urls)), view).fingerprint)
        return spec.model_copy(update={"view": view, "captions_per_sample": _MOST_CAPTIONS})

    def pairs(
        self, shard: Shard, refused: Counter[str], *, images: bool = True, held_out: bool = False
    ) -> Iterator[Pair]:
        """Yield the pairs of a group in order: those that are not held out, or those that are.

        Refused samples are counted in ``refused`` by reason. Without ``images``, samples may lack theirs. Raises
        UserError for a shard that cannot be read completely.
        """
        if images:
            items: Iterator[Item] = read_samples(shard, self.spec)
        else:
            items = find_format(shard.format).read(shard, self.spec, images=False)
        for item in raise_on_damage(items, shard.file, self.where):
            if isinstance(item, Refusal):
                if self.is_dataset and item.reason is Reason.IMAGE_PLACE:
                    raise UserError(item.detail.replace("input.images_from", "data.images_from"))
                refused[item.reason.value] += 1
                continue
            share = 0.0 if self.share is None else self.share
            if (seed_for(self.seed, item.key, "held out") < int(share * 2**64)) == held_out:
                sidecars = item.all_sidecars if isinstance(item, RawSample) else item.sidecars
                # Samples of a dataset may keep several captions.
                captions = read_captions(sidecars, ["lines:txt"], self.data.limits) if self.is_dataset else []
                if len(captions) < 2:
                    captions = read_captions(sidecars, self.data.captions, self.data.limits)
                if captions:
                    yield item, captions
                else:
                    refused[Reason.NO_TEXT.value] += 1

    def groups(self) -> list[Group]:
        """Find the groups. Raises UserError for a source that cannot be listed."""
        spec = self.spec  # found here, so that loader processes read with the same view
        if self.is_dataset:  # a group is a row group
            store, found = Store(str(self.urls)), list[Group]()
            manifest = read_manifest(store)
            require_images(manifest, str(self.urls))
            view = None if self.view is None else open_view(store, manifest, self.view)
            sizes, groups = samples_groups(store, {SAMPLES: manifest["layers"][SAMPLES]["fingerprint"]}, view)
            names = [*sizes]
            for number, place, rows in groups.tolist():
                file = store.layer_path(SAMPLES, names[number])
                part = Part(file, 0, rows, place, place + 1)
                found.append((Shard(file, names[number], samples_layer.FORMAT.name, part=part), rows))
            return found
        sizes_of: dict[str, dict[str, int]] = {}
        shards = list_shards(self.urls, spec)
        with ThreadPoolExecutor(_READERS) as pool:
            divided = pool.map(lambda shard: [*_divide(shard, self.where, sizes_of)], shards)
            return [group for parts in show_progress(divided, len(shards), "shard") for group in parts]

    def counted(self, found: Sequence[Group], output: str) -> list[int]:
        """The number of examples of each group; those that are counted are kept in ``output``.

        Raises UserError for a shard that cannot be read completely.
        """
        every = self.data.use == "all" or self.share is not None
        unknown = [shard for shard, rows in found if rows is None or every]
        counts = iter(self._count(unknown, output) if unknown else ())
        return [next(counts) if rows is None or every else rows for _, rows in found]

    def fingerprint(self, shards: Sequence[Shard], *more: str) -> str:
        """Hash of everything that determines the pairs of groups, including the state of their files."""
        files = {(shard.file, shard.listing): replace(shard, url=shard.file, part=None) for shard in shards}
        with ThreadPoolExecutor(_READERS) as pool:
            states = [*pool.map(_state, files.values())]
        parts: dict[str, Any] = {
            "files": {"data": len(states)},
            "states": states,
            "captions": self.data.captions,
            "limits": self.data.limits.model_dump(),
            "policy": CAPTION_POLICY,
            "held_out": [self.share, self.seed],
        }
        if any(find_format(shard.format).is_table for shard in shards):
            parts["inputs"] = self.spec.model_dump(mode="json", exclude={"images_from"})
        if self.view is not None:
            parts["views"] = [self.spec.view]
        if more:
            parts["more"] = more
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def log_refused(self, refused: Counter[str]) -> None:
        """Log how many samples are left out, by reason."""
        if refused:
            reasons = ", ".join(f"{reason}: {count:,}" for reason, count in refused.most_common())
            _log.warning("%s: samples that are left out: %s", self.where, reasons)

    def _count(self, shards: Sequence[Shard], output: str) -> list[int]:
        """The examples of each group, read once for each training run."""
        store, fingerprint = Store(output), self.fingerprint(shards, self.data.use)
        if (stored := read_table(store, GROUPS_FILE, fingerprint, ["rows"])) is not None:
            return [int(rows) for rows in stored["rows"].to_pylist()]
        _log.info("counting the samples of %s, which is done once", plural(len(shards), "part"))
        refused = Counter[str]()
        counts = []
        with ThreadPoolExecutor(_READERS) as pool:
            for count, reasons in show_progress(pool.map(self._count_group, shards), len(shards), "part"):
                counts.append(count)
                refused.update(reasons)
        self.log_refused(refused)
        table = pa.table({"rows": pa.array(counts, pa.int64())})
        store.write_table(table.replace_schema_metadata({FINGERPRINT: fingerprint}), GROUPS_FILE)
        return counts

    def _count_group(self, shard: Shard) -> tuple[int, Counter[str]]:
        refused, every = Counter[str](), self.data.use == "all"
        found = self.pairs(shard, refused, images=False)
        return sum(len(captions) if every else 1 for _, captions in found), refused


def read_table(store: Store, name: str, fingerprint: str, columns: list[str]) -> pa.Table | None:
    """Columns of a table that was written with this fingerprint to the output, or None."""
    path = store.path(name)
    if not store.fs.exists(path):
        return None
    with storage_errors(f"{store.url}/{name} cannot be read", "Delete it."), open_whole(store.fs, path) as file:
        table = parquet_file.read_table(file, columns)
    return table if (table.schema.metadata or {}).get(FINGERPRINT) == fingerprint.encode() else None


def _divide(shard: Shard, where: str, sizes_of: dict[str, dict[str, int]]) -> Iterator[Group]:
    format_ = find_format(shard.format)
    fix = "Check the path, or download it again."
    with storage_errors(f"{where}: {canonical(shard.file)} cannot be read", fix):
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
    """The samples of each shard by ``sizes.json`` in their folder, as webdataset's tools write it; none without it.

    Numbers that no shard has are left out, so that these shards are counted.
    """
    try:
        fs, path = filesystem(f"{folder}/sizes.json")
        found = json.loads(fs.cat_file(path))
    except Exception:  # each storage driver raises its own exceptions; the shards are counted then
        return {}
    if not isinstance(found, dict):
        return {}
    return {name: rows for name, rows in found.items() if type(rows) is int and 0 <= rows <= _MOST_SAMPLES}


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


@dataclass(frozen=True)
class HeldOutImages:
    """Held-out images in the order in which they are evaluated, with their ``captions``.

    ``output`` is the folder of the file with the encoded images, which has the ``fingerprint``.
    """

    output: str
    fingerprint: str
    keys: Sequence[str]
    captions: Sequence[Sequence[str]]

    def __len__(self) -> int:
        return len(self.keys)

    def images(self) -> Iterator[bytes]:
        """Read the encoded images in order. Raises UserError if the file is damaged, or was replaced."""
        store = Store(self.output)
        name = f"{store.url}/{HELD_OUT_FILE}"
        with (
            storage_errors(f"{name} cannot be read", "Delete it, and start the training again."),
            open_whole(store.fs, store.path(HELD_OUT_FILE)) as file,
        ):
            parquet = pq.ParquetFile(file, page_checksum_verification=True, pre_buffer=False)
            if (parquet.schema_arrow.metadata or {}).get(FINGERPRINT) != self.fingerprint.encode():
                raise UserError(f"{name} was replaced during the training. Start it again.")
            for group in range(parquet.num_row_groups):
                for image in parquet.read_row_group(group, columns=["image"], use_threads=False)["image"]:
                    yield image.as_py()


class _Kept(NamedTuple):
    """An image, whose ``length`` bytes are at ``start`` of a temporary file; the highest ``place`` is the first one."""

    place: tuple[int, int]
    key: str
    captions: Sequence[str]
    start: int
    length: int


def load_held_out(config: CaptionerConfig, source: PairSource, shards: Sequence[Shard]) -> HeldOutImages:
    """Load the held-out images from the output, or collect them from ``held_out.source`` or else ``shards``.

    Of a share these are the first ones of the groups in a seeded order, of a source of their own a seeded sample or
    all. Evaluations read the file in the output again and again.

    Raises UserError for fewer than two, and for shards that cannot be read completely.
    """
    own, most = config.held_out, config.evaluate.images
    if own.source is not None:
        source = PairSource("held_out", own.source, own.view, config.data, config.seed)
        shards = [shard for shard, _ in source.groups()]
    else:
        most = most or _EVALUATED
    store, fingerprint = Store(config.output), source.fingerprint(shards, str(most))
    table = read_table(store, HELD_OUT_FILE, fingerprint, ["key", "captions"])
    if table is None:
        _log.info("collecting the held-out images, which is done once")
        with tempfile.TemporaryFile() as images:
            kept: list[_Kept] = []  # a heap, the last one of the order first
            refused = Counter[str]()
            # The pairs of a source of held-out images, or the first ones that are held out of a share.
            share = source.share is not None
            order = permutation(len(shards), source.seed, "held out", 0).tolist() if share else range(len(shards))
            pairs = (pair for shard in order for pair in source.pairs(shards[shard], refused, held_out=share))
            for number, (item, captions) in enumerate(itertools.islice(pairs, most if share else None)):
                assert isinstance(item, RawSample)
                place = -seed_for(source.seed, item.key, "sample"), -number
                if len(kept) == most and place < kept[0].place:
                    continue
                push = heapq.heappushpop if len(kept) == most else heapq.heappush
                push(kept, _Kept(place, item.key, captions, images.tell(), images.write(item.image)))
            source.log_refused(refused)
            kept = sorted(kept, reverse=True)
            if len(kept) < 2:
                raise UserError(
                    f"held_out: {len(kept)} images are held out, but evaluation needs at least two. Raise "
                    "held_out.share, or give held_out.source."
                )
            _write(store, kept, images, fingerprint)
        table = read_table(store, HELD_OUT_FILE, fingerprint, ["key", "captions"])
        assert table is not None
    return HeldOutImages(config.output, fingerprint, table["key"].to_pylist(), table["captions"].to_pylist())


def _write(store: Store, kept: Sequence[_Kept], images: IO[bytes], fingerprint: str) -> None:
    schema = schemas.HELD_OUT.with_metadata({FINGERPRINT: fingerprint})
    options = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    with store.new_file(HELD_OUT_FILE) as path, pq.ParquetWriter(path, schema, **options) as writer:
        for first in range(0, len(kept), _GROUP_ROWS):
            rows = []
            for one in kept[first : first + _GROUP_ROWS]:
                images.seek(one.start)
                rows.append({"key": one.key, "captions": one.captions, "image": images.read(one.length)})
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))


@dataclass(frozen=True)
class StreamedPairs:
    """The pairs of a source in groups; implements ``reinforce.student.data.stream.Streamed``.

    ``counts`` int64 [groups] are the examples of each group, ``size`` the side of images in pixels.
    """

    source: PairSource
    shards: Sequence[Shard]
    counts: npt.NDArray[np.int64]
    size: int
    weight: float = 1.0

    @property
    def url(self) -> str:
        return "data.source"

    def hint(self, unusable: Collection[str]) -> str:
        return "Name the member or field with captions in data.captions."

    @property
    def groups(self) -> npt.NDArray[np.int64]:
        return self.counts[:, None]

    def describe(self) -> str:
        """Return the number of examples and a hash of the names and examples of the groups."""
        names = [canonical(shard.file).rpartition("/")[2] for shard in self.shards]
        digest = hashlib.sha256(json.dumps([names, self.counts.tolist()]).encode()).hexdigest()[:16]
        return f"{self.counts.sum():,} examples in {len(names):,} groups, SHA-256 {digest}"

    def load(self, chunk: GroupChunk, epoch: int, keep: bool = False) -> ReplayedExamples:
        """Read the examples of a chunk of a group in one epoch; see ``Streamed``.

        Samples that are refused have no row where they were read to be counted, and are the last ones of a group
        otherwise. Raises UserError for a shard that cannot be read completely.
        """
        refused = Counter[str]()
        rows = [*self._rows(chunk, refused)]
        keys, seed = [item.key for item, _, _ in rows], self.source.seed
        uniform: list[float] = uniforms(seed, keys, "caption", epoch, 1)[:, 0].tolist() if rows else []
        file = SampleFile(canonical(self.shards[chunk.group].file), self.source.data.limits)
        examples: list[Example | None] = []
        for (item, captions, which), number in zip(rows, uniform, strict=True):
            if which is None:
                draw, text = epoch, captions[int(number * len(captions))]
            else:
                draw, text = epoch * len(captions) + which, captions[which]
            crop = partial(sample_augmentation, self._policy, seed, item.key, draw)
            examples.append(Example(file, item.key, item.image, crop, (text,), ()))
        missing = chunk.rows - len(examples)
        reasons = dict(refused) or {"fewer samples than were counted": missing}
        return ReplayedExamples([*examples, *[None] * missing], reasons if missing else {})

    def _rows(self, chunk: GroupChunk, refused: Counter[str]) -> Iterator[tuple[RawSample, Sequence[str], int | None]]:
        """Yield the samples of a chunk with their captions, and with ``use: all`` the number of one of these."""
        number, every = 0, self.source.data.use == "all"
        for item, captions in self.source.pairs(self.shards[chunk.group], refused):
            assert isinstance(item, RawSample)
            count = len(captions) if every else 1
            for which in range(max(0, chunk.first - number), min(count, chunk.stop - number)):
                yield item, captions, which if every else None
            number += count
            if number >= chunk.stop:
                return

    @cached_property
    def _policy(self) -> Augmentations:
        return Augmentations(count=1, size=self.size, scale=self.source.data.crop, rand_augment=RandAugment(ops=0))


class CaptionStreams(StreamFeed):
    """The feed of a training run whose source is streamed; ``data`` and the order depend on the counts of the groups.

    Memory holds, of each stream, the encoded images of a window and of a group: a row group of Parquet, 1,024 rows of
    another table, or a tar. ``reinforce.training.order`` describes the order. A batch of B samples of a rank has

    - ``key``: list[str],
    - ``image``: uint8 [B, size, size, 3], RandomResizedCrop of the image, RGB,
    - ``caption``: int64 [B, context], start, words, end, padding,
    - ``length``: list[int], the predicted tokens of ``caption``: the words and the end.

    ``tokenize`` maps B texts to int64 [B, context], ``end`` is the token after the last word. With ``pin``, batches are
    in pinned memory. An image that cannot be decoded is replaced by one of a later batch.
    """

    def __init__(self, pairs: StreamedPairs, tokenize: Tokenize, end: int, pin: bool = False) -> None:
        data = pairs.source.data
        maker = PartMaker(pairs.size, (), tokenize, replaces=True)
        described = pairs.describe()
        super().__init__(
            Streams(data.window or 4096, data.streams, data.workers, data.prefetch or 4),
            pairs.source.seed,
            [pairs],
            maker,
            Assembler(("caption",), (), (), pin),
            int(pairs.counts.sum()),
            files=described,
        )
        self._end = end
        self.data = {"data": described}

    def batches(self, rank: int, ranks: int, batch: int, start: int) -> Generator[dict[str, Any]]:
        """See ``StreamFeed.batches``."""
        with contextlib.closing(super().batches(rank, ranks, batch, start)) as batches:
            for one in batches:
                found = {name: one[name] for name in ("key", "image", "caption")}
                yield {**found, "length": predicted_lengths(one["caption"], self._end)}


def predicted_lengths(tokens: torch.Tensor, end: int) -> list[int]:
    """Return the number of predicted tokens of each row [context]: those after the start, up to the first end token."""
    return [int(position) for position in (tokens == end).int().argmax(dim=1)]


def load_streams(config: CaptionerConfig, size: int) -> tuple[StreamedPairs, HeldOutImages]:
    """The pairs of a config for images of ``size`` pixels a side, and the held-out ones.

    Raises UserError for shards that cannot be read completely, and for too few training or held-out images.
    """
    data, batch = config.data, config.train.batch
    source = PairSource("data", data.source, data.view, data, config.seed, config.held_out.share)
    found = source.groups()
    counts = source.counted(found, config.output)
    if sum(counts) < batch:
        raise UserError(
            f"data: {sum(counts):,} examples are left for training, fewer than train.batch ({batch}), so a batch would "
            f"contain an image twice. Lower train.batch or held_out.share, or check data.captions."
        )
    shards = tuple(shard for shard, _ in found)
    streamed = StreamedPairs(source, shards, np.array(counts, np.int64), size)
    return streamed, load_held_out(config, source, shards)
