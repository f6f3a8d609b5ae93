"""Synthetic captions: drawn by a captioner from the image as a whole, and cleaned by the config's rules."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from reinforce.dataset.layers import Layer
from reinforce.engine.messages import raising_layer_failure
from reinforce.engine.pulse import SERVER
from reinforce.engine.worker.decode import GROUP_ROWS, Row
from reinforce.engine.worker.inference import Batch, Outputs
from reinforce.engine.worker.models import Demand, LoadedModels, OutOfMemory, copied, count_tokens, rows_per_batch
from reinforce.engine.worker.producers.base import Capability, Producer, RowGroupTables
from reinforce.engine.worker.self_test import LONG_TEXT, TEXTS, check_captioner, probe_images
from reinforce.source.samples import Refusal
from schemas import Reason
from schemas.seeds import seed_for
from teachers.decoding.postprocess import clean
from teachers.pixels import to_pixels
from teachers.protocols import NoCaptions
from teachers.spec import ModelInfo, Precision

_Seeds = npt.NDArray[np.uint64]
_Texts: TypeAlias = "Sequence[list[str] | NoCaptions | None]"
_T = TypeVar("_T")


class CaptionsProducer(Producer):
    kind = "captions"

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._seeing = [layer for layer in self.computed if layer.sees]
        self._reading = [layer for layer in self.computed if not layer.sees]  # true captions alone

    @staticmethod
    def side(models: LoadedModels, name: str, info: ModelInfo, precision: Precision) -> Capability:
        captioner = models.loaded["captioners"][name]
        count = info.identity["captions"]

        def start(rows: Sequence[int]) -> Callable[[], Any]:
            pixels, true = captioner.image and probe_images(models, captioner.image, rows), [TEXTS[n] for n in rows]
            seeds = np.arange(len(rows) * count, dtype=np.uint64).reshape(-1, count)
            return lambda: models.captions(captioner, pixels, seeds, true)[0]()  # noqa: PLW0108 - captions each time

        return Capability(partial(check_captioner, models, name, count), start, count)

    def prepare(self, rows: Sequence[Row]) -> Mapping[str, npt.NDArray[Any]]:
        """Seeds [rows, captions], or what is drawn from them, by layer."""
        models = self.session.models
        return {layer.name: models.draw(models.of(layer), self._seeds(layer, rows)) for layer in self._seeing}

    def encode(self, batch: Batch, prepared: Mapping[str, npt.NDArray[Any]]) -> Callable[[], Outputs]:
        outputs: dict[str, Callable[[], Sequence[Any]]] = {}
        for layer in self._seeing:
            captioner, seeds = self.session.models.of(layer), prepared[layer.name]
            own = self.without_label(layer, batch.rows)
            whole = batch.whole[captioner.image]
            if len(own) < len(batch.rows):
                whole, seeds = whole[own], seeds[own]
            if self.session.models.by_group(captioner):
                encoded: dict[int, tuple[torch.Tensor, npt.NDArray[Any]]] = {}  # what ``decode`` needs of each image
                if own:
                    with self.session.stage(layer.name, batch.what), self.session.meter.stage(layer.name, 0):
                        images = copied(captioner.encode(to_pixels(whole, captioner.image)))
                        if len(images) != len(own):
                            got = f"encode() must return {len(own)} images, not {len(images)}"
                            raise ValueError(f"{layer.model}: {got}")
                        encoded = dict(zip(own, zip(images, seeds, strict=True), strict=True))
                outputs[layer.name] = partial(list, [encoded.get(place) for place in range(len(batch.rows))])
                continue
            if not own:
                outputs[layer.name] = partial(self._finish, layer, list, batch.rows, batch.what)
                continue
            with self.session.stage(layer.name, batch.what, len(own) * layer.count):
                pixels = to_pixels(whole, captioner.image)
                true = [batch.rows[place].caption for place in own]
                texts, tokens = self.session.models.captions(captioner, pixels, seeds, true)
            self.session.meter.add_tokens(layer.name, tokens)
            outputs[layer.name] = partial(self._finish, layer, texts, batch.rows, batch.what)
        return lambda: {name: finish() for name, finish in outputs.items()}

    def encode_group(self, rows: Sequence[Row]) -> Outputs:
        """Captions that are made of the true captions alone, by layer."""
        outputs: Outputs = {}
        for layer in self._reading:
            own = self.without_label(layer, rows)
            texts, seeds = [rows[place].caption for place in own], self._seeds(layer, rows)[own]
            found = self._read(layer, texts, seeds)
            outputs[layer.name] = self._finish(layer, partial(list, found), rows, f"{len(own)} captions")
        return outputs

    def _read(self, layer: Layer, texts: Sequence[str | None], seeds: npt.NDArray[Any]) -> list[Any]:
        """What a captioner writes for true captions, which share batches with captions of similar length."""
        models, found = self.session.models, list[Any]([None] * len(texts))
        order = sorted(range(len(texts)), key=lambda place: len(texts[place] or ""))

        def write(at_once: int) -> tuple[list[int], Callable[[], _Texts], int]:
            part = order[:at_once]
            with self.session.meter.stage(layer.name, len(part) * layer.count):
                return part, *models.captions(models.of(layer), None, seeds[part], [texts[place] for place in part])

        while order:
            rows = min(len(order), rows_per_batch(self.session.config))
            part, make, tokens = self._in_turn(layer, rows, f"{rows} captions", write)
            self.session.meter.add_tokens(layer.name, tokens)
            for place, captions in zip(part, make(), strict=True):
                found[place] = captions
            order = order[len(part) :]
        return found

    def fill(self) -> None:
        for layer in self._reading:
            rows = rows_per_batch(self.session.config)
            self._read(layer, [LONG_TEXT] * rows, np.zeros((rows, layer.count), np.uint64))
        for layer in self._seeing:
            captioner: Any = self.session.models.of(layer)
            if self.session.models.by_group(captioner) and callable(getattr(captioner, "reserve", None)):
                reserve = partial(self._reserve, captioner)
                self._in_turn(layer, GROUP_ROWS, "the captions of many images", reserve)

    def _reserve(self, captioner: Any, at_once: int) -> None:
        spec, device = captioner.image, self.session.models.accelerator.device
        captioner.reserve(captioner.encode(torch.zeros(1, 3, spec.height, spec.width, device=device))[0], at_once)

    def _in_turn(self, layer: Layer, images: int, what: str, work: Callable[[int], _T], inputs: int = 0) -> _T:
        """The result of ``work`` for that number of images, or as many as fit in the memory of the device."""

        def turn(at_once: int, shared: bool) -> _T:
            with self.session.use_accelerator(), self.session.stage(layer.name, what, inputs):
                return work(at_once)

        while True:
            at_once = self.session.models.batches.fitting("rows", images)
            output, shared = self.session.attempt(partial(turn, at_once))
            if not isinstance(output, OutOfMemory):
                return output
            self.session.halve(output, self.demand(layer, at_once), at_once, shared)

    def _decode(self, layer: Layer, group: RowGroupTables) -> _Texts:
        """The captions of a row group, whose images are decoded together and then released."""
        captioner: Any = self.session.models.of(layer)
        batches = group.outputs(layer.name)
        encoded = [one for batch in batches for one in batch if one is not None]
        for batch in batches:
            batch.clear()
        what = f"the captions of {len(encoded)} images"
        if not encoded:
            return self._finish(layer, list, group.rows, what)
        images, seeds = [image for image, _ in encoded], np.stack([seeds for _, seeds in encoded])

        def decode(at_once: int) -> Any:
            return copied(captioner.decode(images, seeds, at_once))

        tokens = self._in_turn(layer, len(images), what, decode, len(images) * layer.count)
        self.session.meter.add_tokens(layer.name, count_tokens(tokens))
        return self._finish(layer, lambda: copied(captioner.to_texts(tokens)), group.rows, what)

    def demand(self, layer: Layer, rows: int) -> Demand:
        return Demand(
            "rows",
            f"{layer.name}: one image with its {layer.count} captions does",
            f"captioners.{layer.model}: a smaller model, `precision: bf16`, or fewer `captions` or `beams`",
        )

    def table(self, layer: Layer, group: RowGroupTables) -> pa.Table:
        captions: list[list[str] | None] = [None for _ in group.rows]
        if layer in self.computed:
            if layer.sees:
                self.refuse_unreadable(layer, group)
            found: Iterable[list[str] | NoCaptions | None]
            if self.session.models.by_group(self.session.models.of(layer)):
                found = self._decode(layer, group)
            else:
                found = itertools.chain.from_iterable(group.outputs(layer.name))
            for place, (row, texts) in enumerate(zip(group.rows, found, strict=True)):
                if not (layer.sees and row.unreadable) and not self.has_label(layer, row):
                    captions[place] = self._clean(layer, row.key, texts)
        for place, label in self.labels(layer, group.rows):
            captions[place] = [*label]
        group.known[layer.name] = captions
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
        stage = SERVER if getattr(self.session.models.of(layer), "waits", False) else layer.name
        with self.session.watch.stage(stage, what), raising_layer_failure(layer.name):
            found = texts()
            given = [one for one in found if one is not None and not isinstance(one, NoCaptions)]
            if len(found) != count or any(len(one) != layer.count for one in given):
                raise ValueError(f"{layer.model}: caption() must return {layer.count} texts for each of {count} images")
            if count == len(rows):
                return found
            of_rows = dict(zip(own, found, strict=True))
            return [of_rows.get(place, []) for place in range(len(rows))]

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
        self.refusals.cleaned.setdefault(captioner, Counter()).update(counts)
        if kept is None:
            detail = f"`clean` dropped all captions, {texts[0]!r} among them"
            self.refusals.add(layer.name, Refusal(key, Reason.NO_TEXT, detail))
        return kept
