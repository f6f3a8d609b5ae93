"""The rows of a shard, ready for the models: read from the source the first time, from the samples layer afterwards.

Both paths give the same rows in the same order and the same row groups. A bounded window of rows is decoded and
augmented ahead in decode processes. Memory grows with the window and the row group, never with the shard.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import wait
from dataclasses import replace

import pyarrow as pa

from reinforce.config import Config
from reinforce.dataset.files.layer_file import LayerFile
from reinforce.dataset.kinds.samples import true_captions
from reinforce.engine.decode.decode_pool import CellLease, RowChunk
from reinforce.engine.decode.row import Decoded, Row, StoredImage
from reinforce.engine.messages.pulse import DECODING, READING
from reinforce.errors import UserError
from reinforce.labels.identities import identity_of
from reinforce.labels.interface import LabelReader, RowLabels, Wanted
from reinforce.labels.members import LabelValue
from reinforce.source.formats.base import Shard
from reinforce.source.formats.recognise import find_format
from reinforce.source.identity import former_url
from reinforce.source.reading import read_samples
from reinforce.source.references import ImageRoots, LostImage, images_of_group
from reinforce.source.samples import RawSample, Refusal
from reinforce.source.urls import canonical, is_public
from schemas import IMAGE_DIGEST, TRUE_CAPTIONS, Reason, image_columns

#: A row group is full at the first of these limits: rows, bytes of encoded images, and bytes of vectors at a nominal
#: width. Small enough to shuffle and to stream.
GROUP_ROWS = 1024
GROUP_BYTES = 32 * 2**20
#: A chunk is full at CHUNK_ROWS rows or _CHUNK_BYTES encoded bytes.
CHUNK_ROWS = 8
_CHUNK_BYTES = 2**20
_MAX_PENDING_BYTES = 128 * 2**20
_LABEL_COLUMNS = ("metadata", "width", "height", "augmentations")  # of stored samples, by which labels are found
_NOMINAL_VECTOR_BYTES = 1536 * 2


def max_group_rows(vectors: int, group_rows: int = GROUP_ROWS) -> int:
    """Most rows of a row group, for ``vectors`` of a row: augmentations, or true captions if they are more.

    Independent of the teachers, so that one can be added later.
    """
    return max(1, min(group_rows, GROUP_BYTES // (vectors * _NOMINAL_VECTOR_BYTES)))


def rows_from_source(
    config: Config, shard: Shard, labels: LabelReader, lease: CellLease, window: int, group_rows: int = GROUP_ROWS
) -> Iterator[Row | Refusal]:
    """Read a source shard. Every image is decoded, even where no layer needs it, so that broken ones are refused.

    The cells of yielded rows are to be released by the caller.
    """
    if labels.shard_refusal is not None:
        yield labels.shard_refusal
        return
    vectors = max(config.augmentations.count, config.input.captions_per_sample or 1)
    grouping = _Grouping(max_group_rows(vectors, group_rows))
    seen: set[str] = set()  # keys of labels: several samples of the source may match one
    samples = _read_samples(config, shard)
    rows = _labelled_rows(samples, labels) if labels.sets else map(_unlabelled, samples)
    for row in decode_ahead(lease, rows, window):
        if isinstance(row, Refusal):
            yield row
            continue
        assert isinstance(row.sample, RawSample)
        if row.key in seen:
            assert row.cell is not None
            lease.free.release([row.cell])
            yield Refusal(row.key, Reason.DUPLICATE_KEY, "another sample has the same reinforcements; it is kept")
            continue
        if labels.decides_rows:
            seen.add(row.key)
        for name in row.decoded.unlabelled:
            labels.refuse(next(one for one in row.labels if one.name == name))
        row.group = grouping.add(len(row.sample.image))
        yield row
    yield from labels.left_over()


def rows_from_samples(
    config: Config, shard: Shard, file: LayerFile, labels: LabelReader, lease: CellLease, window: int
) -> Iterator[Row]:
    """Read the rows back from the samples layer of a shard, with images only if ``lease`` has cells for their pixels.

    Images that are stored by reference are read from the shard itself, or from the files that it names. The cells of
    yielded rows are to be released by the caller.
    """
    stored = _stored_rows(config, shard, file, labels, lease.cells.needed)
    if not lease.cells.needed and labels.member_reader is None:
        yield from lease.watch.steps(READING, stored)
        return
    for row in decode_ahead(lease, stored, window):
        assert isinstance(row, Row)
        yield row


def _read_samples(config: Config, shard: Shard) -> Iterator[RawSample | Refusal]:
    """The samples of a shard; with images by reference, only those whose images can be read again."""
    items = read_samples(shard, config.input)
    if config.input.rows_per_shard is not None and shard.part is None and find_format(shard.format).is_table:
        items = _undivided(items)
    if config.embeds_images or find_format(shard.format).has_offsets:
        return items
    roots = _image_roots(config, shard)
    return (item if isinstance(item, Refusal) else _referenced(item, roots, config) for item in items)


def _undivided(items: Iterable[RawSample | Refusal]) -> Iterator[RawSample | Refusal]:
    """Refuse a table that could not be read when its shards were formed. Its rows are those of the next run's parts."""
    for item in items:
        if isinstance(item, RawSample):
            yield Refusal(None, Reason.SHARD_UNREADABLE, "it could not be divided into shards; the next run divides it")
            return
        yield item


