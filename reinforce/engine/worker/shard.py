"""One shard through all models that its missing layers need: rows, batches, models, tables, commit.

Its rows are read from the source the first time, from the samples layer afterwards. Both paths give the same rows in
the same order and the same row groups. A bounded window of rows is decoded and augmented ahead in decode processes.
Memory grows with the window and the row group, never with the shard.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import time
from collections import Counter, deque
from collections.abc import Container, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import partial

import pyarrow as pa

import schemas
from reinforce.config import Config
from reinforce.dataset.index import FileEntry, drop_shard_command, set_aside
from reinforce.dataset.kinds.samples import true_captions
from reinforce.dataset.layer_file import LayerFile, RefusedFile, naming_refused
from reinforce.dataset.layers import SAMPLES, Layer
from reinforce.dataset.runs import ShardKeys, ShardRecord, SourceRecord
from reinforce.dataset.store import LINKED, LayerWriter, Store, origin_entries, other_origin, parse_footer
from reinforce.engine.messages import LayerFailure, PendingShard, ShardResult
from reinforce.engine.plan.source_changes import describe_replaced, referenced_source_change
from reinforce.engine.pulse import DECODING, READING, WRITING, LeaseWatch
from reinforce.engine.worker.decode import (
    GROUP_BYTES,
    GROUP_ROWS,
    CellLease,
    Decoded,
    DecodePool,
    DecodeSpec,
    Row,
    RowChunk,
    StoredImage,
)
from reinforce.engine.worker.inference import (
    IN_WORK,
    Inference,
    Outputs,
    Session,
    cells_per_shard,
    device_report,
    rows_ahead,
    run_batches,
)
from reinforce.engine.worker.models import Counters, LoadedModels
from reinforce.engine.worker.producers.base import (
    MisalignedLayer,
    Refusals,
    RowGroupTables,
    set_inputs_aside,
    set_stale_aside,
)
from reinforce.engine.worker.producers.registry import make_producers
from reinforce.errors import UserError
from reinforce.labels.index import identity_of, quarantine_of
from reinforce.labels.members import LabelReader, LabelValue, RowLabels, Wanted
from reinforce.labels.rows import open_labels
from reinforce.source.formats.base import Shard, find_format, read_samples
from reinforce.source.references import (
    ChangedImages,
    ImageRoots,
    LostImage,
    OpenedStates,
    SourceState,
    former_url,
    images_of_group,
    probe_state,
    read_state,
)
from reinforce.source.samples import CAPTIONS_REPLACED, REPLACED, AbsentShard, RawSample, Refusal
from reinforce.source.urls import ShortRead, canonical, digest_of, is_local, is_public, watching_opened
from schemas import IMAGE_DIGEST, TRUE_CAPTIONS, Reason, image_columns
from teachers.redact import Redactor

#: A chunk is full at CHUNK_ROWS rows or _CHUNK_BYTES encoded bytes.
CHUNK_ROWS = 8
_CHUNK_BYTES = 2**20
_MAX_PENDING_BYTES = 128 * 2**20
_LABEL_COLUMNS = ("metadata", "width", "height", "augmentations")  # of stored samples, by which labels are found
_NOMINAL_VECTOR_BYTES = 1536 * 2


def allocate_pixels(
    pool: DecodePool, config: Config, layers: Iterable[Layer], models: LoadedModels, shards: int
) -> None:
    """Allocate the cells of ``shards`` shards with ``layers`` once, page-locked for copies to the accelerator."""
    session = Session(config, models)
    layout = Inference(session, make_producers(layers, session)).layout
    if layout.cell_bytes:
        for _ in range(shards):
            models.accelerator.pin(pool.allocate(cells_per_shard(config) * layout.cell_bytes))


@dataclass
class ShardProcess:
    """Computes and commits the missing layers of ``shard``.

    ``all_layers`` are those of the config, ``pool`` decodes images, ``group_rows`` bounds the row groups, and ``watch``
    receives its steps.
    """

    shard: PendingShard
    config: Config
    all_layers: Mapping[str, Layer]
    store: Store
    models: LoadedModels
    pool: DecodePool
    group_rows: int = GROUP_ROWS
    watch: LeaseWatch = field(default_factory=LeaseWatch)

    def __post_init__(self) -> None:
        self.redact = Redactor(self.config.model_dump(mode="json"))
        self.layers = {name: self.all_layers[name] for name in self.shard.layers}
        self.source = former_url(self.shard.url, self.config.moved)
        self.refusals = Refusals()
        self.keys = ShardKeys.of([])
        self.groups: list[list[str]] = []  # keys of each row group, if stored layers are compared with them
        self.origin: dict[str, str] = {}  # footer entries about the source file that the samples were read from
        self.linked = hashlib.blake2b(digest_size=8)  # of samples that the state of the source file does not cover
        self.source_record: SourceRecord | None = None
        self.source_note: str | None = None
        self.opened: OpenedStates | None = None  # the states of the source file, if its samples are read
        self.source_counts: Counter[str] = Counter()
        self.labels = LabelReader()
        self.counters = Counters()
        self.session = Session(self.config, self.models, self.counters, self.watch)
        self.producers = make_producers(self.layers.values(), self.session, self.refusals, self.source)
        self.inference = Inference(self.session, self.producers)

    def run(self) -> ShardResult:
        """Raises LayerFailure for a model's error, those of reading and writing as they are."""
        start = time.perf_counter()
        try:
            return self._run(start)
        except (RefusedFile, MisalignedLayer) as error:
            others = [name for name in self.all_layers if name not in self.layers]
            files = set_inputs_aside(self.store, self.shard.name, others, error, self._samples_can_be_replaced)
            if not files:
                raise
            return ShardResult(shard=self.shard.name, seconds=time.perf_counter() - start, set_aside=files)

    def _samples_can_be_replaced(self) -> bool:
        """Whether the source of stored samples can be read and has not changed."""
        if not self.shard.is_file:
            return True
        now = probe_state(self.shard.url)
        return now is not None and SourceState.from_footer(self.origin).same_content(now) is not False

    def _run(self, start: float) -> ShardResult:
        with contextlib.ExitStack() as stack:
            # In the order in which their files are committed.
            schemas_of = {
                layer.name: producer.schema(layer) for producer in self.producers for layer in producer.layers
            }
            writers = {
                name: stack.enter_context(
                    LayerWriter(self.store, layer, schemas_of[name], self.shard.name, self.source)
                )
                for name, layer in self.layers.items()
            }
            samples = None if SAMPLES in self.layers else self._open_input(stack, SAMPLES)
            self.origin = {} if samples is None else parse_footer(samples.metadata)
            # What else is read of layers that are committed already: of samples the columns that producers need.
            stored = {*schemas.samples_schema(self.config.images, true_captions=True).names}
            wanted = sorted({column for producer in self.producers for column in producer.sample_columns} & stored)
            columns = {SAMPLES: ["key", *wanted]}
            needed = dict.fromkeys(name for layer in self.layers.values() for name in layer.needs)
            names = [name for name in needed if name not in self.layers and (wanted or name != SAMPLES)]
            inputs = {name: self._open_input(stack, name) for name in names}
            lease = self._lease(stack)
            self.threads = stack.enter_context(ThreadPoolExecutor(IN_WORK, f"batches of {self.watch.shard}"))
            with self._recording(), contextlib.closing(self._rows(samples, lease)) as rows:
                for index, group in itertools.groupby(rows, key=lambda row: row.group):
                    if short := [name for name, file in inputs.items() if index >= file.num_row_groups]:
                        raise MisalignedLayer(short[0])
                    tables = {name: file.read_row_group(index, columns.get(name)) for name, file in inputs.items()}
                    self._write_group(group, lease, tables, writers)
            stale = self._commit(writers, inputs)
            if not stale.keys().isdisjoint(inputs):
                return ShardResult(shard=self.shard.name, seconds=time.perf_counter() - start, set_aside=stale)
            size = sum(writer.bytes for writer in writers.values())
        reason = self.refusals.shard_reason
        stages = self.session.meter.collect()
        return ShardResult(
            shard=self.shard.name,
            layers=() if reason else self.shard.layers,
            samples=self.counters.samples,
            refused=self.refusals.counts(),
            refused_samples=self.refusals.samples,
            quarantine_reason=reason,
            seconds=time.perf_counter() - start,
            busy=self.counters.busy,
            bytes=size,
            cleaned={captioner: dict(+counts) for captioner, counts in self.refusals.cleaned.items()},
            examples=self.refusals.examples(self.redact.cut),
            source_note=self.source_note,
            record=None if reason else ShardRecord(self.shard.name, self.keys, self.source_record),
            files={} if reason else {name: FileEntry(one.bytes, tuple(one.groups)) for name, one in writers.items()},
            set_aside=stale,
            notes=self.models.batches.take_notes(),
            stages=stages,
            device=device_report(self.models.accelerator),
            read_bytes=self.watch.read_bytes,
            times=self.watch.take_seconds(),
            source_counts={**self.source_counts, **self.labels.counts},
        )

    # -- rows

    def _lease(self, stack: contextlib.ExitStack) -> CellLease:
        """Open the labels, and take pixel cells for the rows that are pending and those of a batch."""
        self.labels = open_labels(self.config, self.layers.values(), self.shard.reinforcements, planned=True)
        stack.enter_context(contextlib.closing(self.labels))
        decoding = DecodeSpec(self.config, self.inference.layout, reader=self.labels.member_reader)
        return stack.enter_context(self.pool.lease(decoding, cells_per_shard(self.config), self.watch))

    def _rows(self, samples: LayerFile | None, lease: CellLease) -> Generator[Row]:
        """The rows of the shard, by its stored ``samples`` if it has some; records what is refused at reading."""
        window = rows_ahead(self.config)
        if samples is not None:
            if (refusal := self.labels.shard_refusal) is not None:
                layer = next(name for name, layer in self.layers.items() if layer.labels is not None)
                raise LayerFailure(layer, f"{refusal.reason.value}: {refusal.detail}")
            yield from self._stored_rows(samples, lease, window)
            return
        for row in rows_from_source(self.config, self.shard.source, self.labels, lease, window, self.group_rows):
            if isinstance(row, Refusal):
                if row.by_storage and not is_local(self.shard.url):
                    raise AbsentShard(row)  # the storage may fail for a while
                self.refusals.add(SAMPLES, row)
            else:
                for refusal in row.decoded.left_out:
                    self.refusals.add(SAMPLES, refusal)
                if any(REPLACED in caption for caption in row.captions):
                    self.source_counts[CAPTIONS_REPLACED] += 1
                yield row

    def _stored_rows(self, file: LayerFile, lease: CellLease, window: int) -> Iterator[Row]:
        """The rows of the samples layer. Raises LayerFailure where the source of referenced images was replaced."""
        replaced = False
        of_images = next((name for name, layer in self.layers.items() if layer.sees), "")
        if lease.cells.needed and not self.config.embeds_images:
            self.source_note, replaced = referenced_source_change(self.shard, parse_footer(file.metadata))
        try:
            yield from rows_from_samples(self.config, self.shard.source, file, self.labels, lease, window)
        except (ChangedImages, FileNotFoundError) as error:
            if replaced:
                reason = describe_replaced(self.shard, self.source_note)
            elif isinstance(error, ChangedImages):
                reason = error.describe(drop_shard_command(self.store.url, [SAMPLES], self.shard.name))
            else:
                raise
            raise LayerFailure(of_images, reason) from error

    @contextlib.contextmanager
    def _recording(self) -> Iterator[None]:
        """Record the states of the source file in the block, if its samples are read.

        Raises ChangedSource instead of an error of reading that shows that the file was replaced.
        """
        if SAMPLES not in self.layers or not self.shard.is_file:
            yield
            return
        with watching_opened(OpenedStates(self.shard.url)) as self.opened:
            try:
                yield
            except OSError as error:
                expired = isinstance(error, ShortRead) or error.errno == errno.EBUSY  # by s3fs, for another ETag
                if expired and (now := probe_state(self.shard.url)) is not None:
                    self.opened.check(now)
                raise

    # -- models and tables

    def _write_group(
        self, rows: Iterator[Row], lease: CellLease, stored: Mapping[str, pa.Table], writers: Mapping[str, LayerWriter]
    ) -> None:
        """Run the models on the rows of one row group, and write its tables."""
        of_group: list[Row] = []
        outputs: list[Outputs] = []
        run = partial(self.inference.run, pixels=lease.cells)
        end, watch = self.inference.finish_group, self.watch
        for batch, results in run_batches(self.threads, lambda: self.inference.rows_per_batch, watch, rows, run, end):
            outputs.append(results)
            lease.free.release(row.cell for row in batch if row.cell is not None)
            of_group += batch
            self.counters.samples += len(batch)
            self.models.counters.samples += len(batch)
        group = RowGroupTables(of_group, outputs, stored)
        self.keys = self.keys.joined(ShardKeys.of(group.keys))
        for row in group.rows if SAMPLES in self.layers else ():
            if isinstance(row.sample, RawSample) and (row.sample.url is not None or not self.shard.is_file):
                content = repr((digest_of(row.sample.image), row.captions))
                self.linked.update(content.encode("utf-8", "surrogatepass"))
        if self.shard.stored:
            self.groups.append(group.keys)
        for producer in self.producers:
            for name, table in producer.tables(group):
                writers[name].write(table)

    # -- files

    def _open_input(self, stack: contextlib.ExitStack, layer: str) -> LayerFile:
        """Open a file that other layers are computed from. Raises RefusedFile, also if it does not exist, and
        MisalignedLayer if it is not of the source of the stored samples."""
        with naming_refused((layer, self.shard.name)):
            try:
                fingerprint = self.all_layers[layer].fingerprint
                file = stack.enter_context(self.store.open_layer(layer, self.shard.name, fingerprint))
            except FileNotFoundError as error:
                raise RefusedFile("it does not exist") from error
        if other_origin(self.origin, parse_footer(file.metadata)):
            raise MisalignedLayer(layer)
        return file

    def _refuse_unread(self) -> None:
        """Record the files of labels that could not be read; those of layers that are not computed now stay.

        Where they are not those of the files that are replaced, sets these aside, samples last: a killed run leaves no
        layer of other samples.
        """
        changed = False
        for name, files in self.labels.unread.items():
            folder = quarantine_of(name)
            known = folder in self.shard.quarantined
            before = {str(row["detail"]) for row in self.store.quarantined(folder, self.shard.name)} if known else set()
            found = {self.redact(f"labels.{name}: {file} {why}")[:2000] for file, why in files.items()}
            changed |= found != before
            if any(layer.labels == name and layer.name not in self.layers for layer in self.all_layers.values()):
                found |= before
            for detail in sorted(found):
                self.refusals.add(folder, Refusal(None, Reason.LABELS_UNREAD, detail))
        for layer in self.shard.replaced if changed else ():
            with contextlib.suppress(FileNotFoundError):
                set_aside(self.store, layer, self.shard.name)

    def _commit(self, writers: Mapping[str, LayerWriter], inputs: Container[str]) -> dict[str, str]:
        """Write the quarantine, then each layer after those it needs, so that a committed layer is complete.

        Before samples that were missing, stored layers that do not fit them are set aside; returns these. If one is
        among the ``inputs``, no layer is written, because some were computed from it. Raises ChangedSource before
        anything is written.
        """
        state = SourceState(None, None)  # of the source file after its samples were read
        if self.opened is not None:
            if self.refusals.shard_reason is None:
                state = read_state(self.shard.url)
            elif self.opened.states:  # it is refused, perhaps because something writes to it
                state = probe_state(self.shard.url) or state
            self.opened.check(state)
        if self.refusals.shard_reason is None:
            self._refuse_unread()
        with self.watch.stage(WRITING, "quarantine"):
            self.refusals.write(self.store, self.shard.name, self.redact.cut)
            own = self.layers.keys() | {quarantine_of(name) for name in self.labels.unread}
            for layer in {*self.shard.quarantined} & own - self.refusals.by_layer.keys():
                self.store.forget_quarantine(layer, self.shard.name)
        if self.refusals.shard_reason is not None:
            return {}
        stale = {}
        if SAMPLES in writers:
            self.source_record = SourceRecord(canonical(self.shard.url), state)
            self.origin = {"source": self.source, **state.footer()}
            for producer in self.producers:
                self.origin |= producer.footer()
            if self.linked.digest() != hashlib.blake2b(digest_size=8).digest():
                self.origin[LINKED] = self.linked.hexdigest()
            one = self.shard
            stale = set_stale_aside(self.store, one.name, one.stored, self.groups, self.origin)
            if any(layer in inputs for layer in stale):
                return stale
        for name, writer in writers.items():
            with self.watch.stage(WRITING, name):
                writer.commit(origin_entries(self.origin))
        return stale


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
    limit, group, rows_of_group, bytes_of_group = max_group_rows(vectors, group_rows), 0, 0, 0
    seen: set[str] = set()  # keys of labels: several samples of the source may match one
    samples = _read_samples(config, shard)
    rows: Iterable[Row | Refusal]
    if labels.sets:
        rows = _labelled_rows(samples, labels)
    else:
        rows = (one if isinstance(one, Refusal) else Row(one.key, sample=one) for one in samples)
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
        size = len(row.sample.image)
        if rows_of_group and (rows_of_group == limit or bytes_of_group + size > GROUP_BYTES):
            group, rows_of_group, bytes_of_group = group + 1, 0, 0
        row.group, rows_of_group, bytes_of_group = group, rows_of_group + 1, bytes_of_group + size
        yield row
    for one in labels.sets:
        yield from one.left_over()


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
            for one in waiting:
                if isinstance(one, Refusal):
                    yield one
                    continue
                of_row = next(found)
                refusal = next((label.refusal for label in of_row if label.refusal is not None), None)
                key = next((label.key for label in of_row if label.key is not None), one.key)
                yield refusal or Row(key, sample=one, labels=of_row)
            waiting, size = [], 0


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
            digests = table[IMAGE_DIGEST].to_pylist()
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
    column = next((name for name in ("image", IMAGE_DIGEST) if name in samples.column_names), None)
    digests = itertools.repeat(None) if column is None else (value.as_py() for value in samples[column])
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
        yield values, [replace(one, records=records) for one in found if one.members is not None]  # to be unpacked


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
            # An image that was accepted before crashes its decode process now. Its pixels are black.
            for array in (self._lease.cells.crops, *self._lease.cells.whole.values()):
                if array is not None:
                    array[row.cell] = 0
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
