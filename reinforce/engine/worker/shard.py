"""One shard through all models that its missing layers need: rows, batches, models, tables, commit."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import time
from collections import Counter
from collections.abc import Container, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import schemas
from reinforce.config import Config
from reinforce.dataset.files.damage import drop_shard_command, set_aside
from reinforce.dataset.files.index import FileEntry
from reinforce.dataset.files.layer_file import LayerFile, RefusedFile, naming_refused
from reinforce.dataset.files.origin import LINKED, origin_entries, other_origin
from reinforce.dataset.files.store import LayerWriter, Store, parse_footer
from reinforce.dataset.layers import SAMPLES, Layer
from reinforce.dataset.runs.key_sample import ShardKeys
from reinforce.dataset.runs.shard_records import ShardRecord, SourceRecord
from reinforce.engine.decode.decode_pool import CellLease, DecodePool
from reinforce.engine.decode.row import DecodeSpec, Row
from reinforce.engine.decode.rows import GROUP_ROWS, rows_from_samples, rows_from_source
from reinforce.engine.inference.inference import Batches, Inference, Outputs, cells_per_shard, rows_ahead
from reinforce.engine.inference.models import Counters, Models
from reinforce.engine.inference.session import Session, device_report
from reinforce.engine.messages.pulse import WRITING, LeaseWatch
from reinforce.engine.messages.results import LayerFailure, ShardResult
from reinforce.engine.messages.task import PendingShard
from reinforce.engine.plan.source_changes import describe_replaced, referenced_source_change
from reinforce.engine.worker.producers.base import RowGroup
from reinforce.engine.worker.producers.registry import make_producers
from reinforce.engine.worker.refusals import Refusals
from reinforce.engine.worker.stale_files import MisalignedLayer, set_inputs_aside, set_stale_aside
from reinforce.labels.interface import LabelReader
from reinforce.labels.rows import open_labels
from reinforce.labels.unread import quarantine_of
from reinforce.source.captions import CAPTIONS_REPLACED, REPLACED
from reinforce.source.identity import OpenedStates, SourceState, former_url, probe_state, read_state
from reinforce.source.references import ChangedImages, image_digest
from reinforce.source.samples import AbsentShard, RawSample, Refusal
from reinforce.source.urls import canonical, is_local
from reinforce.source.whole_reads import ShortRead, watching_opened
from schemas import IMAGE_DIGEST, Reason
from teachers.redact import Redactor


def allocate_pixels(pool: DecodePool, config: Config, layers: Iterable[Layer], models: Models, shards: int) -> None:
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
    models: Models
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
            writers = self._writers(stack)
            samples = None if SAMPLES in self.layers else self._open_input(stack, SAMPLES)
            self.origin = {} if samples is None else parse_footer(samples.metadata)
            inputs = {name: self._open_input(stack, name) for name in self._stored_inputs()}
            columns = {SAMPLES: self._sample_columns()}
            lease = self._lease(stack)
            self.batches = stack.enter_context(Batches(lambda: self.inference.rows_per_batch, self.watch))
            with self._recording(), contextlib.closing(self._rows(samples, lease)) as rows:
                for index, group in itertools.groupby(rows, key=lambda row: row.group):
                    if short := [name for name, file in inputs.items() if index >= file.num_row_groups]:
                        raise MisalignedLayer(short[0])
                    stored = {name: file.read_row_group(index, columns.get(name)) for name, file in inputs.items()}
                    self._write(RowGroup(*self._run_models(group, lease), stored), writers)
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
        if lease.cells.needed and not self.config.embeds_images:
            self.source_note, replaced = referenced_source_change(self.shard, parse_footer(file.metadata))
            if replaced and IMAGE_DIGEST not in file.footer[1]:  # else the digests decide
                raise LayerFailure(self._first_image_layer(), describe_replaced(self.shard, self.source_note))
        try:
            yield from rows_from_samples(self.config, self.shard.source, file, self.labels, lease, window)
        except (ChangedImages, FileNotFoundError) as error:
            if replaced:
                reason = describe_replaced(self.shard, self.source_note)
            elif isinstance(error, ChangedImages):
                reason = error.describe(drop_shard_command(self.store.url, [SAMPLES], self.shard.name))
            else:
                raise
            raise LayerFailure(self._first_image_layer(), reason) from error

    def _first_image_layer(self) -> str:
        return next(name for name, layer in self.layers.items() if layer.sees_images)

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

    def _source_state(self) -> SourceState:
        """The state of the source file after its samples were read. Raises ChangedSource if it was another before."""
        if self.opened is None:
            return SourceState(None, None)
        if self.refusals.shard_reason is None:
            state = read_state(self.shard.url)
        else:  # it is refused, perhaps because something writes to it
            state = (probe_state(self.shard.url) if self.opened.states else None) or SourceState(None, None)
        self.opened.check(state)
        return state

    # -- models and tables

    def _run_models(self, rows: Iterator[Row], lease: CellLease) -> tuple[list[Row], list[Outputs]]:
        """The rows of one row group, and the outputs of their batches."""
        group: list[Row] = []
        outputs: list[Outputs] = []
        run = partial(self.inference.run, pixels=lease.cells)
        for batch, results in self.batches.run(rows, run, self.inference.finish_group):
            outputs.append(results)
            lease.free.release(row.cell for row in batch if row.cell is not None)
            group += batch
            self.counters.samples += len(batch)
            self.models.counters.samples += len(batch)
        return group, outputs

    def _write(self, group: RowGroup, writers: Mapping[str, LayerWriter]) -> None:
        self.keys = self.keys.joined(ShardKeys.of(group.keys))
        for row in group.rows if SAMPLES in self.layers else ():
            if isinstance(row.sample, RawSample) and (row.sample.url is not None or not self.shard.is_file):
                content = repr((image_digest(row.sample.image), row.captions))
                self.linked.update(content.encode("utf-8", "surrogatepass"))
        if self.shard.stored:
            self.groups.append(group.keys)
        for producer in self.producers:
            for name, table in producer.tables(group):
                writers[name].write(table)

    # -- files

    def _stored_inputs(self) -> list[str]:
        """Layers that are committed already, and that others are computed from; samples for their columns."""
        needed = {name: None for layer in self.layers.values() for name in layer.needs}
        unused = {SAMPLES} if not self._sample_columns() else set()
        return [name for name in needed if name not in self.layers and name not in unused]

    def _sample_columns(self) -> list[str]:
        """Columns of stored samples that producers need; without any, samples are only read as rows."""
        stored = {*schemas.samples_schema(self.config.images, true_captions=True).names}
        wanted = {column for producer in self.producers for column in producer.sample_columns} & stored
        return ["key", *sorted(wanted)] if wanted else []

    def _writers(self, stack: contextlib.ExitStack) -> dict[str, LayerWriter]:
        """A writer for each layer, in the order in which their files are committed."""
        schemas = {layer.name: producer.schema(layer) for producer in self.producers for layer in producer.layers}
        return {
            name: stack.enter_context(self.store.writer(layer, schemas[name], self.shard.name, self.source))
            for name, layer in self.layers.items()
        }

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
        state = self._source_state()
        if self.refusals.shard_reason is None:
            self._refuse_unread()
        with self.watch.stage(WRITING, "quarantine"):
            self.refusals.write(self.store, self.shard.name, self.redact.cut)
            own = self.layers.keys() | {quarantine_of(name) for name in self.labels.unread}
            for layer in {*self.shard.quarantined} & own - self.refusals.layers:
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
            stale = set_stale_aside(self.store, one.name, one.stored, self.groups, self.origin, one.recorded)
            if any(layer in inputs for layer in stale):
                return stale
        for name, writer in writers.items():
            with self.watch.stage(WRITING, name):
                writer.commit(origin_entries(self.origin))
        return stale