def _referenced(item: RawSample, roots: ImageRoots, config: Config) -> RawSample | Refusal:
    """A sample with the URL of its image as it is stored, if the image can be read there again."""
    if item.url is None:
        return Refusal(item.key, Reason.IMAGE_PLACE, "images: reference needs a file for each image")
    if not is_public(item.url):
        return Refusal(item.key, Reason.IMAGE_PLACE, "images: reference needs URLs without user, password and query")
    try:
        url = roots.check(canonical(item.url))
    except UserError as error:
        return Refusal(item.key, Reason.IMAGE_PLACE, str(error))
    return replace(item, url=former_url(url, config.moved))


def _image_roots(config: Config, shard: Shard) -> ImageRoots:
    """Where the images of a shard may be read by reference."""
    size = config.input.limits.image_bytes
    if find_format(shard.format).has_offsets:
        return ImageRoots.of_shard(shard.url, size)
    key = 'input.images_from: ["{}"]'
    return ImageRoots.named([shard.folder, *(config.input.images_from or ())], key, size)


class _Grouping:
    """Numbers the row group of each row: a new one begins at ``limit`` rows or ``GROUP_BYTES``."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._group = self._rows = self._bytes = 0

    def add(self, size: int) -> int:
        """The row group of the next row, whose encoded image has ``size`` bytes."""
        if self._rows and (self._rows == self._limit or self._bytes + size > GROUP_BYTES):
            self._group, self._rows, self._bytes = self._group + 1, 0, 0
        self._rows, self._bytes = self._rows + 1, self._bytes + size
        return self._group


def _unlabelled(sample: RawSample | Refusal) -> Row | Refusal:
    return sample if isinstance(sample, Refusal) else Row(sample.key, sample=sample)


def _labelled_rows(samples: Iterable[RawSample | Refusal], labels: LabelReader) -> Iterator[Row | Refusal]:
    """The samples of a source, with labels some at a time; those that labels refuse as their refusals."""
    waiting: list[RawSample | Refusal] = []
    size = 0
    for item in itertools.chain(samples, [None]):
        if item is not None:
            waiting.append(item)
            size += len(item.image) if isinstance(item, RawSample) else 0
        if item is None or len(waiting) == labels.at_once or size > GROUP_BYTES:
            raws = [one for one in waiting if isinstance(one, RawSample)]
            found = iter(labels.find([Wanted(one.key, identity_of(one.all_sidecars), one.image) for one in raws]))
            yield from (one if isinstance(one, Refusal) else _labelled(one, next(found)) for one in waiting)
            waiting, size = [], 0


def _labelled(raw: RawSample, labels: Sequence[RowLabels]) -> Row | Refusal:
    refusal = next((one.refusal for one in labels if one.refusal is not None), None)
    return refusal or Row(next((one.key for one in labels if one.key is not None), raw.key), sample=raw, labels=labels)


def _stored_rows(config: Config, shard: Shard, file: LayerFile, reader: LabelReader, decoded: bool) -> Iterator[Row]:
    """The rows of the samples layer, with their images if these are ``decoded``."""
    columns = ["key", "caption", TRUE_CAPTIONS]
    roots = _image_roots(config, shard)
    if decoded:
        columns += ["augmentations", *image_columns(config.images)]
    if reader.sets:
        stated = image_columns(config.images)[-1:] if reader.needs_digests else ()  # a digest, or the image
        columns = [*dict.fromkeys([*columns, *_LABEL_COLUMNS, *stated])]
    for group in range(file.num_row_groups):
        table = file.read_row_group(group, columns=columns)
        images: Iterable[bytes | LostImage | None] = itertools.repeat(None)
        if decoded and "image" in columns:
            images = (value.as_py() for value in table["image"])
        elif decoded:
            digests = table[IMAGE_DIGEST].to_pylist() if IMAGE_DIGEST in table.column_names else None
            images = images_of_group(table["image_ref"].to_pylist(), roots, config.moved, digests)
        records = table["augmentations"].to_pylist() if "augmentations" in columns else itertools.repeat([])
        keys, captions = table["key"].to_pylist(), true_captions(table)
        labels: Iterable[tuple[Mapping[str, LabelValue], Sequence[RowLabels]]] = itertools.repeat(({}, ()))
        if reader.sets:
            labels = _labels_of_stored(table, captions, reader)
        for key, texts, image, record, (values, packed) in zip(keys, captions, images, records, labels, strict=False):
            sample = None if image is None else StoredImage(image, record)
            first = next(iter(texts), None)
            yield Row(key, first, group=group, sample=sample, more=texts[1:], labels=packed, values=values)


def _labels_of_stored(
    samples: pa.Table, captions: Sequence[Sequence[str]], labels: LabelReader
) -> Iterator[tuple[Mapping[str, LabelValue], Sequence[RowLabels]]]:
    """Labels of the rows of a row group of samples, and those that are packed. Vectors of images must belong to their
    crops."""
    keys, metadata = samples["key"].to_pylist(), samples["metadata"].to_pylist()
    digests = samples[IMAGE_DIGEST].to_pylist() if IMAGE_DIGEST in samples.column_names else itertools.repeat(None)
    if "image" in samples.column_names:
        digests = (image.as_py() for image in samples["image"])
    stated = (identity_of({} if text is None else {"json": text.encode()}) for text in metadata)
    wanted = [Wanted(*one) for one in zip(keys, stated, digests, strict=False)]
    sizes = zip(*(samples[side].to_pylist() for side in ("width", "height")), strict=True)
    rows = zip(labels.find(wanted), keys, captions, sizes, samples["augmentations"].to_pylist(), strict=True)
    for found, key, texts, (width, height), records in rows:
        values: dict[str, LabelValue] = {}
        for one in found:
            why = one.why_other(width, height, records)
            if why is None:
                values |= one.values_of(key, texts, one.values)
            else:
                labels.refuse(one)
                values |= dict.fromkeys(one.values, Refusal(key, Reason.NOT_REINFORCED, f"labels: {why}"))
        yield values, [packed for one in found if (packed := one.to_unpack(records)) is not None]


def chunk_rows(window: int, processes: int) -> int:
    """Rows of a chunk: two chunks of a window per process."""
    return max(1, min(CHUNK_ROWS, window // (2 * processes)))


def decode_ahead(lease: CellLease, rows: Iterable[Row | Refusal], window: int) -> Iterator[Row | Refusal]:
    """Yield each row with its cell and what was decoded, in order; a Refusal passes through.

    A sample of the source that cannot be used gives its Refusal; a row of the samples layer is black then. At most
    ``window`` rows are pending, and fewer if their encoded bytes add up to more than 128 MiB. The consumer releases the
    cells. Raises RuntimeError for a row at which a decode process raised.
    """
    ahead = _Ahead(lease, chunk_rows(window, lease.pool.processes))
    try:
        for row in lease.watch.steps(READING, rows):
            ahead.add(row)
            while len(ahead) > window or (ahead.bytes > _MAX_PENDING_BYTES and len(ahead) > 1):
                yield ahead.take()
        while len(ahead):
            yield ahead.take()
    finally:
        ahead.cancel()


class _Ahead:
    """The pending rows, in order, and the chunks that they are in."""

    def __init__(self, lease: CellLease, chunk_limit: int) -> None:
        self.bytes = 0  # encoded, of all pending rows
        self._lease, self._chunk_limit = lease, chunk_limit
        self._pending: deque[Refusal | tuple[RowChunk, int]] = deque()
        self._open, self._open_bytes = RowChunk(lease), 0
        self._submitted: deque[RowChunk] = deque()

    def __len__(self) -> int:
        return len(self._pending)

    def add(self, row: Row | Refusal) -> None:
        if isinstance(row, Refusal):
            self._pending.append(row)
            return
        rows, size = self._open.rows, row.size
        self._pending.append((self._open, len(rows)))
        row.cell = self._lease.free.take()
        rows.append(row)
        self._open_bytes += size
        self.bytes += size
        if len(rows) == self._chunk_limit or self._open_bytes > _CHUNK_BYTES:
            self._submit()

    def take(self) -> Row | Refusal:
        """The oldest row, once it is decoded."""
        entry = self._pending.popleft()
        if isinstance(entry, Refusal):
            return entry
        chunk, number = entry
        if chunk is self._open:
            self._submit()
        row = chunk.rows[number]
        with self._lease.watch.stage(DECODING, f"key {row.key!r}"):
            outcome = chunk.future.result()[number]
        self.bytes -= row.size
        if isinstance(outcome, str):
            raise RuntimeError(outcome)
        assert row.cell is not None
        if isinstance(outcome, Refusal):
            if isinstance(row.sample, RawSample):
                self._lease.free.release([row.cell])
                return outcome
            self._lease.cells.blacken(row.cell)  # an image that was accepted before crashes its decode process now
            outcome = Decoded(unreadable=outcome)
        row.finish(outcome)
        return row

    def cancel(self) -> None:
        """Withdraw what no process has begun, and wait until no process writes into the cells any more."""
        futures = [chunk.future for chunk in self._submitted]
        wait([future for future in futures if not future.cancel()])

    def _submit(self) -> None:
        """Submit the open chunk and open another."""
        chunk = self._open
        self._lease.pool.submit(chunk)
        self._lease.watch.read_bytes += self._open_bytes
        self._open, self._open_bytes = RowChunk(self._lease), 0
        self._submitted.append(chunk)
        while self._submitted and self._submitted[0].future.done():
            self._submitted.popleft()
