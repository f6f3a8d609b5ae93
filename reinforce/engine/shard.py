"""One shard through all models that its missing layers need: rows in, committed layer files out."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from reinforce.config import Config
from reinforce.dataset import vectors
from reinforce.dataset.augment import to_records
from reinforce.dataset.layers import SAMPLES, TRUE_CAPTION, Layer, captions_layer, reads_reinforcements
from reinforce.dataset.store import LayerWriter, Store
from reinforce.engine.models import Counters, Models
from reinforce.engine.outcome import LayerFailure, ShardResult
from reinforce.engine.plan import PendingShard
from reinforce.engine.published import PublishedValue, Reinforcements
from reinforce.engine.rows import Row, Wanted, rows_from_samples, rows_from_source
from reinforce.seeds import seed_for
from reinforce.source.shards import Refusal
from reinforce.source.urls import canonical
from schemas import WHOLE_SHARD, Reason
from teachers.pixels import to_pixels
from teachers.postprocess import clean
from teachers.protocols import Captioner, ImageSpec
from teachers.redact import Redactor

Refused = tuple[str | None, Reason, str]


def process_shard(
    shard: PendingShard,
    config: Config,
    layers: Mapping[str, Layer],
    store: Store,
    models: Models,
    pool: ThreadPoolExecutor,
) -> ShardResult:
    """Compute and commit the layers of ``shard``. Raises whatever reading, a model or writing raises."""
    return _Shard(shard, config, layers, store, models, pool).run()


class _Shard:
    def __init__(
        self,
        shard: PendingShard,
        config: Config,
        layers: Mapping[str, Layer],
        store: Store,
        models: Models,
        pool: ThreadPoolExecutor,
    ) -> None:
        self.shard, self.config, self.store, self.models, self.pool = shard, config, store, models, pool
        self.all_layers = layers
        self.layers = {name: layers[name] for name in shard.layers}
        self.rows_per_batch = max(1, config.workers.batch // config.augmentations.count)
        self.source = canonical(shard.url)
        self.refused: dict[str, list[Refused]] = {}
        self.given_up: str | None = None
        self.cleaned: dict[str, Counter[str]] = {}
        self.counters = Counters()

    def run(self) -> ShardResult:
        start = time.perf_counter()
        with contextlib.ExitStack() as stack:
            writers = {name: stack.enter_context(self._writer(layer)) for name, layer in self.layers.items()}
            stored_captions = {
                name: stack.enter_context(
                    self.store.open_layer(name, self.shard.name, self.all_layers[name].fingerprint)
                )
                for name in self._stored_captions()
            }
            rows = self._rows(stack)
            with contextlib.closing(rows):
                for index, group in itertools.groupby(rows, key=lambda row: row.group):
                    done = self._group(group, {n: f.read_row_group(index) for n, f in stored_captions.items()})
                    for name, table in done.items():
                        writers[name].write(table)
            self._publish(writers)
            size = sum(writer.bytes for writer in writers.values())
        return ShardResult(
            self.shard.name,
            () if self.given_up else self.shard.layers,
            self.counters.samples,
            _count(self.refused),
            self.given_up,
            time.perf_counter() - start,
            self.counters.busy,
            size,
            {captioner: dict(+counts) for captioner, counts in self.cleaned.items()},
        )

    # -- rows

    def _computed(self, kind: str) -> list[Layer]:
        """The layers of a kind that models of ours make."""
        return [layer for layer in self.layers.values() if layer.kind == kind and not layer.published]

    def _wanted(self, stack: contextlib.ExitStack) -> Wanted:
        specs = {self._captioner(layer).image for layer in self._computed("captions")}
        published = None
        if self.shard.reinforcements and reads_reinforcements(self.layers.values()):
            published = Reinforcements(self.shard.reinforcements, self.config, self.layers.values())
            stack.enter_context(contextlib.closing(published))
        return Wanted(bool(self._computed("images")), tuple(sorted(specs, key=repr)), published)

    def _rows(self, stack: contextlib.ExitStack) -> Generator[Row]:
        """The rows of the shard; what is refused on the way is noted for the quarantine."""
        window = 2 * self.rows_per_batch
        wanted = self._wanted(stack)
        if SAMPLES not in self.layers:
            fingerprint = self.all_layers[SAMPLES].fingerprint
            file = stack.enter_context(self.store.open_layer(SAMPLES, self.shard.name, fingerprint))
            if wanted.published is not None and (fault := wanted.published.fault):
                published = next(name for name, layer in self.layers.items() if layer.published)
                raise LayerFailure(published, f"{fault.reason.value}: {fault.detail}")
            yield from rows_from_samples(self.config, file, wanted, self.pool, window)
            return
        for row in rows_from_source(self.config, self.shard.url, wanted, self.pool, window):
            if isinstance(row, Refusal):
                self._refuse(SAMPLES, row.key, row.reason, row.detail)
            else:
                for note in row.notes:
                    self._refuse(SAMPLES, note.key, note.reason, note.detail)
                yield row

    def _stored_captions(self) -> set[str]:
        """Captions layers that exist already and whose texts are to be encoded."""
        needed = {_captions_of(layer) for layer in self.layers.values() if layer.texts not in (None, TRUE_CAPTION)}
        return needed - self.layers.keys()

    def _refuse(self, layer: str, key: str | None, reason: Reason, detail: str) -> None:
        self.refused.setdefault(layer, []).append((key, reason, detail))
        if key is None and reason.value in WHOLE_SHARD:
            self.given_up = reason.value

    # -- one row group

    def _group(self, rows: Iterator[Row], stored_captions: Mapping[str, pa.Table]) -> dict[str, pa.Table]:
        """All layers of one row group."""
        kept: list[Row] = []
        batches: dict[str, list[Any]] = {
            layer.name: [] for layer in (*self._computed("images"), *self._computed("captions"))
        }
        while batch := list(itertools.islice(rows, self.rows_per_batch)):
            self._batch(batch, batches)
            for row in batch:
                row.crops, row.views = None, {}
            kept += batch
            self.counters.samples += len(batch)
            self.models.counters.samples += len(batch)

        keys = [row.key for row in kept]
        captions = {name: _aligned(name, table, keys) for name, table in stored_captions.items()}
        tables: dict[str, pa.Table] = {}
        for name, layer in self.layers.items():
            if layer.kind == "samples":
                tables[name] = self._samples_table(kept)
            elif layer.published and layer.kind == "captions":
                captions[name] = list(self._brought(layer, kept))
                tables[name] = self._captions_table(layer, keys, captions[name])
            elif layer.published:
                tables[name] = self._brought_table(layer, kept)
            elif layer.kind == "captions":
                self._note_unreadable(name, kept)
                captions[name] = [
                    None if row.refusal else self._cleaned(layer, row.key, texts)
                    for row, texts in zip(kept, batches[name], strict=True)
                ]
                tables[name] = self._captions_table(layer, keys, captions[name])
            elif layer.kind == "images":
                self._note_unreadable(name, kept)
                valid = np.array([row.refusal is None for row in kept])
                tables[name] = self._vectors_table(layer, keys, np.concatenate(batches[name]), valid)
            else:
                true = layer.texts == TRUE_CAPTION
                texts = [[r.caption] if r.caption else None for r in kept] if true else captions[_captions_of(layer)]
                tables[name] = self._texts_table(layer, keys, texts)
        return tables

    def _batch(self, rows: Sequence[Row], into: Mapping[str, list[Any]]) -> None:
        """Images of one batch through every captioner and teacher that has something to do with them."""
        put = self.models.accelerator.put
        count = self.config.augmentations.count
        of_crops, captioning = self._computed("images"), self._computed("captions")
        if not of_crops and not captioning:
            return
        # All that the CPU can do comes before the turn.
        crops = put(np.concatenate([r.crops for r in rows if r.crops is not None])) if of_crops else None
        specs = {self._captioner(layer).image for layer in captioning}
        views = {spec: put(np.stack([row.views[spec] for row in rows])) for spec in specs}
        with self.models.turn(self.counters):
            prepared: dict[ImageSpec, torch.Tensor] = {}
            outputs: dict[str, torch.Tensor] = {}
            for layer in of_crops:
                teacher = self.models.teachers[str(layer.model)]
                assert teacher.image is not None
                assert crops is not None
                with _naming(layer):
                    if teacher.image not in prepared:
                        prepared[teacher.image] = to_pixels(crops, teacher.image)
                    outputs[layer.name] = teacher.encode_images(prepared[teacher.image])
            # Queued for all teachers before the first is waited for.
            for layer in of_crops:
                dim = self.models.teachers[str(layer.model)].dim
                with _naming(layer):
                    values = _checked(outputs[layer.name], len(rows) * count, dim)
                into[layer.name].append(values.reshape(len(rows), count, dim))
            for layer in captioning:
                captioner = self._captioner(layer)
                with _naming(layer):
                    into[layer.name] += self._captions(
                        captioner, layer, to_pixels(views[captioner.image], captioner.image), rows
                    )

    def _captions(
        self, captioner: Captioner, layer: Layer, pixels: torch.Tensor, rows: Sequence[Row]
    ) -> Sequence[list[str] | None]:
        seeds = [[seed_for(self.config.seed, row.key, layer.name, n) for n in range(layer.count)] for row in rows]
        texts = captioner.caption(pixels, np.array(seeds, dtype=np.uint64))
        if len(texts) != len(rows) or any(row is not None and len(row) != layer.count for row in texts):
            raise ValueError(f"{layer.model}: caption() must give {layer.count} texts for each of {len(rows)} images")
        return texts

    def _cleaned(self, layer: Layer, key: str, texts: list[str] | None) -> list[str] | None:
        """One image's captions as the config's ``clean`` wants them; None where it leaves none."""
        captioner = str(layer.model)
        if texts is None:
            self._refuse(layer.name, key, Reason.NOT_FINITE, f"{captioner} gave NaN or infinity")
            return None
        rules = self.config.captioners[captioner].clean
        if rules is None:
            return texts
        kept, counts = clean(texts, rules)
        self.cleaned.setdefault(captioner, Counter()).update(counts)
        if kept is None:
            self._refuse(layer.name, key, Reason.NO_TEXT, f"`clean` dropped all captions, {texts[0]!r} among them")
        return kept

    def _texts_table(self, layer: Layer, keys: list[str], texts: Sequence[list[str] | None]) -> pa.Table:
        """Encode each distinct text once, batched with texts of its length."""
        teacher = self.models.teachers[str(layer.model)]
        distinct = sorted({t for row in texts if row for t in row}, key=lambda t: (len(t), t))
        place = {text: i for i, text in enumerate(distinct)}
        encoded = np.zeros((len(distinct), teacher.dim), np.float32)
        batch = self.config.workers.batch
        for i in range(0, len(distinct), batch):
            chunk = distinct[i : i + batch]
            with _naming(layer):
                encode = self.models.text_encoder(teacher, chunk)
                with self.models.turn(self.counters):
                    encoded[i : i + batch] = _checked(encode(), len(chunk), teacher.dim)
        values = np.zeros((len(keys), layer.count, teacher.dim), np.float32)
        valid = np.zeros(len(keys), bool)
        for i, row in enumerate(texts):
            if row:
                values[i] = encoded[[place[text] for text in row]]
                valid[i] = True
            else:
                self._refuse(layer.name, keys[i], Reason.NO_TEXT, "no caption to encode")
        return self._vectors_table(layer, keys, values, valid)

    # -- what others have published

    def _brought(self, layer: Layer, rows: Sequence[Row]) -> Iterator[Any]:
        """What a published layer holds of each row, texts or vectors; None, which is noted, where it cannot be had."""
        for row in rows:
            value: PublishedValue | None = row.brought[layer.name]
            if isinstance(value, Refusal):
                self._refuse(layer.name, row.key, value.reason, value.detail)
                value = None
            elif layer.texts == TRUE_CAPTION and not row.caption:
                self._refuse(layer.name, row.key, Reason.NO_TEXT, "no caption that the published vector could be of")
                value = None
            yield value

    def _brought_table(self, layer: Layer, rows: Sequence[Row]) -> pa.Table:
        values = np.zeros((len(rows), layer.count, layer.dim or 0), np.float32)
        valid = np.zeros(len(rows), bool)
        for i, vectors_of_row in enumerate(self._brought(layer, rows)):
            if vectors_of_row is not None:
                values[i], valid[i] = vectors_of_row, True
        return self._vectors_table(layer, [row.key for row in rows], values, valid)

    # -- tables

    def _captions_table(self, layer: Layer, keys: list[str], captions: Sequence[list[str] | None]) -> pa.Table:
        arrays = [pa.array(keys, pa.string()), pa.array(captions, pa.list_(pa.string()))]
        return pa.table(arrays, schema=self._schema(layer))

    def _samples_table(self, rows: Sequence[Row]) -> pa.Table:
        columns: dict[str, list[Any]] = {
            "key": [row.key for row in rows],
            "caption": [row.caption for row in rows],
            "metadata": [row.metadata for row in rows],
            "width": [row.width for row in rows],
            "height": [row.height for row in rows],
            "augmentations": [to_records(row.augmentations) for row in rows],
        }
        if self.config.embeds_images:
            columns["image"] = [row.image for row in rows]
        else:
            columns["image_ref"] = [
                {"url": self.source, "offset": row.offset, "length": len(row.image)} for row in rows
            ]
        schema = self._schema(self.layers[SAMPLES])
        return pa.table([pa.array(columns[f.name], f.type) for f in schema], schema=schema)

    def _vectors_table(self, layer: Layer, keys: list[str], values: np.ndarray, valid: np.ndarray) -> pa.Table:
        finite = np.isfinite(values).all(axis=(1, 2))
        for i in np.flatnonzero(valid & ~finite):
            self._refuse(layer.name, keys[i], Reason.NOT_FINITE, f"{layer.model} gave NaN or infinity")
        valid = valid & finite
        with _naming(layer):
            columns = vectors.encode(values, layer.dtype, valid)
        return pa.table([pa.array(keys, pa.string()), *columns], schema=self._schema(layer))

    def _note_unreadable(self, layer: str, rows: Sequence[Row]) -> None:
        for row in rows:
            if row.refusal:
                self._refuse(layer, row.key, row.refusal.reason, row.refusal.detail)

    # -- models and files

    def _captioner(self, layer: Layer) -> Captioner:
        return self.models.captioners[str(layer.model)]

    def _schema(self, layer: Layer) -> pa.Schema:
        teacher = self.models.teachers.get(str(layer.model))
        return layer.schema(self.config.images, teacher.dim if teacher else None)

    def _writer(self, layer: Layer) -> LayerWriter:
        return self.store.writer(layer, self._schema(layer), self.shard.name, self.source)

    def _publish(self, writers: Mapping[str, LayerWriter]) -> None:
        """Quarantine first, then each layer after those it needs: a file that is there has nothing left to say."""
        tell = Redactor(self.config.model_dump(mode="json")) if self.refused else str
        for name, rows in self.refused.items():
            self.store.quarantine(name, self.shard.name, [(key, reason, tell(detail)) for key, reason, detail in rows])
        if self.given_up is None:
            for writer in writers.values():
                writer.commit()


@contextlib.contextmanager
def _naming(layer: Layer) -> Iterator[None]:
    """Say in whose forward pass an error arose, so that a failing model costs its own layers only."""
    try:
        yield
    except Exception as error:
        raise LayerFailure(layer.name, f"{type(error).__name__}: {error}") from error


def _captions_of(layer: Layer) -> str:
    """The captions layer whose texts this one encodes."""
    assert layer.texts is not None
    return captions_layer(layer.texts)


def _checked(out: torch.Tensor, rows: int, dim: int) -> np.ndarray:
    if tuple(out.shape) != (rows, dim):
        raise ValueError(f"want embeddings of shape {(rows, dim)}, got {tuple(out.shape)}")
    return out.float().cpu().numpy()


def _aligned(layer: str, table: pa.Table, keys: list[str]) -> list[list[str] | None]:
    if table["key"].to_pylist() != keys:
        raise ValueError(
            f"{layer} does not have the rows of {SAMPLES}: the dataset was changed by hand; delete {layer}"
        )
    captions: list[list[str] | None] = table["captions"].to_pylist()
    return captions


def _count(refused: Mapping[str, list[Refused]]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for rows in refused.values():
        for _, reason, _ in rows:
            counts[reason.value] = counts.get(reason.value, 0) + 1
    return counts
