"""Synthetic captions: drawn by a captioner from the image as a whole, and cleaned by the config's rules."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from reinforce.config import Config
from reinforce.dataset.layers import Layer
from reinforce.engine.decode.row import Row
from reinforce.engine.inference.batch_sizes import Demand, rows_per_batch
from reinforce.engine.inference.inference import Batch, Outputs
from reinforce.engine.inference.models import Models
from reinforce.engine.inference.self_test import check_captioner
from reinforce.engine.messages.pulse import SERVER
from reinforce.engine.messages.results import raising_layer_failure
from reinforce.engine.worker.producers.base import Producer, RowGroup
from reinforce.seeds import seed_for
from reinforce.source.samples import Refusal
from schemas import Reason
from teachers.decoding.postprocess import clean
from teachers.preprocessing.pixels import to_pixels
from teachers.protocols import ImageSpec, NoCaptions
from teachers.spec import Precision

_Seeds = npt.NDArray[np.uint64]
_Texts: TypeAlias = "Sequence[list[str] | NoCaptions | None]"


class Captions(Producer):
    kind = "captions"

    @staticmethod
    def self_test(models: Models, layer: Layer, precision: Precision, config: Config | None) -> None:
        batch = None if config is None else models.batches.rows(rows_per_batch(config))
        check_captioner(models, str(layer.model), layer.count, batch)

    @property
    def views(self) -> Iterable[ImageSpec]:
        return [self.session.captioner(layer).image for layer in self.computed]

    def prepare(self, rows: Sequence[Row]) -> Mapping[str, _Seeds]:
        """Seeds [rows, captions] by layer."""
        return {layer.name: self._seeds(layer, rows) for layer in self.computed}

    def encode(self, batch: Batch, prepared: Mapping[str, _Seeds]) -> Callable[[], Outputs]:
        texts: dict[str, Callable[[], _Texts]] = {}
        for layer in self.computed:
            captioner, seeds = self.session.captioner(layer), prepared[layer.name]
            own = self.without_label(layer, batch.rows)
            if not own:
                texts[layer.name] = list
                continue
            views = batch.views[captioner.image]
            if len(own) < len(batch.rows):
                views, seeds = views[own], seeds[own]
            with self.session.stage(layer.name, batch.what, seeds.size):
                pixels = to_pixels(views, captioner.image)
                texts[layer.name], tokens = self.session.models.captions(captioner, pixels, seeds)
            self.session.meter.add_tokens(layer.name, tokens)
        rows, what = batch.rows, batch.what
        return lambda: {layer.name: self._finish(layer, texts[layer.name], rows, what) for layer in self.computed}

    def demand(self, layer: Layer, rows: int) -> Demand:
        return Demand(
            "rows",
            f"{layer.name}: one image with its {layer.count} captions does",
            f"captioners.{layer.model}: a smaller model, `precision: bf16`, or fewer `captions` or `beams`",
        )

    def table(self, layer: Layer, group: RowGroup) -> pa.Table:
        captions = self.published(layer, group) if layer.published else self._captions(layer, group)
        group.set_values(layer.name, captions)
        columns = [pa.array(group.keys, pa.string()), pa.array(captions, pa.list_(pa.string()))]
        return pa.table(columns, schema=self.schema(layer))

    def _seeds(self, layer: Layer, rows: Sequence[Row]) -> _Seeds:
        seed = self.session.config.seed
        seeds = [[seed_for(seed, row.key, layer.name, n) for n in range(layer.count)] for row in rows]
        return np.array(seeds, np.uint64)

    def _finish(self, layer: Layer, texts: Callable[[], _Texts], rows: Sequence[Row], what: str) -> _Texts:
        """The captions of ``rows``, empty for those that have labels."""
        own = self.without_label(layer, rows)
        count = len(own)
        stage = SERVER if getattr(self.session.captioner(layer), "waits", False) else layer.name
        with self.session.watch.stage(stage, what), raising_layer_failure(layer.name):
            found = texts()
            given = [one for one in found if one is not None and not isinstance(one, NoCaptions)]
            if len(found) != count or any(len(one) != layer.count for one in given):
                raise ValueError(f"{layer.model}: caption() must return {layer.count} texts for each of {count} images")
            if count == len(rows):
                return found
            of_rows = dict(zip(own, found, strict=True))
            return [of_rows.get(place, []) for place in range(len(rows))]

    def _captions(self, layer: Layer, group: RowGroup) -> list[list[str] | None]:
        """Captions of each row, or None; records why there are none."""
        self.refuse_unreadable(layer, group)
        texts = itertools.chain.from_iterable(group.outputs(layer.name))
        return [self._caption(layer, row, captions) for row, captions in zip(group.rows, texts, strict=True)]

    def _caption(self, layer: Layer, row: Row, captions: list[str] | NoCaptions | None) -> list[str] | None:
        if self.has_label(layer, row):
            return list(self.label(layer, row))
        return None if row.unreadable else self._clean(layer, row.key, captions)

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
        rules = self.session.config.captioners[captioner].clean
        if rules is None:
            return texts
        kept, counts = clean(texts, rules)
        self.refusals.count_cleaned(captioner, counts)
        if kept is None:
            detail = f"`clean` dropped all captions, {texts[0]!r} among them"
            self.refusals.add(layer.name, Refusal(key, Reason.NO_TEXT, detail))
        return kept
