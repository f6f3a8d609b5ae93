"""One shard through all models that its missing layers need: rows, batches, models, tables, commit."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from reinforce.config import Config
from reinforce.datacompdr.reinforcements import Reinforcements
from reinforce.datacompdr.values import PublishedReader
from reinforce.dataset.files.damage import drop_shard_command
from reinforce.dataset.files.index import FileEntry
from reinforce.dataset.files.layer_file import LayerFile, RefusedFile, naming_refused
from reinforce.dataset.files.store import LayerWriter, Store, parse_footer
from reinforce.dataset.layers import SAMPLES, TRUE_CAPTION, Layer, captions_layer, reads_reinforcements
from reinforce.dataset.runs.key_sample import ShardKeys
from reinforce.dataset.runs.shard_records import ShardRecord, SourceRecord
from reinforce.engine.decode.pool import CellLease, DecodePool
from reinforce.engine.decode.row import DecodeSpec, Row
from reinforce.engine.decode.rows import GROUP_ROWS, RowSpec, rows_from_samples, rows_from_source
from reinforce.engine.inference.batches import Batches, cells_per_shard, rows_ahead
from reinforce.engine.inference.inference import Inference
from reinforce.engine.inference.models import Counters, Models
from reinforce.engine.inference.stage_meter import device_report
from reinforce.engine.messages.pulse import WRITING, LeaseWatch
from reinforce.engine.messages.results import LayerFailure, ShardResult
from reinforce.engine.messages.task import PendingShard
from reinforce.engine.plan.changed_sources import referenced_source_change
from reinforce.engine.worker.refusals import Refusals
from reinforce.engine.worker.stale_files import IMAGES, OutOfStep, origin_entries, set_inputs_aside, set_stale_aside
from reinforce.engine.worker.tables import aligned_captions, captions_table, samples_table, vectors_table
from reinforce.source.identity import SourceState, former_url, read_state
from reinforce.source.references import ChangedImages
from reinforce.source.samples import Refusal
from reinforce.source.urls import canonical
from schemas import IMAGE_DIGEST, Reason
from teachers.decoding.postprocess import clean
from teachers.protocols import NoCaptions
from teachers.redact import Redactor


def process_shard(
    shard: PendingShard,
    config: Config,
    layers: Mapping[str, Layer],
    store: Store,
    models: Models,
    pool: DecodePool,
    group_rows: int = GROUP_ROWS,
    watch: LeaseWatch | None = None,
    redact: Callable[[str], str] | None = None,
) -> ShardResult:
    """Compute and commit the missing layers of ``shard``.

    ``layers`` are all layers of the config, ``pool`` decodes images, ``group_rows`` bounds the row groups, ``watch``
    receives its steps, and ``redact`` removes the config's secrets from what is refused. Raises LayerFailure for a
    model's error, those of reading and writing as they are.
    """
    process = _ShardProcess(shard, config, layers, store, models, pool, group_rows, watch or LeaseWatch())
    process.redact = redact or Redactor(config.model_dump(mode="json"))
    return process.run()


def allocate_pixels(pool: DecodePool, config: Config, layers: Iterable[Layer], models: Models, shards: int) -> None:
    """Allocate the cells of ``shards`` shards with ``layers`` once, page-locked for copies to the accelerator."""
    inference = Inference(config, layers, models, Counters())
    layout = RowSpec(bool(inference.image_layers), inference.captioner_specs).layout(config)
    if layout.cell_bytes:
        for _ in range(shards):
            models.accelerator.pin(pool.allocate(cells_per_shard(config) * layout.cell_bytes))


class _ShardProcess:
    redact: Callable[[str], str]

    def __init__(
        self,
        shard: PendingShard,
        config: Config,
        layers: Mapping[str, Layer],
        store: Store,
        models: Models,
        pool: DecodePool,
        group_rows: int,
        watch: LeaseWatch,
    ) -> None:
        self.shard, self.config, self.store, self.models, self.pool = shard, config, store, models, pool
        self.all_layers = layers
        self.layers = {name: layers[name] for name in shard.layers}
        self.group_rows, self.watch = group_rows, watch
        self.source = former_url(shard.url, config.moved)
        self.refusals = Refusals()
        self.cleaned: dict[str, Counter[str]] = {}
        self.keys = ShardKeys.of([])
        self.groups: list[list[str]] = []  # keys of each row group, if stored layers are compared with them
        self.origin: dict[str, str] = {}  # footer entries about the source file that the samples were read from
        self.images = hashlib.blake2b(digest_size=8)  # of the digests of referenced images
        self.source_record: SourceRecord | None = None
        self.source_note: str | None = None
        self.counters = Counters()
        self.inference = Inference(config, self.layers.values(), models, self.counters, watch)

    def run(self) -> ShardResult:
        start = time.perf_counter()
        try:
            return self._run(start)
        except (RefusedFile, OutOfStep) as error:
            others = [name for name in self.all_layers if name not in self.layers]
            files = set_inputs_aside(self.store, self.shard.name, others, error)
            if not files:
                raise
            return ShardResult(shard=self.shard.name, seconds=time.perf_counter() - start, set_aside=files)

    def _run(self, start: float) -> ShardResult:
        with contextlib.ExitStack() as stack:
            writers = {name: stack.enter_context(self._writer(layer)) for name, layer in self.layers.items()}
            caption_files = {name: self._open_input(stack, name) for name in self._stored_caption_layers()}
            spec = self._row_spec(stack)
            lease = stack.enter_context(self._lease(spec))
            self.batches = stack.enter_context(Batches(lambda: self.inference.rows_per_batch, self.watch))
            with contextlib.closing(self._rows(stack, spec, lease)) as rows:
                for index, group in itertools.groupby(rows, key=lambda row: row.group):
                    if short := [name for name, file in caption_files.items() if index >= file.num_row_groups]:
                        raise OutOfStep(short[0])
                    stored = {name: file.read_row_group(index) for name, file in caption_files.items()}
                    for name, table in self._tables(*self._run_models(group, lease), stored).items():
                        writers[name].write(table)
            stale = self._commit(writers)
            size = sum(writer.bytes for writer in writers.values())
        reason = self.refusals.shard_reason
        stages = self.inference.meter.collect()
        return ShardResult(
            shard=self.shard.name,
            layers=() if reason else self.shard.layers,
            samples=self.counters.samples,
            refused=self.refusals.counts(),
            quarantine_reason=reason,
            seconds=time.perf_counter() - start,
            busy=self.counters.busy,
            bytes=size,
            cleaned={captioner: dict(+counts) for captioner, counts in self.cleaned.items()},
            examples=self.refusals.examples(self.redact),
            source_note=self.source_note,
            record=None if reason else ShardRecord(self.shard.name, self.keys, self.source_record),
            files={} if reason else {name: FileEntry(one.bytes, tuple(one.groups)) for name, one in writers.items()},
            set_aside=stale,
            notes=self.models.batches.take_notes(),
            stages=stages,
            device=device_report(self.models.accelerator),
            read_bytes=self.watch.read_bytes,
            times=self.watch.take_seconds(),
        )

    # -- rows

    def _row_spec(self, stack: contextlib.ExitStack) -> RowSpec:
        published = None
        if self.shard.reinforcements and reads_reinforcements(self.layers.values()):
            published = Reinforcements(self.shard.reinforcements, self.config)
            stack.enter_context(contextlib.closing(published))
        return RowSpec(bool(self.inference.image_layers), self.inference.captioner_specs, published)

    def _lease(self, spec: RowSpec) -> contextlib.AbstractContextManager[CellLease]:
        """Pixel cells for the rows that are pending and those of a batch."""
        published = PublishedReader(self.config, self.layers.values()) if spec.published else None
        decoding = DecodeSpec(self.config, spec.layout(self.config), published=published)
        return self.pool.lease(decoding, cells_per_shard(self.config), self.watch)

    def _rows(self, stack: contextlib.ExitStack, spec: RowSpec, lease: CellLease) -> Generator[Row]:
        """The rows of the shard; records what is refused at reading."""
        window = rows_ahead(self.config)
        if SAMPLES not in self.layers:
            file = self._open_input(stack, SAMPLES)
            self.origin = origin_entries(parse_footer(file.metadata))
            if spec.published is not None and (refusal := spec.published.shard_refusal):
                layer = next(name for name, layer in self.layers.items() if layer.published)
                raise LayerFailure(layer, f"{refusal.reason.value}: {refusal.detail}")
            if spec.needs_image and not self.config.embeds_images:
                self.source_note = self._check_referenced_source(parse_footer(file.metadata))
            try:
                yield from rows_from_samples(self.config, self.shard.source, file, spec, lease, window)
            except ChangedImages as error:
                drop = drop_shard_command(self.store.url, [SAMPLES], self.shard.name)
                raise LayerFailure(self._first_image_layer(), error.describe(drop)) from error
            return
        for row in rows_from_source(self.config, self.shard.source, spec, lease, window, self.group_rows):
            if isinstance(row, Refusal):
                self.refusals.add(SAMPLES, row)
            else:
                for refusal in row.decoded.left_out:
                    self.refusals.add(SAMPLES, refusal)
                yield row

    def _check_referenced_source(self, footer: Mapping[str, str]) -> str | None:
        """A note if the source file has changed since the samples were written. Raises LayerFailure if its images are
        not at their offsets any more."""
        note, replaced = referenced_source_change(self.shard, footer)
        if replaced:
            raise LayerFailure(self._first_image_layer(), str(note))
        return note

    def _first_image_layer(self) -> str:
        return next(name for name, layer in self.layers.items() if layer.kind.name in ("images", "captions"))

    # -- models

    def _run_models(self, rows: Iterator[Row], lease: CellLease) -> tuple[list[Row], dict[str, list[Any]]]:
        """The rows of one row group, and the outputs of their batches by layer."""
        group: list[Row] = []
        outputs: dict[str, list[Any]] = {}
        run, encode = partial(self.inference.run, pixels=lease.cells), self._encode_true_captions
        for batch, results in self.batches.run(rows, run, encode):
            for name, output in results.items():
                outputs.setdefault(name, []).append(output)
            lease.free.release(row.cell for row in batch if row.cell is not None)
            group += batch
            self.counters.samples += len(batch)
            self.models.counters.samples += len(batch)
        return group, outputs

    def _encode_true_captions(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Embeddings of the rows' own captions, and which rows have some, by layer."""
        texts = [[row.caption] if row.caption else None for row in rows]
        layers = [layer for layer in self.layers.values() if layer.texts == TRUE_CAPTION and not layer.published]
        return {layer.name: self.inference.encode_texts(layer, texts) for layer in layers}

    # -- tables

    def _tables(
        self, rows: Sequence[Row], outputs: Mapping[str, list[Any]], stored: Mapping[str, pa.Table]
    ) -> dict[str, pa.Table]:
        """The tables of one row group by layer. ``stored`` are captions layers that were committed before."""
        keys = [row.key for row in rows]
        self.keys = self.keys.joined(ShardKeys.of(keys))
        if self.shard.stored:
            self.groups.append(keys)
        captions = {name: aligned_captions(name, table, keys) for name, table in stored.items()}
        tables: dict[str, pa.Table] = {}
        for name, layer in self.layers.items():
            schema = self._schema(layer)
            if layer.kind.name == "samples":
                tables[name] = samples_table(schema, rows, self.source)
                if IMAGE_DIGEST in schema.names:
                    self.images.update(tables[name][IMAGE_DIGEST].to_numpy().tobytes())
            elif layer.kind.name == "captions":
                captions[name] = self._captions(layer, rows, outputs)
                tables[name] = captions_table(schema, keys, captions[name])
            else:
                values, valid = self._vectors(layer, rows, outputs, captions)
                tables[name] = vectors_table(schema, layer, keys, values, valid, self.refusals)
        return tables

    def _captions(self, layer: Layer, rows: Sequence[Row], outputs: Mapping[str, list[Any]]) -> list[list[str] | None]:
        """Captions of each row, or None; records why there are none."""
        if layer.published:
            return list(self._published_values(layer, rows))
        self._refuse_unreadable(layer, rows)
        texts = itertools.chain.from_iterable(outputs[layer.name])
        return [
            None if row.unreadable else self._clean(layer, row.key, captions)
            for row, captions in zip(rows, texts, strict=True)
        ]

    def _vectors(
        self,
        layer: Layer,
        rows: Sequence[Row],
        outputs: Mapping[str, list[Any]],
        captions: Mapping[str, list[list[str] | None]],
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """Embeddings [rows, count, dim], and which rows have some [rows]; records why others have none."""
        if layer.published:
            found = list(self._published_values(layer, rows))
            values = np.zeros((len(rows), layer.count, layer.dim or 0), np.float32)
            valid = np.array([value is not None for value in found], bool)
            for i in np.flatnonzero(valid):
                values[i] = found[i]
            return values, valid
        if layer.kind.name == "images":
            self._refuse_unreadable(layer, rows)
            return np.concatenate(outputs[layer.name]), np.array([row.unreadable is None for row in rows])
        if layer.texts == TRUE_CAPTION:
            values, valid = outputs[layer.name][0]
            detail = (
                f"no caption to encode: none at input.captions ({', '.join(self.config.input.captions) or 'empty'})"
            )
        else:
            values, valid = self.inference.encode_texts(layer, captions[_captions_of(layer)])
            detail = f"no caption to encode: {_captions_of(layer)} has none for this key"
        for row, encoded in zip(rows, valid, strict=True):
            if not encoded:
                self.refusals.add(layer.name, Refusal(row.key, Reason.NO_TEXT, detail))
        return values, valid

    def _clean(self, layer: Layer, key: str, texts: list[str] | NoCaptions | None) -> list[str] | None:
        """One image's captions after the config's ``clean``; None if none is left."""
        captioner = str(layer.model)
        if texts is None:
            detail = f"{captioner} returned NaN or infinity"
            self.refusals.add(layer.name, Refusal(key, Reason.NOT_FINITE, detail))
            return None
        if isinstance(texts, NoCaptions):
            self.refusals.add(layer.name, Refusal(key, Reason.NO_TEXT, f"{captioner}: {texts.detail}"))
            return None
        rules = self.config.captioners[captioner].clean
        if rules is None:
            return texts
        kept, counts = clean(texts, rules)
        self.cleaned.setdefault(captioner, Counter()).update(counts)
        if kept is None:
            detail = f"`clean` dropped all captions, {texts[0]!r} among them"
            self.refusals.add(layer.name, Refusal(key, Reason.NO_TEXT, detail))
        return kept

    def _published_values(self, layer: Layer, rows: Sequence[Row]) -> Iterator[Any]:
        """The published captions or embeddings of each row, or None; records why there are none."""
        for row in rows:
            value = row.published[layer.name]
            if not isinstance(value, Refusal) and layer.texts == TRUE_CAPTION and not row.caption:
                value = Refusal(row.key, Reason.NO_TEXT, "no caption that the published vector could belong to")
            if isinstance(value, Refusal):
                self.refusals.add(layer.name, value)
                yield None
            else:
                yield value

    def _refuse_unreadable(self, layer: Layer, rows: Sequence[Row]) -> None:
        for row in rows:
            if row.unreadable:
                self.refusals.add(layer.name, row.unreadable)

    # -- files

    def _stored_caption_layers(self) -> set[str]:
        """Captions layers that are committed already and whose texts are to be encoded."""
        needed = {_captions_of(layer) for layer in self.layers.values() if layer.texts not in (None, TRUE_CAPTION)}
        return needed - self.layers.keys()

    def _schema(self, layer: Layer) -> pa.Schema:
        teacher = self.models.teachers.get(str(layer.model))
        return layer.schema(self.config.images, teacher.dim if teacher else None)

    def _writer(self, layer: Layer) -> LayerWriter:
        return self.store.writer(layer, self._schema(layer), self.shard.name, self.source)

    def _open_input(self, stack: contextlib.ExitStack, layer: str) -> LayerFile:
        """Open a file that other layers are computed from. Raises RefusedFile, also if it does not exist."""
        with naming_refused((layer, self.shard.name)):
            try:
                fingerprint = self.all_layers[layer].fingerprint
                return stack.enter_context(self.store.open_layer(layer, self.shard.name, fingerprint))
            except FileNotFoundError as error:
                raise RefusedFile("it does not exist") from error

    def _commit(self, writers: Mapping[str, LayerWriter]) -> dict[str, str]:
        """Write the quarantine, then each layer after those it needs, so that a committed layer is complete.

        Before samples that were missing, stored layers that do not fit them are set aside; returns these.
        """
        with self.watch.stage(WRITING, "quarantine"):
            self.refusals.write(self.store, self.shard.name, self.redact)
        if self.refusals.shard_reason is not None:
            return {}
        stale = {}
        if SAMPLES in writers:
            state = read_state(self.shard.url) if self.shard.is_file else SourceState(None, None)
            self.source_record = SourceRecord(canonical(self.shard.url), state)
            self.origin = state.footer() | ({} if self.config.embeds_images else {IMAGES: self.images.hexdigest()})
            one = self.shard
            stale = set_stale_aside(self.store, one.name, one.stored, self.groups, self.origin, one.recorded)
        for name, writer in writers.items():
            with self.watch.stage(WRITING, name):
                writer.commit(self.origin)
        return stale


def _captions_of(layer: Layer) -> str:
    """The captions layer whose texts this one encodes."""
    assert layer.texts is not None
    return captions_layer(layer.texts)
