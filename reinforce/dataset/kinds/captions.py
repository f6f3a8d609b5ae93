"""Synthetic captions: a list of texts a row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

import schemas
from reinforce.dataset.layers import (
    SAMPLES,
    Content,
    Layer,
    LayerKind,
    captions_layer,
    compute_fingerprint,
)
from reinforce.terminal import plural

if TYPE_CHECKING:
    from reinforce.config import Config
    from teachers.spec import ModelInfo

_TEXT_BYTES = 20  # of a caption, compressed


class Captions(LayerKind):
    name = "captions"
    pattern = captions_layer("*")
    level = 1
    columns = ("key", "captions")
    values = "captions"
    unit = "captions"
    taken = True
    producer = "captions:CaptionsProducer"
    section = target_section = "captioners"
    model_key = "captioner"
    required = ("count",)
    file_schemas = (schemas.CAPTIONS_SCHEMA,)

    def layers(
        self, config: Config, infos: Mapping[tuple[str, str], ModelInfo], known: Mapping[str, Layer]
    ) -> Iterable[Layer]:
        for name, captioner in config.captioners.items():
            info = infos["captioners", name]
            if info.texts:
                config.input.require_captions(f"captioners.{name}")
            recipe = {"samples": known[SAMPLES].fingerprint, "model": info.identity}
            yield Layer(
                captions_layer(name),
                self,
                compute_fingerprint(recipe),
                needs=(SAMPLES,),
                model=name,
                count=captioner.count,
                published=captioner.published,
                recipe=recipe,
                code=info.code,
                sees="image" if info.images else None,
            )

    def row_bytes(self, layer: Layer, sample: float) -> float | None:
        return layer.count * _TEXT_BYTES

    def entry(self, layer: Layer, stated: Mapping[str, Any]) -> dict[str, Any]:
        return {"captioner": layer.model, "count": layer.count}

    def wrong_rows(self, layer: Layer, table: pa.Table, records: int | None) -> Iterator[tuple[str, Any]]:
        wrong = pc.not_equal(pc.list_value_length(table["captions"]), layer.count)
        yield f"do not have {layer.count} captions", pc.fill_null(wrong, False).to_numpy()

    def content(self, layer: Layer) -> Content:
        return Content(plural(layer.count, "caption"), card=f"{layer.count} synthetic captions")
