"""One more kind of layers: the mean brightness of each image's first crop, one number a sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from reinforce.config import Config
from reinforce.dataset.kinds.registry import KINDS
from reinforce.dataset.layers import SAMPLES, Layer, LayerKind, compute_fingerprint
from reinforce.engine.inference.inference import Batch, Outputs
from reinforce.engine.worker.producers.base import Producer, RowGroup
from reinforce.engine.worker.producers.registry import PRODUCERS

LAYER = "measures/brightness"
_VERSION = 1


class Brightness(LayerKind):
    name = "brightness"
    pattern = LAYER
    level = 1
    columns = ("key", "value")
    values = "value"
    unit = "images"
    crops = True

    def __reduce__(self) -> Any:
        return register, ()  # a worker that receives its layers knows the kind from then on

    def layers(self, config: Config, infos: Mapping[Any, Any], known: Mapping[str, Layer]) -> Iterable[Layer]:
        recipe = self._recipe(known[SAMPLES].fingerprint)
        yield Layer(LAYER, self, compute_fingerprint(recipe), (SAMPLES,), recipe=recipe, sees="crops")

    def schema(self, layer: Layer, images: str) -> pa.Schema:
        return pa.schema([pa.field("key", pa.string(), False), pa.field("value", pa.float32())])

    def row_bytes(self, layer: Layer, sample: float) -> float | None:
        return 4

    def recorded_fingerprint(self, layer: Layer, manifest: Mapping[str, Any]) -> str | None:
        return compute_fingerprint(self._recipe(manifest["layers"][SAMPLES]["fingerprint"]))

    def wrong_rows(self, layer: Layer, table: pa.Table, records: int | None) -> Iterator[tuple[str, Any]]:
        values = np.array(self.decode(table), np.float32)
        yield "are not between 0 and 255", (values < 0) | (values > 255)

    def content(self, layer: Layer) -> str:
        return "mean of the first crop"

    @staticmethod
    def _recipe(samples: str) -> dict[str, Any]:
        return {"samples": samples, "brightness": _VERSION}


class BrightnessProducer(Producer):
    kind = "brightness"
    crops = True

    def encode(self, batch: Batch, prepared: Any) -> Callable[[], Outputs]:
        [layer] = self.layers
        first = batch.crops.unflatten(0, (len(batch.rows), -1))[:, 0]
        with self.session.stage(layer.name, batch.what, len(batch.rows)):
            means = first.float().mean(dim=(1, 2, 3))
        return lambda: {layer.name: means.cpu().numpy()}

    def table(self, layer: Layer, group: RowGroup) -> pa.Table:
        self.refuse_unreadable(layer, group)
        readable = np.array([row.unreadable is None for row in group.rows])
        values = pa.array(np.concatenate(group.outputs(layer.name)), pa.float32(), mask=~readable)
        return pa.table([pa.array(group.keys, pa.string()), values], schema=self.schema(layer))


def register() -> Brightness:
    """Add the kind and its producer to the registries."""
    kind = KINDS.setdefault(Brightness.name, Brightness())
    PRODUCERS.setdefault(Brightness.name, BrightnessProducer)
    assert isinstance(kind, Brightness)
    return kind
